// exp, expm1 and log on vectors of float or double, in the compilers' vector extension: the same source
// becomes AVX-512, AVX2 or plain code by the flags of the file that includes it.
//
// A vector is as wide as a register. Compilers split arithmetic on wider ones into registers, but
// comparisons into single elements, where softmax statistics then spend most of their time.
//
// Everything is in an unnamed namespace on purpose. Those files are compiled for different instruction
// sets, and a function shared between them by the linker could be the one that the machine cannot run.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace memeff {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorTraits;

template <>
struct VectorTraits<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 4;
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kExponentBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kLeast = -87.0f;  // exp of less is treated as 0
  static constexpr float kMost = 88.0f;
  static constexpr int kDegree = 7;
  static constexpr int kExpm1Degree = 12;
};

template <>
struct VectorTraits<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 8;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.6931471803691238;
  static constexpr double kLn2Low = 1.9082149292705877e-10;
  static constexpr double kLeast = -708.0;
  static constexpr double kMost = 709.0;
  static constexpr int kDegree = 13;
  static constexpr int kExpm1Degree = 21;
};

template <class T>
using Vec = typename VectorTraits<T>::Vec;
template <class T>
constexpr int kLanes = VectorTraits<T>::kLanes;

template <class T>
inline Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

template <class T>
inline Vec<T> load_vector(const T* data) {
  Vec<T> value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

template <class T>
inline void store_vector(T* data, Vec<T> value) {
  std::memcpy(data, &value, sizeof value);
}

/// e^x, relative error below 2 units in the last place; 0 for x < kLeast and NaN for NaN.
template <class T>
inline Vec<T> exp_vector(Vec<T> x) {
  using Traits = VectorTraits<T>;
  const Vec<T> capped = x > Traits::kMost ? broadcast<T>(Traits::kMost) : x;
  const Vec<T> shifted = capped * static_cast<T>(1.4426950408889634) + Traits::kRound;
  const Vec<T> n = shifted - Traits::kRound;
  const Vec<T> r = capped - n * Traits::kLn2High - n * Traits::kLn2Low;
  T factorial[Traits::kDegree + 1];
  factorial[0] = 1;
  for (int i = 1; i <= Traits::kDegree; ++i) factorial[i] = factorial[i - 1] * static_cast<T>(i);
  Vec<T> sum = broadcast<T>(1 / factorial[Traits::kDegree]);
  for (int i = Traits::kDegree - 1; i >= 0; --i) sum = sum * r + 1 / factorial[i];
  // 2^n by its bits. The integer part of `shifted` sits in its low mantissa bits.
  typename Traits::Int exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + Traits::kExponentBias) << Traits::kMantissaBits;
  Vec<T> power;
  std::memcpy(&power, &exponent, sizeof power);
  const Vec<T> result = sum * power;
  return x < Traits::kLeast ? Vec<T>{} : result;
}

/// e^x - 1 for x in [-log 3, 0], relative error of a few units in the last place.
template <class T>
inline Vec<T> expm1_vector(Vec<T> x) {
  Vec<T> sum = broadcast<T>(1);
  for (int i = VectorTraits<T>::kExpm1Degree; i > 1; --i)
    sum = sum * x * (1 / static_cast<T>(i)) + 1;
  return sum * x;
}

/// log x for positive normal x, absolute error below 2^-22 (1 + |log x|).
inline Vec<float> log_vector(Vec<float> x) {
  using Traits = VectorTraits<float>;
  typename Traits::Int bits;
  std::memcpy(&bits, &x, sizeof bits);
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) count as those of 1.
  constexpr int32_t kOne = 0x3f800000, kSqrtHalf = 0x3f3504f3;
  const typename Traits::Int shifted = bits + (kOne - kSqrtHalf);
  const typename Traits::Int n = (shifted >> Traits::kMantissaBits) - Traits::kExponentBias;
  const typename Traits::Int mantissa = bits - (n << Traits::kMantissaBits);
  Vec<float> m;
  std::memcpy(&m, &mantissa, sizeof m);
  // log m = 2 artanh s, s = (m - 1) / (m + 1), |s| < 0.172
  const Vec<float> s = (m - 1.0f) / (m + 1.0f);
  const Vec<float> q = s * s;
  const Vec<float> artanh =
      s * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
  return __builtin_convertvector(n, Vec<float>) * 0.693147181f + 2.0f * artanh;
}

}  // namespace
}  // namespace memeff
