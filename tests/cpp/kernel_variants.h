// The column kernels of every instruction set that this machine runs. The generic version is the one
// that the including test program itself compiles.
#pragma once

#include <vector>

#include "cpu/column_kernels_impl.h"
#include "cpu/features.h"

namespace memeff::test {

template <class T>
struct KernelVariant {
  const char* name;
  ColumnKernels<T> kernels;
};

template <class T>
std::vector<KernelVariant<T>> kernel_variants() {
  std::vector<KernelVariant<T>> variants = {{"generic", make_column_kernels<T>()}};
#if defined(__x86_64__)
  if (cpu_features().avx2) variants.push_back({"avx2", column_kernels_avx2<T>()});
  if (cpu_features().avx512) variants.push_back({"avx512", column_kernels_avx512<T>()});
#endif
  return variants;
}

}  // namespace memeff::test
