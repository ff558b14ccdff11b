// Element types that cross the boundary between tensors and kernels.
#pragma once

#include <cstdint>

namespace memeff {

enum class DType { kBFloat16, kFloat16, kFloat32, kFloat64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr bool is_16_bit(DType dtype) { return size_of(dtype) == 2; }

/// The type in which statistics are computed and gradients are accumulated.
constexpr DType accumulation_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace memeff
