// From the product u = x W^T to the logit z, and the derivative of that step.
#pragma once

#include "cuda/common/vector_io.cuh"
#include "cuda/launch.h"

namespace memeff::cuda {

MEMEFF_DEVICE float exponential(float x) { return expf(x); }
MEMEFF_DEVICE double exponential(double x) { return exp(x); }
MEMEFF_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
MEMEFF_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
MEMEFF_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
MEMEFF_DEVICE double larger(double a, double b) { return fmax(a, b); }

template <class A>
struct LogitTransform {
  const A* bias;  // of column 0 of the block, or null
  A scale, softcap;

  // z of column `column`
  MEMEFF_DEVICE A logit(A u, int64_t column) const {
    if (bias != nullptr) u += bias[column];
    const A scaled = u * scale;
    return softcap == A(0) ? scaled : softcap * hyperbolic_tangent(scaled / softcap);
  }
  // dz / du, from z: the derivative of tanh is 1 - tanh^2
  MEMEFF_DEVICE A slope(A z) const {
    if (softcap == A(0)) return scale;
    const A t = z / softcap;
    return scale * (A(1) - t * t);
  }
};

template <class A>
LogitTransform<A> logit_transform(const LogitsBlock& block) {
  const auto* bias = static_cast<const A*>(block.bias);
  return {bias == nullptr ? nullptr : bias + block.first_class, static_cast<A>(block.logit_scale),
          static_cast<A>(block.softcap)};
}

// What a token's probabilities over the block's classes and the class weights are, ones where
// absent.
template <class A>
struct ClassTerms {
  const A* class_weight;      // of column 0 of the block, or null
  const void* probabilities;  // of token 0; null for index targets
  DType dtype;
  int64_t stride, first_class;

  MEMEFF_DEVICE A weight(int64_t column) const {
    return class_weight == nullptr ? A(1) : class_weight[column];
  }
  MEMEFF_DEVICE A probability(int64_t token, int64_t column) const {
    return load_any<A>(probabilities, dtype, token * stride + first_class + column);
  }
};

template <class A>
ClassTerms<A> class_terms(const LogitsBlock& block) {
  const auto* weight = static_cast<const A*>(block.class_weight);
  return {weight == nullptr ? nullptr : weight + block.first_class, block.probabilities,
          block.probabilities_dtype, block.probabilities_stride, block.first_class};
}

}  // namespace memeff::cuda
