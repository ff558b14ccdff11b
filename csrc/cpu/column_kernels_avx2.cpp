// Column kernels for avx2.
#include "cpu/column_kernels_impl.h"

#if defined(__x86_64__)

namespace memeff {

template <class T>
ColumnKernels<T> column_kernels_avx2() {
  return make_column_kernels<T>();
}
template ColumnKernels<float> column_kernels_avx2();
template ColumnKernels<double> column_kernels_avx2();

}  // namespace memeff

#endif
