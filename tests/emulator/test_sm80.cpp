// cp.async, ldmatrix, stmatrix, mma.sync: values against plain loops, and planted defects.
#include <random>
#include <vector>

#include "emulator/check.h"
#include "emulator/more_ptx.cuh"

using namespace memeff;
using emulator::BufferAccess;
using emulator::expect_clean;
using emulator::GlobalBuffer;

namespace {

alignas(16) float data[512 + 64];  // the last 64 are not registered
float results[512];

// ---- cp.async ----

// Thread t copies four floats, and reads four that another thread copied.
enum class CopyBug { kNone, kNoWait, kNoBarrier, kNoCommit, kRefillTooEarly, kNeverWaited };

template <CopyBug kBug>
__global__ void staged_copy(const float* in, float* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  const int t = threadIdx.x;
  const auto* tile = reinterpret_cast<const float*>(bytes);
  const uint32_t mine = ptx::shared_address(bytes) + 16 * t;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    ptx::cp_async_16(mine, in + round * 256 + 4 * t);  // planted: refill
    if (kBug != CopyBug::kNoCommit) ptx::cp_async_commit();
    if (kBug != CopyBug::kNoWait) ptx::cp_async_wait<kBug == CopyBug::kNeverWaited ? 8 : 0>();
    if (kBug != CopyBug::kNoBarrier) __syncthreads();
    sum += tile[4 * (63 - t)];  // planted: use
    if (kBug != CopyBug::kRefillTooEarly) __syncthreads();
  }
  if (kBug == CopyBug::kNoWait) ptx::cp_async_wait<0>();
  out[t] = sum;
}

template <CopyBug kBug>
void run_copy() {
  MEMEFF_LAUNCH(staged_copy<kBug>, dim3(1), dim3(64), 1024, nullptr, data, results);
}

void test_copies() {
  const auto race = [](const char* what, const char* marker, void (*run)()) {
    EXPECT_DEFECT(what, kSharedRace, marker, run);
  };
  race("no wait", "use", run_copy<CopyBug::kNoWait>);
  race("no barrier", "use", run_copy<CopyBug::kNoBarrier>);
  race("no commit", "use", run_copy<CopyBug::kNoCommit>);
  race("refill too early", "refill", run_copy<CopyBug::kRefillTooEarly>);
  race("wait for the wrong group", "use", run_copy<CopyBug::kNeverWaited>);
  EXPECT_DEFECT("in flight", kInFlightAtExit, nullptr, run_copy<CopyBug::kNeverWaited>);
  EXPECT_DEFECT("never committed", kInFlightAtExit, nullptr, run_copy<CopyBug::kNoCommit>);
  expect_clean("copy", [] {
    run_copy<CopyBug::kNone>();
    for (int t = 0; t < 64; ++t) CHECK(results[t] == data[4 * (63 - t)] + data[256 + 4 * (63 - t)]);
  });
}

// Two stages: copies of one round are in flight while the other is used.
__global__ void double_buffer(const float* in, float* out, int rounds) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  const int t = threadIdx.x;
  auto issue = [&](int round) {
    if (round < rounds)
      ptx::cp_async_16(ptx::shared_address(bytes) + round % 2 * 512 + 16 * t,
                       in + round * 128 + 4 * t);
    ptx::cp_async_commit();
  };
  issue(0);
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    issue(round + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    sum += reinterpret_cast<const float*>(bytes)[round % 2 * 128 + 4 * (31 - t)];
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
  out[t] = sum;
}

// Fewer source bytes than 16: the rest is zero, and the source is not read past its end.
__global__ void partial_copy(const float* in, float* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  if (threadIdx.x < 8) {
    ptx::cp_async_16(ptx::shared_address(bytes) + 16 * threadIdx.x, in + 508,
                     4 * (threadIdx.x % 5));
    ptx::cp_async_narrow<8>(ptx::shared_address(bytes) + 128 + 8 * threadIdx.x, in + 2, 8);
    ptx::cp_async_narrow<4>(ptx::shared_address(bytes) + 192 + 4 * threadIdx.x, in + threadIdx.x);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x < 56) out[threadIdx.x] = reinterpret_cast<const float*>(bytes)[threadIdx.x];
}

