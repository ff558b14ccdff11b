// Defects in the use of global memory, and launches that hardware would refuse.
#include <vector>

#include "cuda/ptx/sm90.cuh"
#include "emulator/check.h"

using namespace memeff;
using emulator::BufferAccess;
using emulator::expect_clean;
using emulator::GlobalBuffer;

namespace {

alignas(16) float data[260];
float input[256 + 64];  // the last 64 are not registered

template <bool kPlanted>
__global__ void write_past_the_end(float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i + (kPlanted ? 1 : 0)] = 1.f;  // planted: write past the end
}

template <bool kPlanted>
__global__ void read_past_the_end(float* out, const float* in) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i + (kPlanted ? 1 : 0)];  // planted: read past the end
}

template <bool kPlanted>
__global__ void write_input(float* out, const float* in) {
  float* target = kPlanted ? const_cast<float*>(in) : out;
  target[blockIdx.x * blockDim.x + threadIdx.x] = 1.f;  // planted: write of an input
}

template <bool kPlanted>
__global__ void unknown_memory(float* out, const float* elsewhere) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = kPlanted ? elsewhere[i] : 0.f;  // planted: unknown memory
}

template <bool kPlanted>
__global__ void blocks_collide(float* out) {
  out[(kPlanted ? 0 : blockIdx.x * blockDim.x) + threadIdx.x] = 1.f;  // planted: two blocks write
}

// Block 1 reads what block 0 writes: whichever comes first, no order makes it right.
template <bool kPlanted>
__global__ void blocks_communicate(float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (blockIdx.x == 0) {
    out[i] = 1.f;
  } else {
    const float* from = kPlanted ? out + threadIdx.x : out + i;
    out[i] = *from + 1;
  }
}

template <bool kPlanted>
__global__ void threads_collide(float* out) {
  const unsigned t = threadIdx.x;
  float* mine = out + blockIdx.x * blockDim.x;
  mine[t] = 1.f;
  if (!kPlanted) __syncthreads();
  const float other = mine[t ^ 64];  // planted: global read without barrier
  __syncthreads();
  mine[t] = other;
}

// Everybody reads, then everybody overwrites a neighbour: an update in place gone wrong.
template <bool kPlanted>
__global__ void in_place(float* out) {
  const unsigned t = threadIdx.x;
  float* mine = out + blockIdx.x * blockDim.x;
  const float value = mine[t ^ 64];
  if (!kPlanted) __syncthreads();
  mine[t] = value;
}

template <bool kPlanted>
__global__ void mixed_atomics(float* out) {
  if (kPlanted && threadIdx.x == 3)
    out[0] = 0.f;
  else
    atomicAdd(out, 1.f);
}

template <bool kPlanted>
__global__ void misaligned_global(float* out) {
  auto* vectors = reinterpret_cast<float4*>(out + blockIdx.x * 64 + (kPlanted ? 1 : 0));
  if (threadIdx.x < 16)
    vectors[threadIdx.x] = make_float4(1, 2, 3, 4);  // planted: misaligned float4
}

// Launches follow one another: the second may read what the first wrote.
__global__ void first_launch(float* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = 1.f; }
__global__ void second_launch(float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < 128) out[i] += out[255 - i];
}

// Overlapping launches: none may touch what another writes, each must outlast the one before, by one
// of its blocks.
__global__ void first_of_several(float* out) {
  ptx::launch_dependents();
  out[threadIdx.x] = 1.f;
}
template <bool kMeets, bool kEndsFirst>
__global__ void another(float* out, int first) {
  const int i = first + static_cast<int>(16 * blockIdx.x + threadIdx.x);
  out[i] = kMeets && i == first + 31 ? out[31] : 2.f;
  if (!kEndsFirst && blockIdx.x == 1) ptx::wait_for_grid();
}
template <bool kMeets, bool kEndsFirst>
void launch_three() {
  MEMEFF_LAUNCH(first_of_several, dim3(1), dim3(32), 0, nullptr, data);
  for (const int first : {32, 64}) {
    const auto kernel = another<kMeets, kEndsFirst>;
    MEMEFF_LAUNCH_OVERLAPPED(true, 1, kernel, dim3(2), dim3(16), 0, nullptr, data, first);
  }
}

// Reads what the grid before wrote, once that has ended: after the wait, or too early.
template <bool kPlanted>
__global__ void reader(float* out) {
  if (!kPlanted) ptx::wait_for_grid();
  out[32 + threadIdx.x] = out[31 - threadIdx.x] + 1.f;  // planted: read before the wait
  if (kPlanted) ptx::wait_for_grid();
}
template <bool kPlanted>
void launch_reader() {
  MEMEFF_LAUNCH(first_of_several, dim3(1), dim3(32), 0, nullptr, data);
  MEMEFF_LAUNCH_OVERLAPPED(true, 1, reader<kPlanted>, dim3(1), dim3(32), 0, nullptr, data);
}

__global__ void nothing() {}
__global__ void fill_kernel(float* out, float value) { out[threadIdx.x] = value; }
__global__ void much_static_memory() {
  MEMEFF_SHARED_ARRAY(float, tile, 32 * 1024);
  tile[threadIdx.x] = 1.f;
}

