// The gradient of one logit from the coefficients of its token (Coefficients in kernel_arguments.h).
#pragma once

#include "cuda/common/logit_transform.cuh"

namespace memeff::cuda {

template <class A>
struct TokenCoefficients {
  A shift, softmax, entropy, centre, target, target_rest, weighted;

  MEMEFF_DEVICE bool all_zero() const {
    return softmax == A(0) && entropy == A(0) && target == A(0) && weighted == A(0);
  }
  // dz of a class of weight w that is no index target
  MEMEFF_DEVICE A gradient(A z, A w) const {
    return exponential(z - shift) * (softmax + entropy_term(z)) + weighted * w;
  }
  // dz of the index target. Two forms of p softmax + target: the first one cancels where p is close
  // to 1, the second where both p and target are small.
  MEMEFF_DEVICE A target_gradient(A z, A w) const {
    const A p = exponential(z - shift);
    const A p_entropy = entropy == A(0) ? A(0) : p * entropy_term(z);
    const A p_target =
        p < A(0.5) ? softmax * p + target : softmax * exponential_minus_1(z - shift) + target_rest;
    return p_target + p_entropy + weighted * w;
  }

 private:
  // p (z - centre) tends to 0 as z tends to -inf
  MEMEFF_DEVICE A entropy_term(A z) const {
    return entropy == A(0) || z == A(-INFINITY) ? A(0) : entropy * (z - centre);
  }
};

// What becomes of the scores E = exp(z - max) of a token and a tile of classes (StoredScores).
struct StoredFactors {
  float softmax, entropy, weighted;  // the first two times exp(max - shift)
  float max, above_centre;           // max - centre
  bool left_out;
};
MEMEFF_DEVICE StoredFactors stored_factors(const TokenCoefficients<float>& c, float max) {
  const bool left_out = c.all_zero();
  const float scale = exponential(max - c.shift);
  return {left_out ? 0.f : scale * c.softmax,
          scale * c.entropy,
          c.weighted,
          max,
          max - c.centre,
          left_out};
}

// p_v softmax. No E exceeds 1; one that is not a number comes from a row whose lse and factor are
// none either, unless the token is left out and has zeros whatever its scores.
MEMEFF_DEVICE float softmax_gradient(float e, float factor) { return fminf(e, 1.f) * factor; }

template <int kCount, class A>
MEMEFF_DEVICE void load_member(TokenCoefficients<A> (&c)[kCount], A TokenCoefficients<A>::* member,
                               const void* array, int64_t token, int count) {
  A values[kCount] = {};
  if (array != nullptr) load(values, static_cast<const A*>(array) + token, count);
#pragma unroll
  for (int i = 0; i < kCount; ++i) c[i].*member = values[i];
}

// The coefficients of kCount adjacent tokens; those beyond `count` get zeros.
template <int kCount, class A>
MEMEFF_DEVICE void load_coefficients(TokenCoefficients<A> (&c)[kCount], const Coefficients& from,
                                     int64_t token, int count) {
  load_member(c, &TokenCoefficients<A>::shift, from.shift, token, count);
  load_member(c, &TokenCoefficients<A>::softmax, from.softmax, token, count);
  load_member(c, &TokenCoefficients<A>::entropy, from.entropy, token, count);
  load_member(c, &TokenCoefficients<A>::centre, from.centre, token, count);
  load_member(c, &TokenCoefficients<A>::target, from.target, token, count);
  load_member(c, &TokenCoefficients<A>::target_rest, from.target_rest, token, count);
  load_member(c, &TokenCoefficients<A>::weighted, from.weighted, token, count);
}

// Index targets of kCount adjacent tokens as classes of the block, -1 where there is none in it.
template <int kCount>
MEMEFF_DEVICE void load_targets(int (&local)[kCount], const int64_t* index, const Block& block,
                                int64_t token, int count) {
  int64_t targets[kCount] = {};
  if (index != nullptr) load(targets, index + token, count);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t v = targets[i] - block.first_class;
    const bool here = index != nullptr && i < count && v >= 0 && v < block.classes;
    local[i] = here ? static_cast<int>(v) : -1;
  }
}

}  // namespace memeff::cuda
