// Merges the partial statistics of ranges r of classes, each with its maximum m_r, of each token:
//
//   m = max_r m_r,  S = sum_r exp(m_r - m) s_r,  lse = m + log S
//   entropy = log S - 1/S sum_r exp(m_r - m) (e_r + (m_r - m) s_r)
//
// and plain sums over r of the other statistics; then the coefficients of the token's gradient
// (token_coefficients.cuh), unless they wait for upstream gradients or for other ranks
// (tokens_of_ranks.cu).
//
// A thread block owns 32 adjacent tokens, so that a warp reads 128 adjacent bytes of a range, and
// its 16 warps take every sixteenth range: with one thread per token alone, a block of 1024 tokens
// and 1000 ranges would leave most of a GPU idle. Two passes over the maxima (the second one comes
// from L2): the first finds m, after which each range needs one exponential. The 16 results per
// token meet in shared memory (10 KiB, 12 in fp64).
//
// Numerics: exp(m_r - m) is computed in A, because fp64 exponentials are slow on most GPUs; its
// error is that of the partial sums themselves. Sums over ranges and the logarithm are in fp64.
#include <cmath>

#include "core/math.h"
#include "cuda/generic/token_coefficients.cuh"

namespace memeff::cuda {

namespace {

constexpr int kTokens = 32;
constexpr int kWarps = 16;
constexpr int kScratch = kTokens * kWarps;

MEMEFF_DEVICE double sum_over_warps(double value, double* scratch) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  __syncthreads();  // an earlier sum may still be read
  scratch[warp * kTokens + lane] = value;
  __syncthreads();
  double sum = 0.0;
  for (int other = 0; other < kWarps; ++other) sum += scratch[other * kTokens + lane];
  return sum;
}

// A token's sum over all ranges: `values` points to its element of the first range.
template <class A>
MEMEFF_DEVICE double sum_over_ranges(const void* values, int64_t column, int64_t stride,
                                     int64_t ranges, double* scratch) {
  double sum = 0.0;
  for (int64_t r = threadIdx.y; r < ranges; r += kWarps)
    sum += static_cast<double>(static_cast<const A*>(values)[r * stride + column]);
  return sum_over_warps(sum, scratch);
}

template <class A>
struct Maximum {
  A value;
  int64_t range;  // the first one that has it
};

template <class A>
MEMEFF_DEVICE Maximum<A> maximum_over_ranges(const PartialStatistics& partials, int64_t column,
                                             int64_t ranges) {
  MEMEFF_SHARED_ARRAY(A, values, kScratch);
  MEMEFF_SHARED_ARRAY(int64_t, places, kScratch);
  const int lane = threadIdx.x, warp = threadIdx.y;
  Maximum<A> best{A(-INFINITY), 0};
  for (int64_t r = warp; r < ranges; r += kWarps) {
    const A value = static_cast<const A*>(partials.max)[r * partials.max_stride + column];
    if (value > best.value || value != value) best = {value, r};
  }
  values[warp * kTokens + lane] = best.value;
  places[warp * kTokens + lane] = best.range;
  __syncthreads();
  for (int other = 0; other < kWarps; ++other) {
    const Maximum<A> theirs{values[other * kTokens + lane], places[other * kTokens + lane]};
    if (theirs.value > best.value || theirs.value != theirs.value ||
        (theirs.value == best.value && theirs.range < best.range))
      best = theirs;
  }
  return best;
}

template <class A>
__global__ void __launch_bounds__(kTokens* kWarps)
    merge_statistics_kernel(Problem problem, TokenArrays tokens, int64_t begin, int64_t end,
                            PartialStatistics partials, int64_t ranges) {
  MEMEFF_SHARED_ARRAY(double, scratch, kScratch);
  const int64_t own_column = int64_t{blockIdx.x} * kTokens + threadIdx.x;
  // Threads without a token read the last one's numbers, because of the barriers.
  const int64_t column = own_column < end - begin ? own_column : end - begin - 1;
  const int64_t token = begin + column, stride = partials.stride;

  const Maximum<A> maximum = maximum_over_ranges<A>(partials, column, ranges);
  double sum = 0.0, offset_sum = 0.0;
  for (int64_t r = threadIdx.y; r < ranges; r += kWarps) {
    const A max = static_cast<const A*>(partials.max)[r * partials.max_stride + column];
    const A offset = max - maximum.value;
    // A range of -inf alone adds nothing (offset may be NaN); NaN in a sum stays visible.
    const A scale = max == A(-INFINITY) ? A(0) : std::exp(offset);
    const double range_sum = static_cast<const A*>(partials.sum)[r * stride + column];
    sum += static_cast<double>(scale) * range_sum;
    if (tokens.entropy != nullptr && scale > A(0)) {
      const double entropy = static_cast<const A*>(partials.entropy)[r * stride + column];
      offset_sum +=
          static_cast<double>(scale) * (entropy + static_cast<double>(offset) * range_sum);
    }
  }
  sum = sum_over_warps(sum, scratch);
  const double log_sum = log(sum);
  // exp(inf - inf) is NaN, but its logarithm is known. With a NaN among the logits that is the maximum.
  const auto top = static_cast<double>(maximum.value);
  const double lse = top == INFINITY ? top : top + log_sum;
  const bool writes = threadIdx.y == 0 && own_column < end - begin;

  if (tokens.entropy != nullptr) {
    offset_sum = sum_over_warps(offset_sum, scratch);
    if (writes) tokens.entropy[token] = log_sum - offset_sum / sum;
  }
  if (tokens.smooth != nullptr) {
    const double smooth = sum_over_ranges<A>(partials.smooth, column, stride, ranges, scratch);
    if (writes) tokens.smooth[token] = smooth;
  }
  double target_mass = 0.0;
  if (problem.probabilities != nullptr) {
    const double dot = sum_over_ranges<A>(partials.target_dot, column, stride, ranges, scratch);
    const double plain = sum_over_ranges<A>(partials.target_plain, column, stride, ranges, scratch);
    target_mass = sum_over_ranges<A>(partials.target_mass, column, stride, ranges, scratch);
    if (writes) {
      tokens.target_dot[token] = dot;
      tokens.target_plain[token] = plain;
      tokens.target_mass[token] = target_mass;
    }
  }
  if (!writes) return;

  tokens.lse[token] = lse;
  if (tokens.maximum != nullptr) tokens.maximum[token] = maximum.value;
  if (tokens.argmax != nullptr) {
    const bool any = maximum.value > A(-INFINITY);
    tokens.argmax[token] = any ? partials.argmax[maximum.range * stride + column] : 0;
  }
  if (tokens.for_statistics || tokens.shared) return;
  if (problem.probabilities == nullptr) target_mass = tokens.target_mass[token];
  store_coefficients<A>(problem, tokens, token, lse, target_mass);
}

}  // namespace

Status merge_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                        int64_t end, const PartialStatistics& partials, int64_t ranges,
                        void* stream) {
  if (begin == end) return {};
  if ((tokens.entropy != nullptr && partials.entropy == nullptr) ||
      (tokens.argmax != nullptr && partials.argmax == nullptr) ||
      (tokens.smooth != nullptr && partials.smooth == nullptr))
    return {"merge_statistics: a statistic is wanted whose partial statistics are not given"};
  const auto merge =
      in_double(problem) ? merge_statistics_kernel<double> : merge_statistics_kernel<float>;
  MEMEFF_LAUNCH(merge, dim3(static_cast<unsigned>(ceil_div(end - begin, kTokens))),
                dim3(kTokens, kWarps), 0, stream, problem, tokens, begin, end, partials, ranges);
  return launch_status();
}

}  // namespace memeff::cuda
