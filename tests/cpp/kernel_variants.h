// The column kernels of every instruction set that this machine runs. The generic version is the one
// that the including test program itself compiles.
#pragma once

#include <vector>

#include "cpu/column_kernels_impl.h"
#include "cpu/features.h"

namespace memeff {

#if defined(__x86_64__)
ColumnKernels<float> float_column_kernels_avx2();
ColumnKernels<double> double_column_kernels_avx2();
ColumnKernels<float> float_column_kernels_avx512();
ColumnKernels<double> double_column_kernels_avx512();
#endif

namespace test {

template <class T>
struct KernelVariant {
  const char* name;
  ColumnKernels<T> kernels;
};

template <class T>
std::vector<KernelVariant<T>> kernel_variants() {
  std::vector<KernelVariant<T>> variants = {{"generic", make_column_kernels<T>()}};
#if defined(__x86_64__)
  constexpr bool is_float = sizeof(T) == sizeof(float);
  if constexpr (is_float) {
    if (cpu_features().avx2) variants.push_back({"avx2", float_column_kernels_avx2()});
    if (cpu_features().avx512) variants.push_back({"avx512", float_column_kernels_avx512()});
  } else {
    if (cpu_features().avx2) variants.push_back({"avx2", double_column_kernels_avx2()});
    if (cpu_features().avx512) variants.push_back({"avx512", double_column_kernels_avx512()});
  }
#endif
  return variants;
}

}  // namespace test
}  // namespace memeff
