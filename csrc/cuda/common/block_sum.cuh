// The sum of one number per thread over a warp; the sum, or the maximum, over a thread block.
#pragma once

#include "cuda/common/device.cuh"

namespace memeff::cuda {

constexpr int kMaxWarpsPerBlock = 32;

// All lanes call it and get the same sum, in an order that is always the same.
template <class A>
MEMEFF_DEVICE A warp_sum(A value) {
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// For one-dimensional blocks of whole warps. All threads call it and get the same result, combined in
// an order that depends on blockDim alone. `scratch` is shared memory, one element per warp.
template <class Combine>
MEMEFF_DEVICE double combine_over_block(double value, double* scratch, const Combine& combine) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  for (int mask = 16; mask > 0; mask /= 2)
    value = combine(value, __shfl_xor_sync(~0u, value, mask));
  __syncthreads();  // an earlier result may still be read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < warps ? scratch[lane] : 0.0;
  for (int mask = 16; mask > 0; mask /= 2)
    value = combine(value, __shfl_xor_sync(~0u, value, mask));
  return value;
}

MEMEFF_DEVICE double block_sum(double value, double* scratch) {
  return combine_over_block(value, scratch, [](double a, double b) { return a + b; });
}

// The numbers are not negative; NaNs do not count.
MEMEFF_DEVICE double block_max(double value, double* scratch) {
  return combine_over_block(value, scratch, [](double a, double b) { return fmax(a, b); });
}

}  // namespace memeff::cuda
