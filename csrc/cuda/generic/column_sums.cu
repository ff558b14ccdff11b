// Sums over tokens of a block of gradients: the gradient of the bias.
//
// A thread block owns 32 adjacent classes. Its 8 warps take every eighth token, each lane one
// class, so a warp reads 32 adjacent elements; the 8 partial sums per class meet in shared memory
// (1 or 2 KiB). Sums are in the accumulation type and in a fixed order.
#include "cuda/common/vector_io.cuh"
#include "cuda/launch.h"

namespace memeff::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kClasses = 32;

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    column_sums_kernel(const T* gradient, int64_t tokens, int64_t classes, int64_t row_stride,
                       Accumulation<T>* sums) {
  using A = Accumulation<T>;
  MEMEFF_SHARED_ARRAY(A, partial, kWarps * kClasses);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = int64_t{blockIdx.x} * kClasses + lane;

  A sum = A(0);
  if (column < classes)
    for (int64_t token = warp; token < tokens; token += kWarps)
      sum += widen(gradient[token * row_stride + column]);
  partial[warp * kClasses + lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= classes) return;
  for (int other = 1; other < kWarps; ++other) sum += partial[other * kClasses + lane];
  sums[column] += sum;
}

template <class T>
Status launch(const LogitsBlock& block, void* sums, void* stream) {
  const auto* gradient = static_cast<const T*>(block.logits);
  auto* first_sum = static_cast<Accumulation<T>*>(sums) + block.first_class;
  const auto blocks = static_cast<unsigned>((block.classes + kClasses - 1) / kClasses);
  const int64_t tokens = block.tokens, classes = block.classes, row_stride = block.row_stride;
  MEMEFF_LAUNCH(column_sums_kernel<T>, dim3(blocks), dim3(kWarps * 32), 0, stream, gradient, tokens,
                classes, row_stride, first_sum);
  return launch_status();
}

}  // namespace

Status add_column_sums(const LogitsBlock& gradient, void* sums, void* stream) {
  if (gradient.tokens == 0 || gradient.classes == 0) return {};
  switch (gradient.dtype) {
    case DType::kBFloat16: return launch<__nv_bfloat16>(gradient, sums, stream);
    case DType::kFloat16: return launch<__half>(gradient, sums, stream);
    case DType::kFloat32: return launch<float>(gradient, sums, stream);
    case DType::kFloat64: return launch<double>(gradient, sums, stream);
  }
  return {"add_column_sums: unknown dtype"};
}

}  // namespace memeff::cuda
