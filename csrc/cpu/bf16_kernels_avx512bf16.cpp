// The bf16 kernels for AVX512-BF16. See bf16_kernels.h.
#include "cpu/bf16_kernels.h"

#if defined(__x86_64__)

#include "core/compact_sum.h"
#include "cpu/bf16_kernels_impl.h"
#include "cpu/bf16_microkernel.h"

namespace memeff {
namespace {

/// Low n bits set, n <= 32.
inline uint32_t lane_mask(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

/// Transposes 16 x 16 32-bit elements held in 16 registers: 4 rounds of exchanges of halves.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
  }
  // Register 4i+j now holds, in each 128-bit lane l, rows 4i..4i+3 of column 4l+j.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

void pack_transposed(const uint16_t* source, int64_t stride, const int64_t* rows, int64_t count,
                     int64_t inner, uint16_t* panel) {
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t k = 0; k < inner; k += 32) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t row = half * 16 + i;
        r[i] = row < count
                   ? _mm512_maskz_loadu_epi16(lane_mask(inner - k), source + rows[row] * stride + k)
                   : _mm512_setzero_si512();
      }
      transpose(r);
      const int64_t pairs = smaller(16, (inner - k + 1) / 2);
      for (int64_t i = 0; i < pairs; ++i) {
        _mm512_storeu_si512(panel + (k / 2 + i) * 64 + half * 32, r[i]);
      }
    }
  }
}

void interleave_rows(const uint16_t* source, int64_t stride, const int64_t* rows, int64_t inner,
                     int64_t columns, int64_t width, uint16_t* out) {
  const auto row = [&](int64_t k) { return source + (rows != nullptr ? rows[k] : k) * stride; };
  for (int64_t j = 0; j < width; j += 16) {
    const __mmask16 valid =
        static_cast<__mmask16>(columns > j ? lane_mask(smaller(16, columns - j)) : 0);
    const __mmask16 kept = static_cast<__mmask16>(lane_mask(smaller(16, width - j)));
    const auto load = [&](int64_t k) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, row(k) + j));
    };
    for (int64_t k = 0; k < inner; k += 2) {
      const __m512i high =
          k + 1 < inner ? _mm512_slli_epi32(load(k + 1), 16) : _mm512_setzero_si512();
      _mm512_mask_storeu_epi32(out + k * width + 2 * j, kept, _mm512_or_si512(load(k), high));
    }
  }
}

/// 16 columns of compact sums. See compact_sum.h.
inline __m512 load_compact_vector(const uint16_t* codes, __mmask16 mask, uint8_t exponent) {
  const __m512i code = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, codes));
  if (exponent == kPlainExponent) return _mm512_castsi512_ps(_mm512_slli_epi32(code, 16));
  const __m512i offset = _mm512_set1_epi32(static_cast<int>(kCompactOffset));
  const __m512i unit = _mm512_set1_epi32(static_cast<int>(compact_unit(exponent)));
  const __m512i shifted = _mm512_add_epi32(
      _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7fff)), kCompactShift), offset);
  const __m512 magnitude =
      _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(shifted), _mm512_castsi512_ps(offset)),
                    _mm512_castsi512_ps(unit));
  const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(code, 15), 31);
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude), sign));
}

inline void store_compact_vector(uint16_t* codes, __mmask16 mask, __m512 value, uint8_t exponent) {
  const __m512i offset = _mm512_set1_epi32(static_cast<int>(kCompactOffset));
  const __m512i inverse = _mm512_set1_epi32(static_cast<int>(compact_inverse_unit(exponent)));
  // A product and a sum, each rounded, as in the scalar code.
  const __m512 shifted =
      _mm512_add_ps(_mm512_mul_ps(_mm512_abs_ps(value), _mm512_castsi512_ps(inverse)),
                    _mm512_castsi512_ps(offset));
  const __m512i half = _mm512_set1_epi32(1 << (kCompactShift - 1));
  const __m512i magnitude = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_sub_epi32(_mm512_castps_si512(shifted), offset), half),
      kCompactShift);
  const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(_mm512_castps_si512(value), 31), 15);
  _mm256_mask_storeu_epi16(codes, mask, _mm512_cvtepi32_epi16(_mm512_or_si512(magnitude, sign)));
}

