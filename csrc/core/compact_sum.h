// Sums of a 16-bit gradient over chunks of tokens, or on GPUs over slices of classes, kept in the
// gradient's own 16 bits per element (Accumulation::kCompact): the format, for every backend.
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
#pragma once

#include <cstdint>

namespace memeff {

/// Columns of a gradient whose compact sums share an exponent.
constexpr int64_t kCompactBlock = 64;
/// Bytes between the exponents of rows on a GPU: those of 256 columns are read as one word.
constexpr int64_t compact_exponent_stride(int64_t columns) { return (columns + 255) / 256 * 4; }

constexpr int kCompactShift = 23 - 12;
constexpr uint32_t kCompactOffset = 0x3d000000u;  // 2^-5 in fp32
constexpr uint8_t kPlainExponent = 255;           // of inf and NaN
constexpr uint8_t kLeastCompactExponent = 2;      // keeps unit and 1 / unit normal numbers

/// Bits of unit and 1 / unit.
constexpr uint32_t compact_unit(uint32_t exponent) { return (exponent - 1) << 23; }
constexpr uint32_t compact_inverse_unit(uint32_t exponent) { return (255 - exponent) << 23; }

}  // namespace memeff