void test_copy_values() {
  expect_clean("double buffer", [] {
    MEMEFF_LAUNCH(double_buffer, dim3(1), dim3(32), 1024, nullptr, data, results, 4);
    for (int t = 0; t < 32; ++t) {
      float sum = 0;
      for (int round = 0; round < 4; ++round) sum += data[round * 128 + 4 * (31 - t)];
      CHECK(results[t] == sum);
    }
  });
  expect_clean("partial copy", [] {
    MEMEFF_LAUNCH(partial_copy, dim3(1), dim3(64), 224, nullptr, data, results);
    for (int i = 0; i < 32; ++i) CHECK(results[i] == (i % 4 < i / 4 % 5 ? data[508 + i % 4] : 0.f));
    for (int i = 0; i < 16; ++i) CHECK(results[32 + i] == data[2 + i % 2]);
    for (int i = 0; i < 8; ++i) CHECK(results[48 + i] == data[i]);
  });
}

// ---- operands that hardware rejects ----

__global__ void copy_of(const float* in, int shared_offset, int source_offset, int bytes) {
  MEMEFF_DYNAMIC_SHARED(tile);
  ptx::cp_async_16(ptx::shared_address(tile) + shared_offset, in + source_offset, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}
__global__ void load_matrix_at(int offset, int stride) {
  MEMEFF_DYNAMIC_SHARED(tile);
  for (int i = threadIdx.x; i < 256; i += 32) reinterpret_cast<float*>(tile)[i] = 0.f;
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(tile) + offset + stride * threadIdx.x);
}

void test_illegal_operands() {
  EXPECT_DEFECT("misaligned destination", kMisaligned, nullptr,
                [] { MEMEFF_LAUNCH(copy_of, dim3(1), dim3(1), 64, nullptr, data, 8, 0, 16); });
  EXPECT_DEFECT("misaligned source", kMisaligned, nullptr,
                [] { MEMEFF_LAUNCH(copy_of, dim3(1), dim3(1), 64, nullptr, data, 0, 1, 16); });
  EXPECT_DEFECT("too many source bytes", kBadArgument, nullptr,
                [] { MEMEFF_LAUNCH(copy_of, dim3(1), dim3(1), 64, nullptr, data, 0, 0, 20); });
  EXPECT_DEFECT("copy out of shared memory", kOutOfBounds, nullptr,
                [] { MEMEFF_LAUNCH(copy_of, dim3(1), dim3(1), 64, nullptr, data, 64, 0, 16); });
  EXPECT_DEFECT("copy past the buffer", kOutOfBounds, nullptr,
                [] { MEMEFF_LAUNCH(copy_of, dim3(1), dim3(1), 64, nullptr, data, 0, 512, 16); });
  expect_clean("copy of the last floats",
               [] { MEMEFF_LAUNCH(copy_of, dim3(1), dim3(1), 64, nullptr, data, 48, 508, 16); });
  EXPECT_DEFECT("misaligned matrix row", kMisaligned, nullptr,
                [] { MEMEFF_LAUNCH(load_matrix_at, dim3(1), dim3(32), 1024, nullptr, 8, 16); });
  EXPECT_DEFECT("matrix out of shared memory", kOutOfBounds, nullptr,
                [] { MEMEFF_LAUNCH(load_matrix_at, dim3(1), dim3(32), 1024, nullptr, 0, 48); });
  expect_clean("matrix at the end",
               [] { MEMEFF_LAUNCH(load_matrix_at, dim3(1), dim3(32), 1024, nullptr, 512, 16); });
}

void test_bank_conflicts() {
  auto& conflicts = emulator::counters().ldmatrix_conflicts;
  conflicts = 0;
  MEMEFF_LAUNCH(load_matrix_at, dim3(1), dim3(32), 1024, nullptr, 0, 16);
  CHECK(conflicts == 0);  // eight rows of 16 bytes side by side cover all banks once
  MEMEFF_LAUNCH(load_matrix_at, dim3(1), dim3(32), 1024, nullptr, 0, 32);
  CHECK(conflicts == 4);  // two rows on each bank, in each of four matrices
}

// ---- matrix products through shared memory ----

template <class T>
struct Fragments;
template <>
struct Fragments<__nv_bfloat16> {
  static MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
  static MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    ptx::mma_m16n8k8_bf16(d, a, b);
  }
};
template <>
struct Fragments<__half> {
  static MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_fp16(d, a, b);
  }
  static MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    ptx::mma_m16n8k8_fp16(d, a, b);
  }
};