/// Compact sums of up to kCompactBlock columns: all of them in registers, because they share an exponent.
inline void update_compact_block(const RowUpdate& u, const float* sums, uint16_t* codes,
                                 uint8_t* exponent, int64_t columns) {
  constexpr int kVectors = kCompactBlock / 16;
  const __m512 scale = _mm512_set1_ps(u.scale);
  __m512 value[kVectors];
  __mmask16 mask[kVectors];
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < kVectors; ++i) {
    const int64_t count = columns - 16 * i;
    mask[i] = static_cast<__mmask16>(count > 0 ? lane_mask(smaller(16, count)) : 0);
    value[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask[i], sums + 16 * i), scale);
    if (u.read) {
      value[i] = _mm512_add_ps(value[i], load_compact_vector(codes + 16 * i, mask[i], *exponent));
    }
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(value[i])));
  }
  // Magnitudes compare like their bits, with inf and NaN above all others.
  const uint32_t found = _mm512_reduce_max_epu32(largest) >> 23;
  *exponent = static_cast<uint8_t>(found < kLeastCompactExponent ? kLeastCompactExponent : found);
  if (u.round) *exponent = kPlainExponent;  // a sum that is complete becomes plain bf16
  for (int i = 0; i < kVectors; ++i) {
    if (*exponent == kPlainExponent) {
      _mm256_mask_storeu_epi16(codes + 16 * i, mask[i], (__m256i)_mm512_cvtneps_pbh(value[i]));
    } else {
      store_compact_vector(codes + 16 * i, mask[i], value[i], *exponent);
    }
  }
}

void update_compact_rows(const RowUpdate& u) {
  for (int64_t i = 0; i < u.rows; ++i) {
    for (int64_t d = 0; d < u.columns; d += kCompactBlock) {
      update_compact_block(u, u.sums + i * u.sums_stride + d,
                           u.gradient + i * u.gradient_stride + d,
                           u.exponents + i * u.exponents_stride + d / kCompactBlock,
                           smaller(kCompactBlock, u.columns - d));
    }
  }
}

void update_rows(const RowUpdate& u) {
  if (u.exponents != nullptr) return update_compact_rows(u);
  const __m512 scale = _mm512_set1_ps(u.scale);
  for (int64_t i = 0; i < u.rows; ++i) {
    const float* sums = u.sums + i * u.sums_stride;
    uint16_t* row = u.gradient + i * u.gradient_stride;
    uint16_t* low = u.low == nullptr ? nullptr : u.low + i * u.gradient_stride;
    for (int64_t d = 0; d < u.columns; d += 16) {
      const __mmask16 mask = static_cast<__mmask16>(lane_mask(smaller(16, u.columns - d)));
      __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, sums + d), scale);
      if (u.read) {
        __m512i bits =
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + d)), 16);
        if (low != nullptr) {
          bits =
              _mm512_or_si512(bits, _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + d)));
        }
        value = _mm512_add_ps(value, _mm512_castsi512_ps(bits));
      }
      if (u.round) {
        _mm256_mask_storeu_epi16(row + d, mask, (__m256i)_mm512_cvtneps_pbh(value));
      } else {
        const __m512i bits = _mm512_castps_si512(value);
        _mm256_mask_storeu_epi16(row + d, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
        _mm256_mask_storeu_epi16(low + d, mask, _mm512_cvtepi32_epi16(bits));
      }
    }
  }
}

inline void store_half(uint16_t* to, Vec<float> value, int64_t count) {
  const __m256i half =
      _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(lane_mask(smaller(16, count))), half);
}

void score_tile(const ScoreTile& tile) { compute_score_tile<MicroTiles<false>>(tile, store_half); }

void gradient_tile(const GradientTile& tile) {
  const float* log_factors = fill_gradient_factors(tile);
  for (int64_t v = 0; v < tile.classes; ++v) {
    uint16_t* row = tile.data + v * tile.stride;
    const __m512 w = _mm512_set1_ps(tile.class_weight != nullptr ? tile.class_weight[v] : 1.0f);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < tile.tokens; t += 16) {
      const __mmask16 mask = static_cast<__mmask16>(lane_mask(smaller(16, tile.tokens - t)));
      const __m512 e = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row + t));
      __m512 factor = _mm512_loadu_ps(tile.factors + t);
      if (tile.scale_entropy != nullptr) {
        const __mmask16 positive = _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 log_e = (__m512)log_vector((Vec<float>)e);
        factor = _mm512_mask3_fmadd_ps(log_e, _mm512_loadu_ps(log_factors + t), factor, positive);
      }
      __m512 gradient = _mm512_mul_ps(e, factor);
      if (tile.scale_w != nullptr) {
        gradient = _mm512_fnmadd_ps(_mm512_loadu_ps(tile.scale_w + t), w, gradient);
      }
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(gradient);
      _mm256_mask_storeu_epi16(row + t, mask, rounded);
      sum = _mm512_mask_add_ps(sum, mask, sum, gradient);
    }
    if (tile.bias_sum != nullptr) tile.bias_sum[v] += _mm512_reduce_add_ps(sum);
  }
}

}  // namespace

Bf16Kernels bf16_kernels_avx512bf16() {
  return {pack_transposed,
          interleave_rows,
          score_tile,
          gradient_tile,
          copy_rows,
          multiply<MicroTiles<false>>,
          multiply<MicroTiles<true>>,
          update_rows};
}

}  // namespace memeff

#endif  // __x86_64__
