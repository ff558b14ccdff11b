// Sums over the tokens of a block of unrounded gradients, any architecture: the gradient of the bias.
//
//   G [classes, tokens] -> sums[v] += sum_t G[v,t]
//
// One warp per class, 8 per thread block: each lane sums every 32nd vector of 16 bytes, then the
// lanes meet by shuffles. No shared memory. Reads G once, bound by memory. Sums in the accumulation
// type, in an order that the number of tokens alone determines.
#include "core/math.h"
#include "cuda/common/block_sum.cuh"
#include "cuda/common/vector_io.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kLanes = 32, kWarps = 8;

template <class A>
__global__ void __launch_bounds__(kLanes* kWarps)
    bias_gradient_kernel(const A* gradient, int64_t stride, int64_t classes, int64_t tokens,
                         A* sums) {
  constexpr int kTokens = kPerVector<A>;
  const int64_t v = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (v >= classes) return;
  A sum = A(0);
#pragma unroll 4  // loads in flight
  for (int64_t token = int64_t{threadIdx.x} * kTokens; token < tokens; token += kLanes * kTokens) {
    A values[kTokens];
    load(values, gradient + v * stride + token, count_left<kTokens>(token, tokens));
#pragma unroll
    for (int i = 0; i < kTokens; ++i) sum += values[i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) sums[v] += sum;
}

template <class A>
Status launch(const Block& block, const void* gradient, int64_t stride, void* sums, void* stream) {
  const auto* from = static_cast<const A*>(gradient);
  auto* to = static_cast<A*>(sums) + block.first_class;
  const int64_t classes = block.classes, tokens = block.tokens;
  const auto blocks = static_cast<unsigned>(ceil_div(classes, kWarps));
  MEMEFF_LAUNCH(bias_gradient_kernel<A>, dim3(blocks), dim3(kLanes, kWarps), 0, stream, from,
                stride, classes, tokens, to);
  return launch_status();
}

}  // namespace

Status add_bias_gradient(const Block& block, const void* gradient, int64_t stride, DType dtype,
                         void* sums, void* stream) {
  if (block.tokens == 0 || block.classes == 0) return {};
  switch (dtype) {
    case DType::kFloat32: return launch<float>(block, gradient, stride, sums, stream);
    case DType::kFloat64: return launch<double>(block, gradient, stride, sums, stream);
    default:
      return {"add_bias_gradient: gradients of 16 bits are added up before they are rounded"};
  }
}

}  // namespace memeff::cuda
