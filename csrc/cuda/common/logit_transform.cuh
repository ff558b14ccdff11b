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
MEMEFF_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
MEMEFF_DEVICE double larger(double a, double b) { return fmax(a, b); }

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
  // z of a class whose bias is b
  MEMEFF_DEVICE A logit(A u, A b) const {
    const A scaled = (u + b) * scale;
    return softcap == A(0) ? scaled : softcap * hyperbolic_tangent(scaled * inverse_softcap);
  }
  // dz / du without its factor logit_scale, from z: the derivative of tanh is 1 - tanh^2
  MEMEFF_DEVICE A slope(A z) const {
    const A t = z * inverse_softcap;  // 0 without a soft cap, unless z is infinite
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
