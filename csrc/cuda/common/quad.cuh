// Over the 4 lanes that share rows of a product's accumulators; all get the same bits.
#pragma once

#include "cuda/ptx/sm80.cuh"

namespace memeff::cuda {

MEMEFF_DEVICE float quad_max(float x) {
  x = ptx::max_or_nan(x, __shfl_xor_sync(~0u, x, 1));
  return ptx::max_or_nan(x, __shfl_xor_sync(~0u, x, 2));
}
MEMEFF_DEVICE int quad_min(int x) {
  x = min(x, __shfl_xor_sync(~0u, x, 1));
  return min(x, __shfl_xor_sync(~0u, x, 2));
}
MEMEFF_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace memeff::cuda
