// General matrix product, from torch (and so MKL or oneDNN) in the extension.
#pragma once

#include <cstdint>

namespace memeff {

/// C[m,n] = op(A) op(B), or C += ... when `accumulate`. All row-major; op(A) is A[m,k], or A[k,m]
/// transposed when `transpose_a`; likewise B. Leading dimensions count elements.
template <class T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
          int64_t lda, const T* b, int64_t ldb, bool accumulate, T* c, int64_t ldc);

extern template void gemm<float>(bool, bool, int64_t, int64_t, int64_t, const float*, int64_t,
                                 const float*, int64_t, bool, float*, int64_t);
extern template void gemm<double>(bool, bool, int64_t, int64_t, int64_t, const double*, int64_t,
                                  const double*, int64_t, bool, double*, int64_t);

}  // namespace memeff
