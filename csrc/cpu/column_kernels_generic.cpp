// Column kernels for any machine, and the choice between the versions.
#include "cpu/column_kernels_impl.h"
#include "cpu/features.h"

namespace memeff {

template <class T>
const ColumnKernels<T>& column_kernels() {
  static const ColumnKernels<T> kernels = [] {
#if defined(__x86_64__)
    if (cpu_features().avx512) return column_kernels_avx512<T>();
    if (cpu_features().avx2) return column_kernels_avx2<T>();
#endif
    return make_column_kernels<T>();
  }();
  return kernels;
}
template const ColumnKernels<float>& column_kernels();
template const ColumnKernels<double>& column_kernels();

}  // namespace memeff