// D[16,8] = A[16,16] B, one warp. B is given as [8,16] (kTransposed false: B^T, rows are columns of
// the product) or as [16,8] (ldmatrix .trans turns it).
template <class T, int kK, bool kTransposed>
__global__ void product(const T* a, const T* b, float* out) {
  MEMEFF_SHARED_ARRAY(T, tile_a, 16 * 16);
  MEMEFF_SHARED_ARRAY(T, tile_b, 16 * 8);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile_a[i] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i] = b[i];
  __syncwarp();

  uint32_t fa[4], fb[2];
  ptx::ldmatrix_x4(fa, ptx::shared_address(tile_a + lane % 16 * 16 + lane / 16 * 8));
  if (kTransposed)
    ptx::ldmatrix_x2_trans(fb, ptx::shared_address(tile_b + lane % 16 * 8));
  else
    ptx::ldmatrix_x2(fb, ptx::shared_address(tile_b + lane % 8 * 16 + lane / 8 % 2 * 8));

  float d[4] = {};
  if constexpr (kK == 16) {
    Fragments<T>::multiply(d, fa, fb);
  } else {
    const uint32_t low[2] = {fa[0], fa[1]}, high[2] = {fa[2], fa[3]};
    Fragments<T>::multiply(d, low, fb[0]);
    Fragments<T>::multiply(d, high, fb[1]);
  }
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
float to_float(__half x) { return __half2float(x); }

template <class T, int kK, bool kTransposed>
void test_product() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<T> a(256), b(128);
  for (T& x : a) x = T(normal(random));
  for (T& x : b) x = T(normal(random));
  const GlobalBuffer guard_a(a.data(), 512, "a", BufferAccess::kReadOnly);
  const GlobalBuffer guard_b(b.data(), 256, "b", BufferAccess::kReadOnly);
  const T *pa = a.data(), *pb = b.data();
  const auto kernel = product<T, kK, kTransposed>;
  expect_clean("product", [&] {
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, pa, pb, results);
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        double expected = 0;
        for (int k = 0; k < 16; ++k)
          expected += static_cast<double>(to_float(a[row * 16 + k])) *
                      to_float(kTransposed ? b[k * 8 + column] : b[column * 16 + k]);
        CHECK(std::abs(results[row * 8 + column] - expected) < 1e-5);
      }
  });
}

__global__ void count_up(float* out) {
  MEMEFF_SHARED_ARRAY(uint16_t, tile, 256);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) tile[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, ptx::shared_address(tile + 8 * lane));
  for (int i = 0; i < 4; ++i) {
    out[lane * 8 + 2 * i] = static_cast<float>(r[i] & 0xffff);
    out[lane * 8 + 2 * i + 1] = static_cast<float>(r[i] >> 16);
  }
}

void test_transposed_load() {
  expect_clean("ldmatrix .trans", [] {
    MEMEFF_LAUNCH(count_up, dim3(1), dim3(32), 0, nullptr, results);
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int half = 0; half < 2; ++half)
          CHECK(results[lane * 8 + 2 * matrix + half] ==
                64 * matrix + 8 * (lane % 4 * 2 + half) + lane / 4);
  });
}

// ldmatrix reads rows that another lane wrote: __syncwarp is needed in between.
template <bool kPlanted>
__global__ void load_after_store(float* out) {
  MEMEFF_SHARED_ARRAY(uint32_t, tile, 128);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) tile[(lane ^ 1) * 4 + i] = 0;
  if (!kPlanted) __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::shared_address(tile + 4 * lane));  // planted: load without syncwarp
  out[lane] = static_cast<float>(r[0] + r[1] + r[2] + r[3]);
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  for (int i = 0; i < 512; ++i) data[i] = static_cast<float>(i + 1);
  const GlobalBuffer guard_data(data, 512 * sizeof(float), "data", BufferAccess::kReadOnly);
  const GlobalBuffer guard_results(results, sizeof results, "results");
  test_copies();
  test_copy_values();
  test_illegal_operands();
  test_bank_conflicts();
  test_transposed_load();
  test_product<__nv_bfloat16, 16, false>();
  test_product<__nv_bfloat16, 16, true>();
  test_product<__nv_bfloat16, 8, false>();
  test_product<__half, 16, false>();
  test_product<__half, 16, true>();
  test_product<__half, 8, true>();
  EXPECT_DEFECT("load_after_store", kSharedRace, "load without syncwarp", [] {
    MEMEFF_LAUNCH(load_after_store<true>, dim3(1), dim3(32), 0, nullptr, results);
  });
  expect_clean("load_after_store", [] {
    MEMEFF_LAUNCH(load_after_store<false>, dim3(1), dim3(32), 0, nullptr, results);
  });
  return emulator::finish("test_sm80");
}
