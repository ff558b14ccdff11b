// Defects in the use of shared memory, each planted in one instantiation of a kernel and absent
// from the other: the first must be reported, at its line, and the second must not.
#include <vector>

#include "cuda/ptx/sm80.cuh"
#include "emulator/check.h"

using namespace memeff;
using emulator::expect_clean;
using emulator::GlobalBuffer;

namespace {

float results[256];

template <bool kPlanted>
__global__ void missing_barrier_before_read(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 128);
  const int t = threadIdx.x;
  tile[t] = static_cast<float>(t);
  if (!kPlanted) __syncthreads();
  out[t] = tile[127 - t];  // planted: read too early
}

template <bool kPlanted>
__global__ void missing_barrier_before_refill(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 128);
  const int t = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[t] = static_cast<float>(round);  // planted: refill too early
    __syncthreads();
    sum += tile[127 - t];
    if (!kPlanted) __syncthreads();
  }
  out[t] = sum;
}

// Every thread reads the value, among them those of the writer's own warp, which it does wait for.
template <bool kPlanted>
__global__ void broadcast_then_write(float* out) {
  MEMEFF_SHARED_ARRAY(float, shared, 1);
  const int t = threadIdx.x;
  if (t == 0) shared[0] = 1.f;
  __syncthreads();
  out[t] = shared[0];
  if (kPlanted)
    __syncwarp();
  else
    __syncthreads();
  if (t == 64) shared[0] = 2.f;  // planted: write after broadcast
}

template <bool kPlanted>
__global__ void two_writers(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 128);
  const int t = threadIdx.x;
  tile[kPlanted ? t / 2 : t] = 1.f;  // planted: two writers
  __syncthreads();
  out[t] = tile[kPlanted ? 0 : t];
}

// A shuffle makes the warp meet, but does not order its memory accesses.
template <bool kPlanted>
__global__ void shuffle_is_no_fence(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 32);
  const int t = threadIdx.x;
  tile[t] = 1.f;
  const float other = __shfl_xor_sync(~0u, 1.f, 1);
  if (!kPlanted) __syncwarp();
  out[t] = other + tile[t ^ 1];  // planted: no syncwarp
}

template <bool kPlanted>
__global__ void atomic_and_plain(float* out) {
  MEMEFF_SHARED_ARRAY(int, count, 1);
  const int t = threadIdx.x;
  if (t == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(&count[0], 1);
  if (!kPlanted) __syncthreads();
  if (t == 3) out[0] = static_cast<float>(count[0]);
}

template <bool kPlanted>
__global__ void partial_barrier(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 128);
  const int t = threadIdx.x;
  tile[t] = 1.f;
  // Warps 0 and 1 meet at one barrier, 2 and 3 at another.
  ptx::bar_sync(1 + t / 64, 64);
  out[t] = tile[kPlanted ? 127 - t : t ^ 32];  // planted: wrong half
}

template <bool kPlanted>
__global__ void uninitialised(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 64);
  const int t = threadIdx.x;
  if (!kPlanted || t != 40) tile[t] = 1.f;
  __syncthreads();
  out[t] = tile[t];  // planted: never written
}

template <bool kPlanted>
__global__ void uninitialised_sum(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 64);
  const int t = threadIdx.x;
  if (!kPlanted) tile[t] = 0.f;
  tile[t] += 1.f;  // planted: sum without zero
  out[t] = tile[t];
}

template <bool kPlanted>
__global__ void past_the_end(float* out) {
  MEMEFF_SHARED_ARRAY(float, tile, 64);
  const int t = threadIdx.x;
  tile[t + (kPlanted ? 1 : 0)] = 1.f;  // planted: shared write past the end
  out[t] = 0.f;
}

template <bool kPlanted>
__global__ void past_the_end_read(float* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  const float* tile = reinterpret_cast<const float*>(bytes);
  reinterpret_cast<float*>(bytes)[threadIdx.x] = 1.f;
  out[threadIdx.x] = tile[threadIdx.x + (kPlanted ? 64 : 0)];  // planted: shared read past the end
}

