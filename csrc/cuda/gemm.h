// General matrix products on a GPU, from torch (and so cuBLAS, with torch's handles and settings).
#pragma once

#include <cstdint>

#include "core/dtype.h"

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

}  // namespace memeff::cuda
