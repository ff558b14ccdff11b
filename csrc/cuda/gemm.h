// General matrix products on a GPU, from torch (and so cuBLAS, with torch's handles and settings).
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dtype.h"
#include "core/math.h"
#include "cuda/select.h"

namespace memeff::cuda {

/// A matrix on the device; one of the two strides is 1.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // elements
};

/// C = A B, or C += A B when `accumulate`, on the current device and stream. C is row-major and of
/// the accumulation type of A and B, which have one type.
void gemm(const Matrix& a, const Matrix& b, bool accumulate, void* c, int64_t c_stride);

// ---- bf16 on GPUs that do not multiply it ----

/// Whether gemm() upcasts its operands to fp32, a piece of each at a time, in memory of torch's.
inline bool upcasts(DType dtype, const Gpu& gpu) {
  return dtype == DType::kBFloat16 && gpu.capability < 80;
}

/// Pieces are [kUpcastRows, kUpcastDepth] and [kUpcastDepth, kUpcastColumns], 8 MiB each: little
/// of a budget, yet 256 tiles of 128 x 128 for the GPU, and a sum of C for 1024 multiply-adds.
constexpr int64_t kUpcastRows = 2048, kUpcastDepth = 1024, kUpcastColumns = 2048;

/// What the pieces of a product [rows, inner] [inner, columns] take of torch's allocator.
inline int64_t upcast_bytes(int64_t rows, int64_t inner, int64_t columns) {
  constexpr int64_t kAllocationUnit = 512;
  const int64_t bytes_across = std::min(inner, kUpcastDepth) * 4;
  return round_up(std::min(rows, kUpcastRows) * bytes_across, kAllocationUnit) +
         round_up(std::min(columns, kUpcastColumns) * bytes_across, kAllocationUnit);
}

}  // namespace memeff::cuda
