// Arrays and tolerances of the kernel tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "core/dtype.h"
#include "emulator/check.h"

namespace memeff::emulator {

inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return std::ldexp(1.0, -8);
    case DType::kFloat16: return std::ldexp(1.0, -11);
    case DType::kFloat32: return std::ldexp(1.0, -24);
    case DType::kFloat64: return std::ldexp(1.0, -53);
  }
  return 0;
}

inline const char* name_of(DType dtype) {
  const char* names[] = {"bfloat16", "float16", "float32", "float64"};
  return names[static_cast<int>(dtype)];
}

// An array of runtime element type, registered with the emulator and poisoned: every byte is 0xff,
// a NaN in all types, until it is set. Its first element lies `offset` elements after a multiple of
// 16 bytes.
class Array {
 public:
  Array(DType dtype, int64_t count, const char* name,
        BufferAccess access = BufferAccess::kReadWrite, int64_t offset = 0)
      : dtype_(dtype), bytes_((count + offset) * size_of(dtype) + 16, kPoison) {
    void* first = bytes_.data();
    std::size_t space = bytes_.size();
    data_ = static_cast<unsigned char*>(std::align(16, 1, first, space)) + offset * size_of(dtype);
    // Float arrays may hold 16-bit gradients.
    register_buffer(data_, count * size_of(dtype), name, access, size_of(dtype) == 8 ? 8 : 2);
  }
  ~Array() { unregister_buffer(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void* data() { return data_; }
  double at(int64_t i) const { return at(i, dtype_); }
  // Element i of the same memory as an array of another type.
  double at(int64_t i, DType as) const {
    switch (as) {
      case DType::kBFloat16: return __bfloat162float(element<__nv_bfloat16>(i));
      case DType::kFloat16: return __half2float(element<__half>(i));
      case DType::kFloat32: return element<float>(i);
      case DType::kFloat64: return element<double>(i);
    }
    return 0;
  }
  void set(int64_t i, double value) {
    switch (dtype_) {
      case DType::kBFloat16: put(i, __float2bfloat16(static_cast<float>(value))); break;
      case DType::kFloat16: put(i, __float2half(static_cast<float>(value))); break;
      case DType::kFloat32: put(i, static_cast<float>(value)); break;
      case DType::kFloat64: put(i, value); break;
    }
  }
  bool untouched(int64_t i) const {
    for (int64_t byte = 0; byte < size_of(dtype_); ++byte)
      if (data_[i * size_of(dtype_) + byte] != kPoison) return false;
    return true;
  }

 private:
  static constexpr unsigned char kPoison = 0xff;

  template <class T>
  T element(int64_t i) const {
    T value;
    std::memcpy(static_cast<void*>(&value), data_ + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void put(int64_t i, T value) {
    std::memcpy(data_ + i * sizeof(T), &value, sizeof(T));
  }

  DType dtype_;
  std::vector<unsigned char> bytes_;
  unsigned char* data_;
};

inline double worst_error = 0;  // relative to the tolerance, of everything compared so far

inline void compare(double got, double expected, double tolerance, const char* what, DType dtype) {
  if (got == expected || (std::isnan(got) && std::isnan(expected))) return;
  const double error = std::abs(got - expected) / tolerance;
  if (error > worst_error) worst_error = error;
  if (error <= 1) return;
  ++failed_checks;
  std::printf("FAILED %s of %s: %.9g instead of %.9g\n", what, name_of(dtype), got, expected);
}

}  // namespace memeff::emulator
