// 16-byte accesses of rows of any element type, and conversion to the accumulation type.
#pragma once

#include <cstring>

#include "core/dtype.h"
#include "cuda/common/device.cuh"

namespace memeff::cuda {

template <class T>
struct AccumulationType {
  using type = float;
};
template <>
struct AccumulationType<double> {
  using type = double;
};
template <class T>
using Accumulation = typename AccumulationType<T>::type;

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

constexpr int kVectorBytes = 16;
template <class T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

MEMEFF_DEVICE bool is_vector_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// kCount adjacent elements as one access of kCount * sizeof(T) bytes: 16, 8, 4 or 2 of them.
template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<16> {
  using type = uint4;
};
template <>
struct VectorOf<8> {
  using type = uint2;
};
template <>
struct VectorOf<4> {
  using type = uint32_t;
};
template <>
struct VectorOf<2> {
  using type = uint16_t;
};

template <int kCount, class T>
MEMEFF_DEVICE void load(T (&values)[kCount], const T* from) {
  using Vector = typename VectorOf<kCount* static_cast<int>(sizeof(T))>::type;
  MEMEFF_CHECK_ALIGNED(from, sizeof(Vector));
  const Vector vector = *reinterpret_cast<const Vector*>(from);
  memcpy(static_cast<void*>(values), &vector, sizeof vector);
}

template <int kCount, class T>
MEMEFF_DEVICE void store(T* to, const T (&values)[kCount]) {
  using Vector = typename VectorOf<kCount* static_cast<int>(sizeof(T))>::type;
  MEMEFF_CHECK_ALIGNED(to, sizeof(Vector));
  Vector vector;
  memcpy(&vector, static_cast<const void*>(values), sizeof vector);
  *reinterpret_cast<Vector*>(to) = vector;
}

// Threads of a block that walks over one row: whole warps, each thread with at least four vectors
// to do where the row is that long; 512 keep enough loads in flight to saturate memory.
inline unsigned threads_per_row(int64_t columns, int per_vector) {
  const int64_t wanted = columns / (4 * per_vector) / 32 * 32;
  return static_cast<unsigned>(wanted < 32 ? 32 : wanted > 512 ? 512 : wanted);
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

}  // namespace memeff::cuda
