// The 14 x 32 micro-tile of the bf16 products (see bf16_kernels.h), for AVX512-BF16.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 finds its own intrinsics' deliberately undefined operands uninitialised.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/tiling.h"

namespace memeff {
namespace {

static_assert(kMicroRows == 14, "the rows unrolled below");

inline __m512bh broadcast_pair(const uint16_t* pair) {
  int bits;
  std::memcpy(&bits, pair, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(bits);
}

/// C[kRows, 32] = or += A B over `steps` pairs. Element (i, k) of A: a + i * row_stride + 2 k for rows,
/// a + 2 i + k * 2 * kMicroRows for packed pairs.
template <int kRows, bool kPacked>
void micro_tile(const uint16_t* a, int64_t row_stride, const uint16_t* panel, int64_t steps,
                float* c, int64_t c_stride, bool accumulate) {
  __m512 sum[kRows][2];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < steps; ++k) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + k * 64);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + k * 64 + 32);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const uint16_t* pair = kPacked ? a + 2 * i + k * 2 * kMicroRows : a + i * row_stride + 2 * k;
      const __m512bh left = broadcast_pair(pair);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], left, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], left, b1);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    float* row = c + i * c_stride;
    if (accumulate) {
      sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_loadu_ps(row));
      sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_loadu_ps(row + 16));
    }
    _mm512_storeu_ps(row, sum[i][0]);
    _mm512_storeu_ps(row + 16, sum[i][1]);
  }
}

using MicroTile = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, int64_t,
                           bool);

/// Versions for 1 to 14 rows: the last rows of a matrix cost no more than they are.
template <bool kPackedPairs>
struct MicroTiles {
  static constexpr bool kPacked = kPackedPairs;
  static constexpr MicroTile kByRows[kMicroRows + 1] = {nullptr,
                                                        micro_tile<1, kPacked>,
                                                        micro_tile<2, kPacked>,
                                                        micro_tile<3, kPacked>,
                                                        micro_tile<4, kPacked>,
                                                        micro_tile<5, kPacked>,
                                                        micro_tile<6, kPacked>,
                                                        micro_tile<7, kPacked>,
                                                        micro_tile<8, kPacked>,
                                                        micro_tile<9, kPacked>,
                                                        micro_tile<10, kPacked>,
                                                        micro_tile<11, kPacked>,
                                                        micro_tile<12, kPacked>,
                                                        micro_tile<13, kPacked>,
                                                        micro_tile<14, kPacked>};

  static void multiply(int64_t rows, const uint16_t* a, int64_t row_stride, const uint16_t* panel,
                       int64_t steps, float* c, int64_t c_stride, bool accumulate) {
    kByRows[rows](a, row_stride, panel, steps, c, c_stride, accumulate);
  }
};

}  // namespace
}  // namespace memeff
