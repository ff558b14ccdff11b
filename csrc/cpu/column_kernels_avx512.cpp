// Column kernels for avx512.
#include "cpu/column_kernels_impl.h"

#if defined(__x86_64__)

namespace memeff {

ColumnKernels<float> float_column_kernels_avx512() { return make_column_kernels<float>(); }
ColumnKernels<double> double_column_kernels_avx512() { return make_column_kernels<double>(); }

}  // namespace memeff

#endif
