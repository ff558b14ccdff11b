// Coefficients of tokens whose lse is known: the backward op, token statistics whose upstream
// gradients have become known, a vocabulary that ranks share.
#include <cmath>

#include "core/math.h"
#include "cuda/common/block_sum.cuh"
#include "cuda/common/vector_io.cuh"
#include "cuda/generic/token_coefficients.cuh"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 256;

// sum_v w_v q_v, one thread block per token: the backward op knows lse, but not this.
__global__ void __launch_bounds__(kThreads)
    probability_mass_kernel(Problem problem, TokenArrays tokens) {
  MEMEFF_SHARED_ARRAY(double, scratch, kMaxWarpsPerBlock);
  const int64_t token = blockIdx.x;
  const int64_t first = token * problem.probabilities_token_stride;
  double mass = 0.0;
  for (int64_t v = threadIdx.x; v < problem.vocab; v += kThreads) {
    const double q = load_any<double>(problem.probabilities, problem.probabilities_dtype,
                                      first + v * problem.probabilities_class_stride);
    mass += problem.class_weight == nullptr ? q : q * problem.class_weight[v];
  }
  mass = block_sum(mass, scratch);
  if (threadIdx.x == 0) tokens.target_mass[token] = mass;
}

// From `known`, the lse of all tokens.
template <class A>
__global__ void __launch_bounds__(kThreads)
    set_coefficients_kernel(Problem problem, TokenArrays tokens, const double* known, int64_t begin,
                            int64_t end) {
  const int64_t token = begin + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= end) return;
  const double lse = known[token], target_mass = tokens.target_mass[token];
  tokens.lse[token] = lse;
  store_coefficients<A>(problem, tokens, token, lse, target_mass);
}

Status launch_coefficients(const Problem& problem, const TokenArrays& tokens, const double* lse,
                           int64_t begin, int64_t end, void* stream) {
  if (begin == end) return {};
  const auto set =
      in_double(problem) ? set_coefficients_kernel<double> : set_coefficients_kernel<float>;
  MEMEFF_LAUNCH(set, dim3(static_cast<unsigned>(ceil_div(end - begin, kThreads))), dim3(kThreads),
                0, stream, problem, tokens, lse, begin, end);
  return launch_status();
}

}  // namespace

Status restore_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                          int64_t end, void* stream) {
  if (begin == end) return {};
  if (problem.probabilities != nullptr)
    MEMEFF_LAUNCH(probability_mass_kernel, dim3(static_cast<unsigned>(problem.tokens)),
                  dim3(kThreads), 0, stream, problem, tokens);
  return launch_coefficients(problem, tokens, problem.lse, begin, end, stream);
}

Status set_coefficients(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                        int64_t end, void* stream) {
  return launch_coefficients(problem, tokens, tokens.lse, begin, end, stream);
}

}  // namespace memeff::cuda
