// The sum of one number per thread over a thread block.
#pragma once

#include "cuda/common/device.cuh"

namespace memeff::cuda {

constexpr int kMaxWarpsPerBlock = 32;

// For one-dimensional blocks of whole warps. All threads call it and get the same sum, added up in
// an order that depends on blockDim alone. `scratch` is shared memory, one element per warp.
MEMEFF_DEVICE double block_sum(double value, double* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  __syncthreads();  // an earlier sum may still be read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = lane < warps ? scratch[lane] : 0.0;
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

}  // namespace memeff::cuda
