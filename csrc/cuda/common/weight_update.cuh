// How sums enter a gradient (core/weight_update.h), kCount adjacent ones at a time.
#pragma once

#include "core/weight_update.h"
#include "cuda/common/compact_sum.cuh"
#include "cuda/kernel_arguments.h"

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
MEMEFF_DEVICE void update_adjacent(WeightUpdate update, Accumulation<G> (&sums)[kCount],
                                   Accumulation<G> scale, G* gradient, uint16_t* remainder,
                                   int count = kCount) {
  G values[kCount];
  if (update == WeightUpdate::kWrite) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = narrow<G>(sums[i] * scale);
  } else if constexpr (sizeof(G) > 2) {  // WeightUpdate::kAccumulate
    load(values, gradient, count);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += sums[i] * scale;
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

// A split update by compact sums. The columns of a block lie in neighbouring lanes; all lanes of the
// warp take part, with a count of 0 where they have no columns, and zeros behind the `count` sums.
template <int kCount, class G>
MEMEFF_DEVICE void update_compact(WeightUpdate update, float (&sums)[kCount], float scale,
                                  G* gradient, uint8_t* block_exponent, int count) {
  constexpr int kLanes = static_cast<int>(kCompactBlock) / kCount;
  auto* const stored = reinterpret_cast<uint16_t*>(gradient);
  uint16_t codes[kCount];
  if (update != WeightUpdate::kSplitFirst) {
    load(codes, stored, count);
    with_codes(count == 0 ? kLeastCompactExponent : *block_exponent, [&](const auto& of_block) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += of_block.value(uint32_t{codes[i]} << 16);
    });
  }
  if (update == WeightUpdate::kSplitLast) {
    G values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = narrow<G>(sums[i] * scale);
    store(gradient, values, count);
    return;
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = max(largest, magnitude_bits(sums[i]));
  const uint32_t exponent = compact_exponent<kLanes>(largest);
  with_codes(exponent, [&](const auto& of_block) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) codes[i] = static_cast<uint16_t>(of_block.code(sums[i]) >> 16);
  });
  store(stored, codes, count);
  __syncwarp();  // all have read the old exponent
  if (threadIdx.x % kLanes == 0 && count > 0) *block_exponent = static_cast<uint8_t>(exponent);
}

// `sums` into the gradient's `row`, from `column` on, a multiple of kCount; as update_compact() says
// where split sums are compact.
template <int kCount, class G>
MEMEFF_DEVICE void update_gradient(WeightUpdate update, Accumulation<G> (&sums)[kCount],
                                   Accumulation<G> scale, G* gradient, int64_t stride,
                                   const SplitSums& split, int64_t row, int64_t column, int count) {
  G* const to = gradient + row * stride + column;
  if constexpr (sizeof(G) == 2) {
    if (update != WeightUpdate::kWrite && split.exponents != nullptr)
      return update_compact(update, sums, scale, to,
                            split.exponents + row * split.exponents_stride + column / kCompactBlock,
                            count);
  }
  update_adjacent(update, sums, scale, to, split.remainder + row * split.remainder_stride + column,
                  count);
}

}  // namespace memeff::cuda
