// parallel_for and gemm through torch: its thread pool, its BLAS.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>

#include "cpu/gemm.h"
#include "cpu/parallel.h"

namespace memeff {

int max_threads() { return at::get_num_threads(); }

void parallel_for(int64_t n, int64_t grain,
                  const std::function<void(int64_t begin, int64_t end, int thread)>& body) {
  const int64_t ranges = (n + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(ranges, max_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t range = next++; range < ranges; range = next++) {
      body(range * grain, std::min(n, (range + 1) * grain), at::get_thread_num());
    }
  });
}

template <class T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
          int64_t lda, const T* b, int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto view = [&](const T* data, bool transpose, int64_t rows, int64_t columns,
                        int64_t stride) {
    const int64_t row_stride = transpose ? 1 : stride;
    const int64_t column_stride = transpose ? stride : 1;
    return at::from_blob(const_cast<T*>(data), {rows, columns}, {row_stride, column_stride},
                         options);
  };
  const at::Tensor left = view(a, transpose_a, m, k, lda);
  const at::Tensor right = view(b, transpose_b, k, n, ldb);
  at::Tensor out = view(c, false, m, n, ldc);
  if (accumulate) {
    at::addmm_out(out, out, left, right);
  } else {
    at::mm_out(out, left, right);
  }
}

template void gemm<float>(bool, bool, int64_t, int64_t, int64_t, const float*, int64_t,
                          const float*, int64_t, bool, float*, int64_t);
template void gemm<double>(bool, bool, int64_t, int64_t, int64_t, const double*, int64_t,
                           const double*, int64_t, bool, double*, int64_t);

}  // namespace memeff
