// How sums enter a gradient (core/weight_update.h), kCount adjacent ones at a time.
#pragma once

#include "core/weight_update.h"
#include "cuda/common/vector_io.cuh"

namespace memeff::cuda {

// A split sum: the fp32 number whose upper 16 bits lie in a bf16 gradient, the lower 16 elsewhere.
MEMEFF_DEVICE float join_halves(__nv_bfloat16 upper, uint16_t lower) {
  uint16_t bits;
  memcpy(&bits, &upper, sizeof bits);
  return __uint_as_float(uint32_t{bits} << 16 | lower);
}
MEMEFF_DEVICE void split_halves(float value, __nv_bfloat16& upper, uint16_t& lower) {
  const uint32_t bits = __float_as_uint(value);
  const auto upper_bits = static_cast<uint16_t>(bits >> 16);
  memcpy(static_cast<void*>(&upper), &upper_bits, sizeof upper_bits);
  lower = static_cast<uint16_t>(bits);
}

// The first `count` of the sums; `remainder` is used by split updates of bf16 gradients only. Split
// sums stay unscaled and unrounded until kSplitLast.
template <int kCount, class G>
MEMEFF_DEVICE void update_gradient(WeightUpdate update, Accumulation<G> (&sums)[kCount],
                                   Accumulation<G> scale, G* gradient, uint16_t* remainder,
                                   int count = kCount) {
  G values[kCount];
  if (update == WeightUpdate::kWrite) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = narrow<G>(sums[i] * scale);
  } else if (update == WeightUpdate::kAddNative) {
    load(values, gradient, count);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = narrow<G>(widen(values[i]) + sums[i] * scale);
  } else if constexpr (std::is_same_v<G, __nv_bfloat16>) {
    uint16_t lower[kCount];
    if (update != WeightUpdate::kSplitFirst) {
      load(values, gradient, count);
      load(lower, remainder, count);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += join_halves(values[i], lower[i]);
    }
    if (update == WeightUpdate::kSplitLast) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = narrow<G>(sums[i] * scale);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) split_halves(sums[i], values[i], lower[i]);
      store(remainder, lower, count);
    }
  }
  store(gradient, values, count);
}

}  // namespace memeff::cuda