#define TWINS(defect, marker, kernel, ...)                                                         \
  EXPECT_DEFECT(#kernel, defect, marker,                                                           \
                [] { MEMEFF_LAUNCH(kernel<true>, dim3(2), dim3(128), 0, nullptr, __VA_ARGS__); }); \
  expect_clean(#kernel,                                                                            \
               [] { MEMEFF_LAUNCH(kernel<false>, dim3(2), dim3(128), 0, nullptr, __VA_ARGS__); })

void test_illegal_launches() {
  const auto illegal = [](const char* what, dim3 grid, dim3 block, std::size_t bytes) {
    EXPECT_DEFECT(what, kBadArgument, nullptr,
                  [&] { MEMEFF_LAUNCH(nothing, grid, block, bytes, nullptr); });
  };
  illegal("too many threads", dim3(1), dim3(1025), 0);
  illegal("empty grid", dim3(0), dim3(32), 0);
  illegal("grid too high", dim3(1, 65536), dim3(32), 0);
  illegal("too much dynamic shared memory", dim3(1), dim3(32), 228 * 1024);
  expect_clean("legal launch",
               [] { MEMEFF_LAUNCH(nothing, dim3(3, 2), dim3(32), 227 * 1024, nullptr); });
  EXPECT_DEFECT("too much static shared memory", kBadArgument, nullptr, [] {
    emulator::config().shared_memory_limit = 64 * 1024;
    MEMEFF_LAUNCH(much_static_memory, dim3(1), dim3(32), 0, nullptr);
    emulator::config().shared_memory_limit = 227 * 1024;
  });
}

// Everything belongs on one stream, whatever the launch.
void test_streams() {
  static int ours, other;
  const auto on = [](const void* stream) {
    emulator::config().stream = &ours;
    MEMEFF_LAUNCH(nothing, dim3(1), dim3(32), 0, stream);
    emulator::config().stream = nullptr;
  };
  expect_clean("the stream of the call", [&] { on(&ours); });
  EXPECT_DEFECT("the default stream", kBadArgument, nullptr, [&] { on(nullptr); });
  EXPECT_DEFECT("another stream", kBadArgument, nullptr, [&] { on(&other); });
  EXPECT_DEFECT("clusters elsewhere", kBadArgument, nullptr,
                [] { MEMEFF_LAUNCH_CLUSTERS(2, nothing, dim3(2), dim3(32), 0, &other); });
  EXPECT_DEFECT("a memset elsewhere", kBadArgument, nullptr,
                [] { emulator::check_stream(&other, "a memset"); });
}

// A launch that is not accepted runs nothing, and its error is seen once.
void test_refused_launches() {
  const auto fill = [](float value) {
    const auto kernel = fill_kernel;
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, data, value);
  };
  expect_clean("refused launch", [&] {
    emulator::config().launches_before_refusal = 1;
    fill(5.f);
    CHECK(cuda::launch_status().ok() && data[0] == 5.f);
    fill(6.f);
    CHECK(!cuda::launch_status().ok() && data[0] == 5.f);
    fill(7.f);
    CHECK(cuda::launch_status().ok() && data[0] == 7.f);
  });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  float* const heap = new float[256]();
  {
    const GlobalBuffer a(data, 256 * sizeof(float), "data");
    const GlobalBuffer b(input, 256 * sizeof(float), "input", BufferAccess::kReadOnly);
    TWINS(kOutOfBounds, "write past the end", write_past_the_end, data);
    TWINS(kOutOfBounds, "read past the end", read_past_the_end, data, input);
    TWINS(kReadOnlyWrite, "write of an input", write_input, data, input);
    TWINS(kGlobalRace, "two blocks write", blocks_collide, data);
    TWINS(kGlobalRace, nullptr, blocks_communicate, data);
    TWINS(kGlobalRace, "global read without barrier", threads_collide, data);
    TWINS(kGlobalRace, nullptr, in_place, data);
    TWINS(kGlobalRace, nullptr, mixed_atomics, data);
    TWINS(kMisaligned, "misaligned float4", misaligned_global, data);
    EXPECT_DEFECT("unknown_memory", kOutOfBounds, "unknown memory", [&] {
      MEMEFF_LAUNCH(unknown_memory<true>, dim3(2), dim3(128), 0, nullptr, data, heap);
    });
    expect_clean("unknown_memory", [&] {
      MEMEFF_LAUNCH(unknown_memory<false>, dim3(2), dim3(128), 0, nullptr, data, heap);
    });
    expect_clean("launches are ordered", [] {
      MEMEFF_LAUNCH(first_launch, dim3(2), dim3(128), 0, nullptr, data);
      MEMEFF_LAUNCH(second_launch, dim3(2), dim3(128), 0, nullptr, data);
      for (int i = 0; i < 256; ++i) CHECK(data[i] == (i < 128 ? 2.f : 1.f));
    });
    expect_clean("overlapping launches", [] { launch_three<false, false>(); });
    EXPECT_DEFECT("they meet", kGlobalRace, nullptr, [] { launch_three<true, false>(); });
    EXPECT_DEFECT("they do not wait", kInFlightAtExit, nullptr,
                  [] { launch_three<false, true>(); });
    EXPECT_DEFECT("reads too early", kGlobalRace, "read before the wait",
                  [] { launch_reader<true>(); });
    expect_clean("reads after the wait", [] {
      launch_reader<false>();
      for (int i = 0; i < 32; ++i) CHECK(data[32 + i] == 2.f);
    });
    test_illegal_launches();
    test_streams();
    test_refused_launches();
  }
  delete[] heap;
  return emulator::finish("test_global_memory");
}
