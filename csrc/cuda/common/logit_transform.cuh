// From the product u = x W^T to the logit z, and the derivative of that step.
#pragma once

#include "cuda/common/vector_io.cuh"
#include "cuda/kernel_arguments.h"

namespace memeff::cuda {

MEMEFF_DEVICE float exponential(float x) { return expf(x); }
MEMEFF_DEVICE double exponential(double x) { return exp(x); }
MEMEFF_DEVICE float exponential_minus_1(float x) { return expm1f(x); }
MEMEFF_DEVICE double exponential_minus_1(double x) { return expm1(x); }
MEMEFF_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
MEMEFF_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
// For numbers from 1 to 2; in fp32 with an error of 2^-23, in one instruction.
MEMEFF_DEVICE float reciprocal(float x) { return __fdividef(1.f, x); }
MEMEFF_DEVICE double reciprocal(double x) { return 1.0 / x; }
// A number and a NaN give the NaN, as torch's max: the maximum of a row with a NaN is NaN, which tells it
// from a row whose maximum is +inf.
template <class A>
MEMEFF_DEVICE A larger(A a, A b) {
  return a > b || a != a ? a : b;
}

// Classes are counted from the first of the block.
template <class A>
struct LogitTransform {
  const A* bias;          // [classes], or null
  const A* class_weight;  // [classes], or null
  A scale, softcap, inverse_softcap;

  MEMEFF_DEVICE A bias_of(int64_t v) const { return bias == nullptr ? A(0) : bias[v]; }
  MEMEFF_DEVICE A weight_of(int64_t v) const {
    return class_weight == nullptr ? A(1) : class_weight[v];
  }
  // What the soft cap is applied to, of a class whose bias is b.
  MEMEFF_DEVICE A scaled(A u, A b) const { return (u + b) * scale; }
  MEMEFF_DEVICE A capped(A scaled) const {
    return softcap == A(0) ? scaled : softcap * hyperbolic_tangent(scaled * inverse_softcap);
  }
  // z of a class whose bias is b
  MEMEFF_DEVICE A logit(A u, A b) const { return capped(scaled(u, b)); }
  // dz / du without its factor logit_scale: the derivative of tanh, 1 - tanh^2 = 4 e / (1 + e)^2 with
  // e = exp(-2 |x|), which keeps its digits where tanh is close to 1.
  MEMEFF_DEVICE A slope(A scaled) const {
    if (softcap == A(0)) return A(1);
    const A x = scaled * inverse_softcap;
    const A e = exponential(A(-2) * (x < A(0) ? -x : x)), r = reciprocal(A(1) + e);
    return A(4) * e * r * r;
  }
  // The same from z, where nothing else is known.
  MEMEFF_DEVICE A slope_of_logit(A z) const {
    const A t = z * inverse_softcap;
    return softcap == A(0) ? A(1) : A(1) - t * t;
  }
};

template <class A>
LogitTransform<A> logit_transform(const LogitTerms& terms, int64_t first_class) {
  const auto* bias = static_cast<const A*>(terms.bias);
  const auto* weight = static_cast<const A*>(terms.class_weight);
  return {bias == nullptr ? nullptr : bias + first_class,
          weight == nullptr ? nullptr : weight + first_class, static_cast<A>(terms.logit_scale),
          static_cast<A>(terms.softcap),
          static_cast<A>(terms.softcap == 0 ? 0 : 1 / terms.softcap)};
}

// What multiplies the logits of a token; 1 without such factors and beyond the last token.
template <class A>
MEMEFF_DEVICE A scale_of_token(const double* scales, int64_t token, bool exists) {
  return scales == nullptr || !exists ? A(1) : static_cast<A>(scales[token]);
}

// Class probabilities of a block, by its tokens and classes.
template <class A>
struct ProbabilityTargets {
  const void* data;  // null: there are none
  DType dtype;
  int64_t token_stride, class_stride;

  MEMEFF_DEVICE A at(int64_t token, int64_t v) const {
    return load_any<A>(data, dtype, token * token_stride + v * class_stride);
  }
};

template <class A>
ProbabilityTargets<A> probability_targets(const Targets& targets, int64_t first_class) {
  const auto* data = static_cast<const unsigned char*>(targets.probabilities);
  if (data != nullptr) data += first_class * targets.class_stride * size_of(targets.dtype);
  return {data, targets.dtype, targets.token_stride, targets.class_stride};
}

}  // namespace memeff::cuda
