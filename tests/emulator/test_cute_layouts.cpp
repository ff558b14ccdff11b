// The emulator's fragment maps against CuTe's: operands are laid out as CuTe says, products and
// copies run in the emulator, and results are read back as CuTe says.
#include <random>
#include <vector>

#include "cuda/sm90/pipeline.cuh"
#include "emulator/check.h"
#include "emulator/cute_layouts.h"
#include "emulator/more_ptx.cuh"
#include "emulator/wgmma_images.cuh"

using namespace memeff;
using emulator::expect_clean;
using emulator::GlobalBuffer;

namespace {

uint16_t bf16_bits(int value) {  // exact for small integers
  const __nv_bfloat16 rounded(static_cast<float>(value));
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

// Per lane: k / 4 registers of A, k / 8 of B; 4 floats of D.
template <int kK>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fa[kK / 4], fb[kK / 8];
  for (int i = 0; i < kK / 4; ++i) fa[i] = a[lane * (kK / 4) + i];
  for (int i = 0; i < kK / 8; ++i) fb[i] = b[lane * (kK / 8) + i];
  float fd[4] = {};
  if constexpr (kK == 16)
    ptx::mma_m16n8k16_bf16(fd, fa, fb);
  else
    ptx::mma_m16n8k8_bf16(fd, fa, fb[0]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = fd[i];
}

template <int kK>
void test_mma() {
  std::mt19937 random(3);
  int a[16][kK], b[kK][8];
  for (auto& row : a)
    for (int& x : row) x = static_cast<int>(random() % 17) - 8;
  for (auto& row : b)
    for (int& x : row) x = static_cast<int>(random() % 17) - 8;

  std::vector<uint16_t> fragment_a(32 * kK / 2), fragment_b(32 * kK / 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < kK / 2; ++v) {
      const auto at = cute_oracle::mma_a(kK, lane, v);
      fragment_a[lane * kK / 2 + v] = bf16_bits(a[at.row][at.column]);
    }
    for (int v = 0; v < kK / 4; ++v) {
      const auto at = cute_oracle::mma_b(kK, lane, v);
      fragment_b[lane * kK / 4 + v] = bf16_bits(b[at.row][at.column]);
    }
  }
  std::vector<float> d(128);
  const GlobalBuffer guard_a(fragment_a.data(), fragment_a.size() * 2, "a");
  const GlobalBuffer guard_b(fragment_b.data(), fragment_b.size() * 2, "b");
  const GlobalBuffer guard_d(d.data(), d.size() * 4, "d");
  const auto* pa = reinterpret_cast<const uint32_t*>(fragment_a.data());
  const auto* pb = reinterpret_cast<const uint32_t*>(fragment_b.data());
  float* pd = d.data();
  expect_clean("mma", [&] {
    MEMEFF_LAUNCH(multiply_fragments<kK>, dim3(1), dim3(32), 0, nullptr, pa, pb, pd);
    for (int lane = 0; lane < 32; ++lane)
      for (int v = 0; v < 4; ++v) {
        const auto at = cute_oracle::mma_d(lane, v);
        int expected = 0;
        for (int k = 0; k < kK; ++k) expected += a[at.row][k] * b[k][at.column];
        CHECK(d[lane * 4 + v] == static_cast<float>(expected));
      }
  });
}

enum class Copy { kLoad, kLoadTransposed, kStore, kStoreTransposed };

// Loads: tile holds 0, 1, ... and `out` receives each lane's eight elements. Stores: each lane
// stores its element numbers 8 lane + value, and `out` receives the tile.
template <Copy kCopy>
__global__ void copy_matrices(uint16_t* out) {
  MEMEFF_SHARED_ARRAY(uint16_t, tile, 256);
  const int lane = threadIdx.x;
  const uint32_t row = ptx::shared_address(tile) + 16 * lane;
  uint32_t r[4];
  if (kCopy == Copy::kLoad || kCopy == Copy::kLoadTransposed) {
    for (int i = 0; i < 8; ++i) tile[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
    __syncwarp();
    if (kCopy == Copy::kLoad)
      ptx::ldmatrix_x4(r, row);
    else
      ptx::ldmatrix_x4_trans(r, row);
    for (int i = 0; i < 8; ++i) out[8 * lane + i] = static_cast<uint16_t>(r[i / 2] >> 16 * (i % 2));
  } else {
    for (int i = 0; i < 4; ++i) r[i] = (8u * lane + 2 * i) | (8u * lane + 2 * i + 1) << 16;
    if (kCopy == Copy::kStore)
      ptx::stmatrix_x4(row, r);
    else
      ptx::stmatrix_x4_trans(row, r);
    __syncwarp();
    for (int i = 0; i < 8; ++i) out[8 * lane + i] = tile[8 * lane + i];
  }
}

template <Copy kCopy>
void test_copy() {
  std::vector<uint16_t> out(256);
  const GlobalBuffer guard(out.data(), 512, "out");
  uint16_t* const p = out.data();
  expect_clean("matrix copies", [&] {
    MEMEFF_LAUNCH(copy_matrices<kCopy>, dim3(1), dim3(32), 0, nullptr, p);
    for (int lane = 0; lane < 32; ++lane)
      for (int value = 0; value < 8; ++value) {
        const bool transposed = kCopy == Copy::kLoadTransposed || kCopy == Copy::kStoreTransposed;
        if (kCopy == Copy::kLoad || kCopy == Copy::kLoadTransposed)
          CHECK(out[8 * lane + value] == cute_oracle::ldmatrix_x4(transposed, lane, value));
        else
          CHECK(out[cute_oracle::stmatrix_x4(transposed, lane, value)] == 8 * lane + value);
      }
  });
}

// A [64,64] and B [64,128] lie in shared memory as CuTe's swizzled layouts say.
template <bool kATransposed, bool kBTransposed, bool kARegisters>
void test_wgmma() {
  std::mt19937 random(4);
  static int a[64][64], b[64][128];
  for (auto& row : a)
    for (int& x : row) x = static_cast<int>(random() % 9) - 4;
  for (auto& row : b)
    for (int& x : row) x = static_cast<int>(random() % 9) - 4;

  std::vector<uint32_t> in(16384, 0xffffffffu), out(128 * 64);
  auto* halves = reinterpret_cast<uint16_t*>(in.data());
  const auto offset = [](bool mn_major, int mn, int k) {
    return (mn_major ? cute_oracle::mn_major_offset(mn, k) : cute_oracle::k_major_offset(mn, k)) /
           2;
  };
  for (int k = 0; k < 64; ++k) {
    for (int m = 0; m < 64 && !kARegisters; ++m)
      halves[offset(kATransposed, m, k)] = bf16_bits(a[m][k]);
    for (int n = 0; n < 128; ++n)
      halves[2 * kImageB + offset(kBTransposed, n, k)] = bf16_bits(b[k][n]);
  }
  for (int step = 0; step < 4 && kARegisters; ++step)
    for (int t = 0; t < 128; ++t)
      for (int v = 0; v < 8; ++v) {
        const auto at = cute_oracle::wgmma_a(t, v);
        halves[2 * kFragmentsA + (step * 128 + t) * 8 + v] =
            bf16_bits(a[at.row][16 * step + at.column]);
      }
  const GlobalBuffer guard_in(in.data(), in.size() * 4, "in", emulator::BufferAccess::kReadOnly);
  const GlobalBuffer guard_out(out.data(), out.size() * 4, "out");
  const uint32_t* pin = in.data();
  uint32_t* pout = out.data();
  constexpr auto kernel =
      multiply_images<__nv_bfloat16, 128, kATransposed, kBTransposed, kARegisters>;
  expect_clean("wgmma", [&] {
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(128), 8192 + 128 * 128, nullptr, pin, pout);
    for (int t = 0; t < 128; ++t)
      for (int v = 0; v < 64; ++v) {
        const auto at = cute_oracle::wgmma_d(t, v);
        int expected = 0;
        for (int k = 0; k < 64; ++k) expected += a[at.row][k] * b[k][at.column];
        CHECK(__uint_as_float(out[t * 64 + v]) == static_cast<float>(expected));
      }
  });
}

// The descriptors of the kernels' operands, bit by bit, for every 16 k of a step.
template <bool kOfA, cuda::sm90::Major kMajor>
void test_descriptors() {
  constexpr int kExtent = kOfA ? cuda::sm90::kTileM : cuda::sm90::kTileN;
  constexpr bool kMnMajor = kMajor == cuda::sm90::Major::kMn;
  // 14 bits of the address, two of nothing, 14 of the bytes to the next 64 rows.
  constexpr uint64_t kLeading = uint64_t{0x3fff} << 16;
  for (const uint32_t tile : {1024u, 49152u, 221184u})
    for (int first_mn = 0; first_mn < (kOfA ? kExtent : 1); first_mn += 64)
      for (int k16 = 0; k16 < cuda::sm90::kStepK / 16; ++k16) {
        uint64_t ours = cuda::sm90::OperandTile<kMajor, kExtent>::descriptor(tile, first_mn, k16);
        uint64_t expected = cute_oracle::descriptor(kOfA, kMnMajor, tile, first_mn, k16);
        // A has no more than 64 rows: nothing reads the bytes to the next.
        if (kOfA && kMnMajor) ours &= ~kLeading, expected &= ~kLeading;
        if (ours != expected)
          std::printf("descriptor of %s, %s-major, row %d, k %d: %llx, CuTe has %llx\n",
                      kOfA ? "A" : "B", kMnMajor ? "MN" : "K", first_mn, 16 * k16,
                      static_cast<unsigned long long>(ours),
                      static_cast<unsigned long long>(expected));
        CHECK(ours == expected);
      }
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_mma<8>();
  test_mma<16>();
  test_copy<Copy::kLoad>();
  test_copy<Copy::kLoadTransposed>();
  test_copy<Copy::kStore>();
  test_copy<Copy::kStoreTransposed>();
  test_wgmma<false, false, false>();
  test_wgmma<false, true, false>();
  test_wgmma<true, false, false>();
  test_wgmma<true, true, false>();
  test_wgmma<false, false, true>();
  test_wgmma<false, true, true>();
  test_descriptors<true, cuda::sm90::Major::kK>();
  test_descriptors<true, cuda::sm90::Major::kMn>();
  test_descriptors<false, cuda::sm90::Major::kK>();
  test_descriptors<false, cuda::sm90::Major::kMn>();
  return emulator::finish("test_cute_layouts");
}
