// The part of the gradients that label smoothing gives to every class alike. dz_v contains
// weighted w_v, a matrix of rank one, so its products need no [classes, tokens] block:
//
//   grad_input[n]   += weighted_n sum_v w_v W[v]            weighted_row_sum, then outer_product
//   grad_weight[v]  += w_v sum_n weighted_n x[n]
//
// Used where blocks of gradients may skip tiles (work_list.h), which this part would keep from being
// small.
//
// weighted_row_sum: a thread block owns 64 adjacent columns; its 1024 threads are 8 lanes along
// them, 16 bytes each, by 128 rows, which walk down the matrix; the 128 partial sums per column
// meet in shared memory (32 KiB), always in the same order. Reads the matrix once.
// outer_product: one thread per element, writes (or reads and writes) 4 bytes.
//
// Numerics: fp32.
#include "core/math.h"
#include "cuda/common/vector_io.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kLanes = 8, kRows = 128, kPerThread = 8;
constexpr int kColumns = kLanes * kPerThread;

template <class T>
__global__ void __launch_bounds__(kLanes* kRows) weighted_row_sum_kernel(WeightedRowSum call) {
  const auto* const matrix = static_cast<const T*>(call.matrix);
  MEMEFF_SHARED_ARRAY(float, partial, kRows* kColumns);
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x * kPerThread;
  const int count = count_left<kPerThread>(column, call.columns);
  float sum[kPerThread] = {};
  if (count > 0) {
    for (int64_t row = threadIdx.y; row < call.rows; row += kRows) {
      const float factor = call.factors == nullptr ? 1.f : call.factors[row];
      if (factor == 0.f) continue;  // 0 times what is not finite is not 0
      T values[kPerThread];
      load(values, matrix + row * call.stride + column, count);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) sum[i] += factor * widen(values[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
    partial[threadIdx.y * kColumns + threadIdx.x * kPerThread + i] = sum[i];
  __syncthreads();
  const int mine = threadIdx.y * kLanes + threadIdx.x;
  if (mine >= kColumns || int64_t{blockIdx.x} * kColumns + mine >= call.columns) return;
  float total = 0.f;
  for (int row = 0; row < kRows; ++row) total += partial[row * kColumns + mine];
  call.sums[int64_t{blockIdx.x} * kColumns + mine] = total;
}

constexpr int kOuterThreads = 256;

__global__ void __launch_bounds__(kOuterThreads) outer_product_kernel(OuterProduct call) {
  const int64_t i = int64_t{blockIdx.x} * kOuterThreads + threadIdx.x;
  if (i >= call.rows * call.columns) return;
  const int64_t row = i / call.columns, column = i % call.columns;
  const float factor = call.factors == nullptr ? 1.f : call.factors[row];
  const float product = factor * call.values[column];
  float& to = call.out[row * call.stride + column];
  to = call.accumulate ? to + product : product;
}

}  // namespace

Status weighted_row_sum(const WeightedRowSum& call, void* stream) {
  if (call.columns == 0) return {};
  if (!is_16_bit(call.dtype)) return {"weighted_row_sum: matrices of 16 bits only"};
  const auto blocks = static_cast<unsigned>(ceil_div(call.columns, kColumns));
  const auto kernel = call.dtype == DType::kBFloat16 ? weighted_row_sum_kernel<__nv_bfloat16>
                                                     : weighted_row_sum_kernel<__half>;
  MEMEFF_LAUNCH(kernel, dim3(blocks), dim3(kLanes, kRows), 0, stream, call);
  return launch_status();
}

Status outer_product(const OuterProduct& call, void* stream) {
  if (call.rows == 0 || call.columns == 0) return {};
  const auto blocks = static_cast<unsigned>(ceil_div(call.rows * call.columns, kOuterThreads));
  MEMEFF_LAUNCH(outer_product_kernel, dim3(blocks), dim3(kOuterThreads), 0, stream, call);
  return launch_status();
}

}  // namespace memeff::cuda
