// Compact sums (core/compact_sum.h) as scalar code; bf16_kernels_avx512bf16.cpp has the same in vectors.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/compact_sum.h"
#include "cpu/number.h"

namespace memeff {

inline float load_compact(uint16_t code, uint8_t exponent) {
  if (exponent == kPlainExponent) return to_arithmetic(BFloat16{code});
  const uint32_t bits = (uint32_t{code & 0x7fffu} << kCompactShift) + kCompactOffset;
  const float magnitude = (float_from_bits(bits) - float_from_bits(kCompactOffset)) *
                          float_from_bits(compact_unit(exponent));
  return float_from_bits(bits_of(magnitude) | uint32_t{code & 0x8000u} << 16);
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
