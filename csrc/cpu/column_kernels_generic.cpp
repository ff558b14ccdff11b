// Column kernels for any machine, and the choice between the versions.
#include "cpu/column_kernels_impl.h"
#include "cpu/features.h"

namespace memeff {

#if defined(__x86_64__)
// Defined in the files compiled for these instruction sets.
ColumnKernels<float> float_column_kernels_avx2();
ColumnKernels<double> double_column_kernels_avx2();
ColumnKernels<float> float_column_kernels_avx512();
ColumnKernels<double> double_column_kernels_avx512();
#endif

template <>
const ColumnKernels<float>& column_kernels<float>() {
  static const ColumnKernels<float> kernels = [] {
#if defined(__x86_64__)
    if (cpu_features().avx512) return float_column_kernels_avx512();
    if (cpu_features().avx2) return float_column_kernels_avx2();
#endif
    return make_column_kernels<float>();
  }();
  return kernels;
}

template <>
const ColumnKernels<double>& column_kernels<double>() {
  static const ColumnKernels<double> kernels = [] {
#if defined(__x86_64__)
    if (cpu_features().avx512) return double_column_kernels_avx512();
    if (cpu_features().avx2) return double_column_kernels_avx2();
#endif
    return make_column_kernels<double>();
  }();
  return kernels;
}

}  // namespace memeff
