// Matrix products in plain loops, for the torch-free build: simple enough to be right.
#include "cpu/gemm.h"

namespace memeff {

template <class T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
          int64_t lda, const T* b, int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  const int64_t a_row = transpose_a ? 1 : lda, a_column = transpose_a ? lda : 1;
  const int64_t b_row = transpose_b ? 1 : ldb, b_column = transpose_b ? ldb : 1;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      T sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        sum += a[i * a_row + p * a_column] * b[p * b_row + j * b_column];
      }
      c[i * ldc + j] = accumulate ? c[i * ldc + j] + sum : sum;
    }
  }
}

template void gemm<float>(bool, bool, int64_t, int64_t, int64_t, const float*, int64_t,
                          const float*, int64_t, bool, float*, int64_t);
template void gemm<double>(bool, bool, int64_t, int64_t, int64_t, const double*, int64_t,
                           const double*, int64_t, bool, double*, int64_t);

}  // namespace memeff