template <bool kPlanted>
__global__ void misaligned_vector(float* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  auto* vectors = reinterpret_cast<float4*>(bytes + (kPlanted ? 8 : 0));
  vectors[threadIdx.x].x = 1.f;  // planted: misaligned vector
  out[threadIdx.x] = vectors[threadIdx.x].x;
}

// Copies of structs and memset become calls, which must be checked like loads and stores.
struct Row {
  float value[12];
};
template <bool kPlanted>
__global__ void struct_copy(float* out) {
  MEMEFF_SHARED_ARRAY(Row, rows, 2);
  const int t = threadIdx.x;
  if (t < 2) memset(&rows[t], 0, sizeof(Row));
  if (!kPlanted) __syncwarp();
  if (t < 2) {
    const Row copy = rows[t ^ 1];  // planted: struct copied too early
    out[t] = copy.value[t];
  }
}

template <bool kPlanted>
__global__ void foreign_local(float* out) {
  MEMEFF_SHARED_ARRAY(float*, pointer, 1);
  float local = 1.f;
  if (threadIdx.x == 0) pointer[0] = &local;
  __syncthreads();
  float* p = kPlanted ? pointer[0] : &local;
  out[threadIdx.x] = *p;  // planted: foreign local
  __syncthreads();
}

// Two arrays of one kernel, and one array of a function template, live in different places.
template <int kValue>
MEMEFF_DEVICE float through_shared(float x) {
  MEMEFF_SHARED_ARRAY(float, buffer, 32);
  buffer[threadIdx.x] = x + kValue;
  __syncwarp();
  return buffer[threadIdx.x ^ 1];
}
__global__ void several_arrays(float* out) {
  MEMEFF_SHARED_ARRAY(float, first, 32);
  MEMEFF_SHARED_ARRAY(float, second, 32);
  const int t = threadIdx.x;
  first[t] = 1.f;
  second[t] = 2.f;
  out[t] = first[t] * 1000 + second[t] * 100 + through_shared<1>(0) * 10 + through_shared<2>(0);
}

#define TWINS(kernel, defect, marker, threads, shared_bytes)                              \
  EXPECT_DEFECT(#kernel, defect, marker, [] {                                             \
    MEMEFF_LAUNCH(kernel<true>, dim3(1), dim3(threads), shared_bytes, nullptr, results);  \
  });                                                                                     \
  expect_clean(#kernel, [] {                                                              \
    MEMEFF_LAUNCH(kernel<false>, dim3(1), dim3(threads), shared_bytes, nullptr, results); \
  })

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  const GlobalBuffer guard(results, sizeof results, "results");

  TWINS(missing_barrier_before_read, kSharedRace, "read too early", 128, 0);
  TWINS(missing_barrier_before_refill, kSharedRace, "refill too early", 128, 0);
  TWINS(broadcast_then_write, kSharedRace, "write after broadcast", 128, 0);
  TWINS(two_writers, kSharedRace, "two writers", 128, 0);
  TWINS(shuffle_is_no_fence, kSharedRace, "no syncwarp", 32, 0);
  TWINS(atomic_and_plain, kSharedRace, nullptr, 64, 0);
  TWINS(partial_barrier, kSharedRace, "wrong half", 128, 0);
  TWINS(uninitialised, kUninitialisedRead, "never written", 64, 0);
  TWINS(uninitialised_sum, kUninitialisedRead, "sum without zero", 64, 0);
  TWINS(past_the_end, kOutOfBounds, "shared write past the end", 64, 0);
  TWINS(past_the_end_read, kOutOfBounds, "shared read past the end", 64, 256);
  TWINS(misaligned_vector, kMisaligned, "misaligned vector", 32, 1024);
#if defined(__clang__)
  TWINS(struct_copy, kSharedRace, "struct copied too early", 32, 0);
#endif
  TWINS(foreign_local, kForeignStack, "foreign local", 32, 0);

  expect_clean("several_arrays", [] {
    MEMEFF_LAUNCH(several_arrays, dim3(1), dim3(32), 0, nullptr, results);
    for (int i = 0; i < 32; ++i) CHECK(results[i] == 1212.f);
  });
  return emulator::finish("test_shared_memory");
}
