// Do kernels compute the right values? Indices, shuffles, votes, atomics, barriers, early exits.
#include <numeric>
#include <vector>

#include "cuda/ptx/sm80.cuh"
#include "emulator/check.h"

using namespace memeff;
using emulator::GlobalBuffer;

namespace {

__global__ void write_indices(int* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * 1000 + thread;
}

void test_indices() {
  std::vector<int> out(2 * 3 * 2 * 24);
  const GlobalBuffer guard(out.data(), out.size() * 4, "out");
  int* const p = out.data();
  emulator::expect_clean("indices", [&] {
    MEMEFF_LAUNCH(write_indices, dim3(2, 3, 2), dim3(4, 3, 2), 0, nullptr, p);
    for (int i = 0; i < static_cast<int>(out.size()); ++i) CHECK(out[i] == i / 24 * 1000 + i % 24);
  });
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_down_sync(~0u, lane, 16);
  out[32 + lane] = __shfl_up_sync(~0u, lane, 1);
  out[64 + lane] = __shfl_xor_sync(~0u, lane, 5);
  out[96 + lane] = __shfl_sync(~0u, lane, 3, 8);
  out[128 + lane] = static_cast<int>(__shfl_xor_sync(~0u, static_cast<double>(lane), 1));
  out[160 + lane] = __shfl_down_sync(~0u, lane, 3, 8);
}

void test_shuffles() {
  std::vector<int> out(192);
  const GlobalBuffer guard(out.data(), out.size() * 4, "out");
  int* const p = out.data();
  emulator::expect_clean("shuffles", [&] {
    MEMEFF_LAUNCH(shuffles, dim3(1), dim3(32), 0, nullptr, p);
    for (int lane = 0; lane < 32; ++lane) {
      CHECK(out[lane] == (lane < 16 ? lane + 16 : lane));
      CHECK(out[32 + lane] == (lane == 0 ? 0 : lane - 1));
      CHECK(out[64 + lane] == (lane ^ 5));
      CHECK(out[96 + lane] == lane / 8 * 8 + 3);
      CHECK(out[128 + lane] == (lane ^ 1));
      CHECK(out[160 + lane] == (lane % 8 < 5 ? lane + 3 : lane));
    }
  });
}

// Half a warp shuffles under its own mask, in a divergent branch.
__global__ void half_warp_sum(int* out) {
  const int lane = threadIdx.x;
  if (lane < 16) {
    int sum = lane;
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffu, sum, step);
    out[lane] = sum;
  } else {
    out[lane] = -1;
  }
  __syncwarp();
}

__global__ void votes(unsigned* out) {
  const int lane = threadIdx.x;
  out[lane] = __ballot_sync(~0u, lane % 3 == 0);
  out[32 + lane] = static_cast<unsigned>(__any_sync(~0u, lane == 7));
  out[64 + lane] = static_cast<unsigned>(__all_sync(~0u, lane < 31));
  out[96 + lane] = static_cast<unsigned>(__all_sync(~0u, lane < 32));
  out[128 + lane] = __match_any_sync(~0u, lane / 4);
}

void test_votes() {
  std::vector<unsigned> out(160);
  std::vector<int> sums(32);
  const GlobalBuffer guard(out.data(), out.size() * 4, "out");
  const GlobalBuffer guard_sums(sums.data(), sums.size() * 4, "sums");
  unsigned* const p = out.data();
  int* const s = sums.data();
  emulator::expect_clean("votes", [&] {
    MEMEFF_LAUNCH(votes, dim3(1), dim3(32), 0, nullptr, p);
    MEMEFF_LAUNCH(half_warp_sum, dim3(1), dim3(32), 0, nullptr, s);
    for (int lane = 0; lane < 32; ++lane) {
      CHECK(out[lane] == 0x49249249u);
      CHECK(out[32 + lane] == 1 && out[64 + lane] == 0 && out[96 + lane] == 1);
      CHECK(out[128 + lane] == 0xfu << lane / 4 * 4);
      CHECK(sums[lane] == (lane < 16 ? 120 : -1));
    }
  });
}

__global__ void atomics(int* sum, float* fsum, int* largest, unsigned* flag) {
  MEMEFF_SHARED_ARRAY(int, block_sum, 1);
  if (threadIdx.x == 0) block_sum[0] = 0;
  __syncthreads();
  atomicAdd(&block_sum[0], 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(sum, block_sum[0]);
  atomicAdd(fsum, 0.5f);
  atomicMax(largest, static_cast<int>(blockIdx.x * 64 + threadIdx.x));
  if (threadIdx.x == 5) atomicCAS(flag, 0u, 9u);
}

void test_atomics() {
  int sum, largest;
  float fsum;
  unsigned flag;
  const GlobalBuffer a(&sum, 4, "sum"), b(&fsum, 4, "fsum"), c(&largest, 4, "largest"),
      d(&flag, 4, "flag");
  emulator::expect_clean("atomics", [&] {
    sum = 0, largest = -1, fsum = 0, flag = 0;
    int *s = &sum, *l = &largest;
    float* f = &fsum;
    unsigned* g = &flag;
    MEMEFF_LAUNCH(atomics, dim3(4), dim3(64), 0, nullptr, s, f, l, g);
    CHECK(sum == 256 && fsum == 128.f && largest == 255 && flag == 9);
  });
}

// A tree sum with __syncthreads; some threads leave early, which a barrier must not wait for.
__global__ void block_sum(const float* in, float* out, int count) {
  MEMEFF_SHARED_ARRAY(float, partial, 128);
  partial[threadIdx.x] = static_cast<int>(threadIdx.x) < count ? in[threadIdx.x] : 0.f;
  __syncthreads();
  for (int step = 64; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) >= step) return;
    partial[threadIdx.x] += partial[threadIdx.x + step];
    __syncthreads();
  }
  out[0] = partial[0];
}

void test_barrier_with_exits() {
  std::vector<float> in(100);
  std::iota(in.begin(), in.end(), 1.f);
  float out = 0;
  const GlobalBuffer a(in.data(), in.size() * 4, "in", emulator::BufferAccess::kReadOnly);
  const GlobalBuffer b(&out, 4, "out");
  const float* const i = in.data();
  float* const o = &out;
  emulator::expect_clean("barriers", [&] {
    out = 0;
    MEMEFF_LAUNCH(block_sum, dim3(1), dim3(128), 0, nullptr, i, o, 100);
    CHECK(out == 5050.f);
  });
}

// Producer and consumer warps meet at a named barrier; the producer does not wait.
__global__ void named_barrier(int* out) {
  MEMEFF_SHARED_ARRAY(int, message, 32);
  const int t = threadIdx.x;
  if (t < 32) {
    message[t] = t * t;
    ptx::bar_arrive(3, 64);
  } else {
    ptx::bar_sync(3, 64);
    out[t - 32] = message[t - 32];
  }
}

void test_named_barrier() {
  std::vector<int> out(32);
  const GlobalBuffer guard(out.data(), 128, "out");
  int* const p = out.data();
  emulator::expect_clean("named barrier", [&] {
    MEMEFF_LAUNCH(named_barrier, dim3(1), dim3(64), 0, nullptr, p);
    for (int i = 0; i < 32; ++i) CHECK(out[i] == i * i);
  });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_indices();
  test_shuffles();
  test_votes();
  test_atomics();
  test_barrier_with_exits();
  test_named_barrier();
  return emulator::finish("test_execution");
}
