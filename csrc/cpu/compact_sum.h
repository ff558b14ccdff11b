// Sums of a bf16 gradient over chunks of tokens, kept in the gradient's own 16 bits per element
// (Accumulation::kCompact).
//
// The columns of a row form blocks of kCompactBlock. A block has one biased exponent in the workspace, that
// of its largest magnitude. With unit = 2^(exponent - 128), so that the largest magnitude is 2 to 4 units,
// an element is stored as its sign and 15 bits of
//
//     |value| / unit + 2^-5,   an fp32 number, rounded to 12 bits of mantissa, less the bits of 2^-5
//
// The summand bounds the exponents of these numbers to eight, so that 3 bits tell them apart. Hence
//
//     |rounding error| <= 2^-13 (|value| + unit / 32),   0 for 0
//
// which is 32 times finer than bf16 for elements of the largest one's order, and 2^-19 of that one at
// worst. Blocks with inf or NaN are stored as plain bf16.
//
// Here as scalar code; bf16_kernels_avx512bf16.cpp has the same in vectors.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/tiling.h"
#include "cpu/number.h"

namespace memeff {

constexpr int kCompactShift = 23 - 12;
constexpr uint32_t kCompactOffset = 0x3d000000u;  // 2^-5 in fp32
constexpr uint8_t kPlainExponent = 255;           // of inf and NaN
constexpr uint8_t kLeastCompactExponent = 2;      // keeps unit and 1 / unit normal numbers

/// Bits of unit and 1 / unit.
constexpr uint32_t compact_unit(uint32_t exponent) { return (exponent - 1) << 23; }
constexpr uint32_t compact_inverse_unit(uint32_t exponent) { return (255 - exponent) << 23; }

inline float load_compact(uint16_t code, uint8_t exponent) {
  if (exponent == kPlainExponent) return to_arithmetic(BFloat16{code});
  const uint32_t bits = (uint32_t{code & 0x7fffu} << kCompactShift) + kCompactOffset;
  const float magnitude = (float_from_bits(bits) - float_from_bits(kCompactOffset)) *
                          float_from_bits(compact_unit(exponent));
  return (code & 0x8000u) != 0 ? -magnitude : magnitude;
}

/// The exponent of a block of `count` values.
inline uint8_t compact_exponent(const float* values, int64_t count) {
  uint32_t largest = 0;  // magnitudes compare like their bits, with inf and NaN above all others
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  const uint32_t exponent = largest >> 23;
  return static_cast<uint8_t>(exponent < kLeastCompactExponent ? kLeastCompactExponent : exponent);
}

inline uint16_t compact_code(float value, uint8_t exponent) {
  if (exponent == kPlainExponent) return bf16_bits(value);
  const uint32_t sign = bits_of(value) >> 31 << 15;
  const float shifted = std::fabs(value) * float_from_bits(compact_inverse_unit(exponent)) +
                        float_from_bits(kCompactOffset);
  const uint32_t half = 1u << (kCompactShift - 1);
  return static_cast<uint16_t>(sign |
                               ((bits_of(shifted) - kCompactOffset + half) >> kCompactShift));
}

}  // namespace memeff
