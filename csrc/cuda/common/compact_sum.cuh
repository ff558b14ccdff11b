// Compact sums of 16-bit gradients (core/compact_sum.h) in device code: the codes and exponents of
// cpu/compact_sum.h, bit for bit (but for the payload of a NaN).
//
// The 64 columns of a block lie in neighbouring lanes, which find their largest magnitude by shuffles.
// Single codes are in the upper half of a register, whatever its lower half holds: there the sign is
// in its place, and two codes become an adjacent pair by one permutation of bytes.
#pragma once

#include "core/compact_sum.h"
#include "cuda/common/vector_io.cuh"

namespace memeff::cuda {

// Bits of |x|, which compare like magnitudes, with inf and NaN above all others.
MEMEFF_DEVICE uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The exponent of a block in kLanes neighbouring lanes, each of which brings the bits of its largest
// magnitude. All lanes of the warp take part.
template <int kLanes>
MEMEFF_DEVICE uint32_t compact_exponent(uint32_t largest) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, largest, distance);
    largest = other > largest ? other : largest;
  }
  const uint32_t exponent = largest >> 23;
  return exponent < kLeastCompactExponent ? kLeastCompactExponent : exponent;
}

// The codes of a block with inf or NaN: bf16.
struct PlainCodes {
  MEMEFF_DEVICE explicit PlainCodes(uint32_t) {}
  MEMEFF_DEVICE float value(uint32_t code) const { return __uint_as_float(code & 0xffff0000u); }
  MEMEFF_DEVICE uint32_t code(float value) const {
    const __nv_bfloat16 rounded = __float2bfloat16(value);
    uint16_t bits;
    memcpy(&bits, static_cast<const void*>(&rounded), sizeof bits);
    return uint32_t{bits} << 16;
  }
};

// The codes of all other blocks.
class CompactCodes {
 public:
  // No initialisers: nvcc leaves them to the host's compiler as well, which does not know the function.
  MEMEFF_DEVICE explicit CompactCodes(uint32_t exponent) {
    unit_ = (exponent - 1) << 23;  // compact_unit(), compact_inverse_unit()
    inverse_ = __uint_as_float((255 - exponent) << 23);
  }
  MEMEFF_DEVICE float value(uint32_t code) const {
    const uint32_t bits = ((code & 0x7fff0000u) >> kToUpper) + kCompactOffset;
    const float magnitude = __uint_as_float(bits) - __uint_as_float(kCompactOffset);
    return magnitude * __uint_as_float((code & 0x80000000u) | unit_);
  }
  MEMEFF_DEVICE uint32_t code(float value) const {
    constexpr uint32_t kHalf = 1u << (kCompactShift - 1);
    const float shifted = fabsf(value) * inverse_ + __uint_as_float(kCompactOffset);
    const uint32_t upper = (__float_as_uint(shifted) - kCompactOffset + kHalf) << kToUpper;
    return (upper & 0x7fffffffu) | (__float_as_uint(value) & 0x80000000u);
  }

 private:
  static constexpr int kToUpper = 16 - kCompactShift;
  uint32_t unit_;
  float inverse_;
};

// body(codes) with the kind of codes that a block of this exponent has: one branch for a whole block.
template <class Body>
MEMEFF_DEVICE void with_codes(uint32_t exponent, const Body& body) {
  if (exponent == kPlainExponent)
    body(PlainCodes(exponent));
  else
    body(CompactCodes(exponent));
}

// Two adjacent columns in memory order: the first in the lower half.
template <class Codes>
MEMEFF_DEVICE uint32_t pair_of_codes(const Codes& codes, float first, float second) {
  return upper_halves(codes.code(first), codes.code(second));
}
template <class Codes>
MEMEFF_DEVICE void add_pair(const Codes& codes, uint32_t pair, float& first, float& second) {
  first += codes.value(pair << 16);
  second += codes.value(pair);
}

}  // namespace memeff::cuda
