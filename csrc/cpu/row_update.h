// Rows of a bf16 gradient whose sums over chunks are split (core/weight_update.h), as scalar code;
// bf16_kernels_avx512bf16.cpp has the same in vectors. `read`: add to what the row holds; `round`: the
// sums are complete, the row becomes plain bf16.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/compact_sum.h"
#include "cpu/compact_sum.h"
#include "cpu/number.h"

namespace memeff {

/// row += scale * sums, with the fp32 sum's upper halves in `row` and its lower halves in `low`.
template <class T>
void update_fp32_row(const T* sums, T scale, int64_t columns, bool read, bool round, uint16_t* row,
                     uint16_t* low) {
  for (int64_t d = 0; d < columns; ++d) {
    float value = static_cast<float>(sums[d] * scale);
    if (read) value += float_from_bits(uint32_t{row[d]} << 16 | low[d]);
    const uint32_t bits = bits_of(value);
    row[d] = round ? bf16_bits(value) : static_cast<uint16_t>(bits >> 16);
    if (!round) low[d] = static_cast<uint16_t>(bits);
  }
}

/// The same with compact sums, whose blocks have their exponents in `exponents`.
template <class T>
void update_compact_row(const T* sums, T scale, int64_t columns, bool read, bool round,
                        uint16_t* row, uint8_t* exponents) {
  // Exponents are bytes, which might alias any row: compilers make vectors of these loops only where none
  // is read or written inside.
  for (int64_t begin = 0; begin < columns; begin += kCompactBlock, ++exponents) {
    const int64_t count = std::min(kCompactBlock, columns - begin);
    uint16_t* const block = row + begin;
    float values[kCompactBlock];
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(sums[begin + i] * scale);
    if (read) {
      const uint8_t before = *exponents;
      for (int64_t i = 0; i < count; ++i) values[i] += load_compact(block[i], before);
    }
    const uint8_t after = round ? kPlainExponent : compact_exponent(values, count);
    for (int64_t i = 0; i < count; ++i) block[i] = compact_code(values[i], after);
    *exponents = after;
  }
}

}  // namespace memeff
