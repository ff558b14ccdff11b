// Conversions between the element types of tensors and arithmetic types, by bits: no compiler support
// for 16-bit floating types is needed. Rounding is to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"

namespace memeff {

/// Storage of the 16-bit types: distinct, so that overloads tell them apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t bf16_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t quiet_nan = bits | 0x400000u;
  return static_cast<uint16_t>(((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded) >> 16);
}

inline float to_arithmetic(BFloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

inline float to_arithmetic(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude << 13));
  // The exponents of the two formats differ by 112: a product by 2^112, exact for subnormals too.
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits(0x77800000u);
  return float_from_bits(sign | bits_of(scaled));
}

inline float to_arithmetic(float value) { return value; }
inline double to_arithmetic(double value) { return value; }

inline uint16_t fp16_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the value, in units of 2^-24, rounded in the low bits.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_of(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline void store(BFloat16* out, float value) { out->bits = bf16_bits(value); }
inline void store(Float16* out, float value) { out->bits = fp16_bits(value); }
inline void store(float* out, float value) { *out = value; }
inline void store(double* out, double value) { *out = value; }
inline void store(BFloat16* out, double value) { store(out, static_cast<float>(value)); }
inline void store(Float16* out, double value) { store(out, static_cast<float>(value)); }
inline void store(float* out, double value) { *out = static_cast<float>(value); }
inline void store(double* out, float value) { *out = value; }

/// Calls f with a null pointer of the storage type of `dtype`: a switch from run time to types.
template <class F>
decltype(auto) dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16: return f(static_cast<Float16*>(nullptr));
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat64: break;
  }
  return f(static_cast<double*>(nullptr));
}

inline double load(DType dtype, const void* data, int64_t index) {
  return dispatch(dtype, [&](auto* type) -> double {
    using T = std::remove_pointer_t<decltype(type)>;
    return to_arithmetic(static_cast<const T*>(data)[index]);
  });
}

inline void store(DType dtype, void* data, int64_t index, double value) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    store(static_cast<T*>(data) + index, value);
  });
}

}  // namespace memeff
