// Statistics of a softmax row that can be computed in pieces and merged in any order.
#pragma once

#include "cuda/common/logit_transform.cuh"

namespace memeff::cuda {

// exp is taken relative to the maximum. With nothing but -inf so far, relative to 0: the sum stays
// 0, while a NaN logit still makes it NaN.
template <class A>
MEMEFF_DEVICE A reference_of(A max) {
  return max == A(-INFINITY) ? A(0) : max;
}

// Entropy, weighted sum, target mass and argmax take registers; kernels that rarely need them
// compile a second variant without (kFull false), in which these members stay what they are.
template <class A, bool kFull = true>
struct RowState {
  A max = A(-INFINITY);
  A sum = A(0);          // sum exp(z - max)
  A entropy = A(0);      // sum exp(z - max) z
  A weighted = A(0);     // sum w z
  A target = A(0);       // sum w q z, or z_y
  A target_mass = A(0);  // sum w q
  int64_t argmax = 0;

  MEMEFF_DEVICE void rescale(A new_max) {
    const A factor = exponential(max - reference_of(new_max));
    sum *= factor;
    if (kFull) entropy *= factor;
    max = new_max;
  }

  MEMEFF_DEVICE void merge(const RowState& other) {
    // Equal maxima: the first class wins, whatever the order of merging.
    if (kFull && (other.max > max || (other.max == max && other.argmax < argmax)))
      argmax = other.argmax;
    RowState theirs = other;
    const A new_max = larger(max, other.max);
    rescale(new_max);
    theirs.rescale(new_max);
    sum += theirs.sum;
    target += theirs.target;
    if (!kFull) return;
    entropy += theirs.entropy;
    weighted += theirs.weighted;
    target_mass += theirs.target_mass;
  }
};

template <class A, bool kFull>
MEMEFF_DEVICE RowState<A, kFull> state_of_lane(const RowState<A, kFull>& mine, int lane_mask) {
  RowState<A, kFull> other;
  other.max = __shfl_xor_sync(~0u, mine.max, lane_mask);
  other.sum = __shfl_xor_sync(~0u, mine.sum, lane_mask);
  other.target = __shfl_xor_sync(~0u, mine.target, lane_mask);
  if (!kFull) return other;
  other.entropy = __shfl_xor_sync(~0u, mine.entropy, lane_mask);
  other.weighted = __shfl_xor_sync(~0u, mine.weighted, lane_mask);
  other.target_mass = __shfl_xor_sync(~0u, mine.target_mass, lane_mask);
  other.argmax = __shfl_xor_sync(~0u, static_cast<long long>(mine.argmax), lane_mask);
  return other;
}

constexpr int kMaxWarps = 32;

// Merges the states of all threads of a one-dimensional block of whole warps; thread 0 gets the
// result. The tree is fixed, so the result does not depend on timing. `scratch` holds one state per
// warp.
template <class A>
MEMEFF_DEVICE void merge_block(RowState<A>& state, RowState<A>* scratch) {
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2)
    state.merge(state_of_lane(state, lane_mask));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  if (lane == 0) scratch[warp] = state;
  __syncthreads();
  if (warp != 0) return;
  state = lane < warps ? scratch[lane] : RowState<A>{};
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2)
    state.merge(state_of_lane(state, lane_mask));
}

}  // namespace memeff::cuda
