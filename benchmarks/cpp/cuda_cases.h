// What bench_cuda_kernels times: every kernel of cuda/generic_kernels.h and cuda/fused_kernels.h (and those of cuda/tokens.h that see
// whole blocks of scores), alone, on data as a training step has it. No CUDA headers: the test of
// this file (tests/kernels/test_bench_cases.cpp) runs the same cases in the emulator.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cuda/gemm.h"
#include "cuda/status.h"

namespace memeff::bench {

struct Shape {
  int64_t tokens = 0, features = 0, vocab = 0;
};

/// Where arrays live: on a GPU, or in the emulator.
class Memory {
 public:
  virtual ~Memory() = default;
  /// At a multiple of 256 bytes. `granule`: bytes of the smallest element. Throws
  /// std::runtime_error where there is no room.
  virtual void* allocate(int64_t bytes, const char* name, int granule) = 0;
  /// From host memory or the memory itself, in the stream's order.
  virtual void copy(void* to, const void* from, int64_t bytes) = 0;
};

/// C = A B (or C += A B) by a library, on the stream; C is row-major, of type `c_dtype`.
using LibraryProduct = std::function<Status(const cuda::Matrix& a, const cuda::Matrix& b,
                                            bool accumulate, void* c, DType c_dtype)>;

/// One launch. Cases of the same kernel and variant compute the same thing.
struct Case {
  std::string kernel;
  std::string family;             // "generic", "sm80", ..., "sm90rs", "cublas"
  std::string variant;            // what the result is, or which choice the launcher was given
  double flops = 0;               // of products on tensor cores
  double bytes = 0;               // of global memory, every operand and result once
  std::function<void()> prepare;  // restores what `run` overwrites; not timed; may be empty
  std::function<Status()> run;
};

/// Every case that a GPU of that compute capability can run; `product` may be empty. 16-bit dtypes.
/// Fills the memory, which must outlive the cases. Throws std::runtime_error where a launch fails.
std::vector<Case> make_cases(const Shape& shape, DType dtype, int capability, Memory& memory,
                             const LibraryProduct& product, void* stream);

}  // namespace memeff::bench
