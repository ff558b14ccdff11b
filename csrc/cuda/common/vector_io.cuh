// 16-byte accesses of adjacent elements of any type, and conversion to the accumulation type.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/common/device.cuh"

namespace memeff::cuda {

template <class T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

MEMEFF_DEVICE float widen(float x) { return x; }
MEMEFF_DEVICE double widen(double x) { return x; }
MEMEFF_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
MEMEFF_DEVICE float widen(__half x) { return __half2float(x); }

template <class T>
MEMEFF_DEVICE T narrow(Accumulation<T> x) {
  return static_cast<T>(x);
}
template <>
MEMEFF_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
MEMEFF_DEVICE __half narrow<__half>(float x) {
  return __float2half(x);
}

// The lower halves of two registers, or their upper ones, as a pair: the first's in the lower half.
// (nvcc makes two instructions of shifts and masks.)
MEMEFF_DEVICE uint32_t lower_halves(uint32_t first, uint32_t second) {
#if defined(__CUDACC__)
  return __byte_perm(first, second, 0x5410);
#else
  return (first & 0xffffu) | second << 16;
#endif
}
MEMEFF_DEVICE uint32_t upper_halves(uint32_t first, uint32_t second) {
#if defined(__CUDACC__)
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xffff0000u);
#endif
}

constexpr int kVectorBytes = 16;
template <class T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

// The type of one access of 16, 8, 4 or 2 bytes.
template <int kBytes>
using VectorOf = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

// Elements of one access when kCount adjacent ones are moved.
template <int kCount, class T>
constexpr int kPerAccess = kCount < kPerVector<T> ? kCount : kPerVector<T>;
template <int kCount, class T>
using Access = VectorOf<kPerAccess<kCount, T>* static_cast<int>(sizeof(T))>;

template <int kCount, class T>
MEMEFF_DEVICE bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Access<kCount, T>) == 0;
}

// How many of kCount adjacent elements from `first` on there are in a row of `size`.
template <int kCount>
MEMEFF_DEVICE int count_left(int64_t first, int64_t size) {
  const int64_t left = size - first;
  return left <= 0 ? 0 : left < kCount ? static_cast<int>(left) : kCount;
}

// Loads the first `count` of kCount adjacent elements, zeros for the others: in accesses as wide as
// they get where all are there and aligned, one by one elsewhere.
template <int kCount, class T>
MEMEFF_DEVICE void load(T (&values)[kCount], const T* from, int count = kCount) {
  using Vector = Access<kCount, T>;
  if (count == kCount && is_aligned<kCount>(from)) {
#pragma unroll
    for (int i = 0; i < kCount; i += kPerAccess<kCount, T>) {
      MEMEFF_CHECK_ALIGNED(from + i, sizeof(Vector));
      const Vector vector = *reinterpret_cast<const Vector*>(from + i);
      memcpy(static_cast<void*>(values + i), &vector, sizeof vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = i < count ? from[i] : T(0);
  }
}

// Stores the first `count` of kCount adjacent elements, in the same way.
template <int kCount, class T>
MEMEFF_DEVICE void store(T* to, const T (&values)[kCount], int count = kCount) {
  using Vector = Access<kCount, T>;
  if (count == kCount && is_aligned<kCount>(to)) {
#pragma unroll
    for (int i = 0; i < kCount; i += kPerAccess<kCount, T>) {
      MEMEFF_CHECK_ALIGNED(to + i, sizeof(Vector));
      Vector vector;
      memcpy(&vector, static_cast<const void*>(values + i), sizeof vector);
      *reinterpret_cast<Vector*>(to + i) = vector;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < count) to[i] = values[i];
  }
}

// Threads of a block that lie along a row of `size` elements, `per_thread` each: a power of two,
// whole warps, no more than needed. The rest of the block's threads take other rows.
inline unsigned threads_along(int64_t size, int per_thread, unsigned block_threads) {
  unsigned threads = 32;
  while (threads < block_threads && int64_t{threads} * per_thread < size) threads *= 2;
  return threads;
}

// One element whose type is known at run time only: for inputs that are rarely there.
template <class A>
MEMEFF_DEVICE A load_any(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::kFloat16: return widen(static_cast<const __half*>(data)[index]);
    case DType::kFloat32: return static_cast<A>(static_cast<const float*>(data)[index]);
    case DType::kFloat64: return static_cast<A>(static_cast<const double*>(data)[index]);
  }
  return A(0);
}

// From a run-time type to a compile-time one: calls f with a null pointer of that type.
template <class F>
Status dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16: return f(static_cast<__half*>(nullptr));
    case DType::kFloat32: return f(static_cast<float*>(nullptr));
    case DType::kFloat64: return f(static_cast<double*>(nullptr));
  }
  return {"unknown dtype"};
}

}  // namespace memeff::cuda
