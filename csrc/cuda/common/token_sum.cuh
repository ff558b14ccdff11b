// Sums over tokens of gradients that are rounded to 16 bits afterwards: the gradient of the bias.
#pragma once

#include "cuda/common/block_sum.cuh"
#include "cuda/common/vector_io.cuh"

namespace memeff::cuda {

// Of kCount adjacent tokens from `token` on, each times its factor; no factors: ones. `count` of them
// exist, the others' gradients are zeros.
template <int kCount>
MEMEFF_DEVICE float sum_of_tokens(const float (&gradient)[kCount], const float* factors,
                                  int64_t token, int count) {
  float sum = 0.f;
  if (factors == nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += gradient[i];
  } else {
    float factor[kCount];
    load(factor, factors + token, count);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += factor[i] * gradient[i];
  }
  return sum;
}

// Adds what the lanes of a warp have of one row to the row's sum, which stays in a lane of its own.
MEMEFF_DEVICE void add_to_row(float* row_sum, int lane_of_row, float of_lane) {
  const float sum = warp_sum(of_lane);
  if (static_cast<int>(threadIdx.x) % 32 == lane_of_row) *row_sum += sum;
}

}  // namespace memeff::cuda
