// Sums over the tokens of a block of gradients, any architecture: the gradient of the bias.
//
//   G [classes, tokens] -> sums[v] += sum_t f[t] G[v,t]
//
// One warp per class, 8 per thread block: each lane sums every 32nd vector of 16 bytes, then the
// lanes meet by shuffles. No shared memory. Reads G once, bound by memory. Sums in the accumulation
// type, in an order that the number of tokens alone determines.
#include "core/math.h"
#include "cuda/common/vector_io.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kLanes = 32, kWarps = 8;

template <class T>
__global__ void __launch_bounds__(kLanes* kWarps)
    bias_gradient_kernel(const T* gradient, int64_t stride, int64_t classes, int64_t tokens,
                         const float* factors, Accumulation<T>* sums) {
  using A = Accumulation<T>;
  constexpr int kTokens = kPerVector<T>;
  const int64_t v = int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (v >= classes) return;
  A sum = A(0);
#pragma unroll 4  // loads in flight
  for (int64_t token = int64_t{threadIdx.x} * kTokens; token < tokens; token += kLanes * kTokens) {
    T values[kTokens];
    const int count = count_left<kTokens>(token, tokens);
    load(values, gradient + v * stride + token, count);
    if (factors == nullptr) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) sum += widen(values[i]);
    } else {
      float factor[kTokens];
      load(factor, factors + token, count);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) sum += static_cast<A>(factor[i]) * widen(values[i]);
    }
  }
  for (int lane_mask = kLanes / 2; lane_mask > 0; lane_mask /= 2)
    sum += __shfl_xor_sync(~0u, sum, lane_mask);
  if (threadIdx.x == 0) sums[v] += sum;
}

template <class T>
Status launch(const Block& block, const void* gradient, int64_t stride, const float* factors,
              void* sums, void* stream) {
  const auto* from = static_cast<const T*>(gradient);
  auto* to = static_cast<Accumulation<T>*>(sums) + block.first_class;
  const int64_t classes = block.classes, tokens = block.tokens;
  const auto blocks = static_cast<unsigned>(ceil_div(classes, kWarps));
  MEMEFF_LAUNCH(bias_gradient_kernel<T>, dim3(blocks), dim3(kLanes, kWarps), 0, stream, from,
                stride, classes, tokens, factors, to);
  return launch_status();
}

}  // namespace

Status add_bias_gradient(const Block& block, const void* gradient, int64_t stride, DType dtype,
                         const float* factors, void* sums, void* stream) {
  if (block.tokens == 0 || block.classes == 0) return {};
  return dispatch(dtype, [&](auto* type) {
    return launch<std::remove_pointer_t<decltype(type)>>(block, gradient, stride, factors, sums,
                                                         stream);
  });
}

}  // namespace memeff::cuda
