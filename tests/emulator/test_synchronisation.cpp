// Threads that wait for what never comes, and warps or blocks that meet at different instructions.
#include "cuda/ptx/sm80.cuh"
#include "emulator/check.h"

using namespace memeff;
using emulator::expect_clean;
using emulator::GlobalBuffer;

namespace {

int results[256];

// One warp waits for a count of 96, but only two warps ever come.
template <bool kPlanted>
__global__ void barrier_count(int* out) {
  if (threadIdx.x < 64) ptx::bar_sync(1, kPlanted ? 96 : 64);  // planted: too few arrive
  out[threadIdx.x] = 1;
}

// An early return skips a barrier with a fixed count.
template <bool kPlanted>
__global__ void early_return(int* out) {
  if (kPlanted && threadIdx.x >= 96) return;
  out[threadIdx.x] = 1;
  ptx::bar_sync(2, 128);  // planted: not everybody
}

// The first half of the block hands two things to the second half, which must have taken one before
// the next is announced: an arrival does not wait, and two of them would pass for everybody's.
enum class HandOver { kRight, kNotAnnounced, kTooFast, kOtherCount };
template <HandOver kKind>
__global__ void hand_over(int* out) {
  for (int item = 0; item < 2; ++item) {
    const bool announced = kKind != HandOver::kNotAnnounced || item == 0;
    if (threadIdx.x < 64) {
      if (announced) ptx::bar_arrive(1, 128);                  // planted: announced
      if (kKind != HandOver::kTooFast) ptx::bar_sync(2, 128);  // planted: not taken
    } else {
      ptx::bar_sync(1, kKind == HandOver::kOtherCount ? 64 : 128);
      if (kKind != HandOver::kTooFast) ptx::bar_arrive(2, 128);
    }
  }
  out[threadIdx.x] = 1;
}

// __syncthreads meets a named barrier that uses barrier 0.
template <bool kPlanted>
__global__ void same_barrier_twice(int* out) {
  if (kPlanted && threadIdx.x < 32)
    ptx::bar_sync(0, 64);
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool kPlanted>
__global__ void two_syncthreads(int* out) {
  // Something must differ around the two, or the compiler makes one barrier of them.
  if (!kPlanted || threadIdx.x < 64) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

// The lanes that do not shuffle wait elsewhere.
template <bool kPlanted>
__global__ void shuffle_in_branch(int* out) {
  int value = static_cast<int>(threadIdx.x);
  if (!kPlanted || threadIdx.x % 32 < 16) value = __shfl_xor_sync(~0u, value, 1);  // planted: half
  __syncthreads();
  out[threadIdx.x] = value;
}

template <bool kPlanted>
__global__ void shuffle_from_absent_lane(int* out) {
  const int lane = threadIdx.x % 32;
  if (lane < 16) {
    const int from = kPlanted ? lane + 16 : 15 - lane;
    out[threadIdx.x] = __shfl_sync(0xffffu, lane, from);  // planted: absent lane
  }
}

template <bool kPlanted>
__global__ void outside_own_mask(int* out) {
  out[threadIdx.x] = __any_sync(kPlanted ? 0xffffu : ~0u, 1);  // planted: not in the mask
}

// mma.sync is .aligned: the warp must execute one and the same instruction.
template <bool kPlanted>
__global__ void product_in_branch(int* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!kPlanted || threadIdx.x % 32 < 16) {
    ptx::mma_m16n8k16_bf16(d, a, b);
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
}

template <bool kPlanted>
__global__ void product_after_exit(int* out) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (kPlanted && threadIdx.x % 32 >= 24) return;
  __syncwarp();
  ptx::mma_m16n8k16_bf16(d, a, b);  // planted: lanes have left
  out[threadIdx.x] = static_cast<int>(d[0]);
}

template <bool kPlanted>
__global__ void odd_barrier_count(int* out) {
  ptx::bar_sync(1, kPlanted ? 120 : 128);  // planted: not a multiple of 32
  out[threadIdx.x] = 1;
}

template <bool kPlanted>
__global__ void no_such_barrier(int* out) {
  ptx::bar_sync(kPlanted ? 16 : 15, 128);  // planted: no such barrier
  out[threadIdx.x] = 1;
}

// Half of each warp arrives, as many threads as the barrier counts; but it counts warps.
template <bool kPlanted>
__global__ void half_warps(int* out) {
  if (threadIdx.x % 32 < (kPlanted ? 16 : 32)) ptx::bar_sync(1, kPlanted ? 64 : 128);
  out[threadIdx.x] = 1;
}

#define TWINS(kernel, defect, marker)                                                          \
  EXPECT_DEFECT(#kernel, defect, marker,                                                       \
                [] { MEMEFF_LAUNCH(kernel<true>, dim3(1), dim3(128), 0, nullptr, results); }); \
  expect_clean(#kernel,                                                                        \
               [] { MEMEFF_LAUNCH(kernel<false>, dim3(1), dim3(128), 0, nullptr, results); })

template <HandOver kKind>
void launch_hand_over() {
  MEMEFF_LAUNCH(hand_over<kKind>, dim3(1), dim3(128), 0, nullptr, results);
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  const GlobalBuffer guard(results, sizeof results, "results");
  TWINS(barrier_count, kDeadlock, "too few arrive");
  TWINS(early_return, kDeadlock, "not everybody");
  expect_clean("hand_over", launch_hand_over<HandOver::kRight>);
  EXPECT_DEFECT("hand_over", kDeadlock, "not taken", launch_hand_over<HandOver::kNotAnnounced>);
  EXPECT_DEFECT("hand_over", kDivergence, "announced", launch_hand_over<HandOver::kTooFast>);
  EXPECT_DEFECT("hand_over", kDivergence, nullptr, launch_hand_over<HandOver::kOtherCount>);
  TWINS(same_barrier_twice, kDivergence, nullptr);
  TWINS(two_syncthreads, kDivergence, nullptr);
  TWINS(shuffle_in_branch, kDeadlock, "half");
  TWINS(shuffle_from_absent_lane, kDivergence, "absent lane");
  TWINS(outside_own_mask, kDivergence, "not in the mask");
  TWINS(product_in_branch, kDivergence, nullptr);
  TWINS(product_after_exit, kDivergence, "lanes have left");
  TWINS(odd_barrier_count, kBadArgument, "not a multiple of 32");
  TWINS(no_such_barrier, kBadArgument, "no such barrier");
  TWINS(half_warps, kDivergence, nullptr);
  return emulator::finish("test_synchronisation");
}
