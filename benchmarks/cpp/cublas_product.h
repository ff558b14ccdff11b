// Matrix products by cuBLAS where a libcublas is found at run time, to compare with: neither its
// headers nor the library are needed to build. The constants are those of its interface.
#pragma once

#include <dlfcn.h>
#include <library_types.h>

#include "cuda_cases.h"

namespace memeff::bench {

/// An empty function, and why in `reason`, where there is no cuBLAS. The library stays loaded.
inline LibraryProduct load_cublas(void* stream, std::string* reason) {
  using Create = int (*)(void** handle);
  using SetStream = int (*)(void* handle, void* stream);
  using GemmEx = int (*)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                         const void* a, cudaDataType a_type, int lda, const void* b,
                         cudaDataType b_type, int ldb, const void* beta, void* c,
                         cudaDataType c_type, int ldc, int compute_type, int algorithm);
  constexpr int kNotTransposed = 0, kTransposed = 1, kCompute32F = 68, kDefaultAlgorithm = -1;

  void* library = nullptr;
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"})
    if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    *reason = "no libcublas.so.13 or .12 on the library path (LD_LIBRARY_PATH)";
    return {};
  }
  const auto create = reinterpret_cast<Create>(dlsym(library, "cublasCreate_v2"));
  const auto set_stream = reinterpret_cast<SetStream>(dlsym(library, "cublasSetStream_v2"));
  const auto gemm = reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"));
  void* handle = nullptr;
  if (create == nullptr || set_stream == nullptr || gemm == nullptr || create(&handle) != 0 ||
      set_stream(handle, stream) != 0) {
    *reason = "libcublas does not start";
    return {};
  }
  return [=](const cuda::Matrix& a, const cuda::Matrix& b, bool accumulate, void* c,
             DType c_dtype) -> Status {
    const auto type = [](DType dtype) {
      return dtype == DType::kBFloat16  ? CUDA_R_16BF
             : dtype == DType::kFloat16 ? CUDA_R_16F
                                        : CUDA_R_32F;
    };
    // Its matrices are column-major, so a row-major C = A B is C^T = B^T A^T to it, and a row-major
    // operand is already transposed.
    const auto op = [=](const cuda::Matrix& m) {
      return m.column_stride == 1 ? kNotTransposed : kTransposed;
    };
    const auto leading = [](const cuda::Matrix& m) {
      return static_cast<int>(m.column_stride == 1 ? m.row_stride : m.column_stride);
    };
    const float one = 1, beta = accumulate ? 1.f : 0.f;
    const int status =
        gemm(handle, op(b), op(a), static_cast<int>(b.columns), static_cast<int>(a.rows),
             static_cast<int>(a.columns), &one, b.data, type(b.dtype), leading(b), a.data,
             type(a.dtype), leading(a), &beta, c, type(c_dtype), static_cast<int>(b.columns),
             kCompute32F, kDefaultAlgorithm);
    return status == 0 ? Status{} : Status{"cublasGemmEx failed"};
  };
}

}  // namespace memeff::bench
