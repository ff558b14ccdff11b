// The loss from the statistics of all tokens, and what the caller gets to see of them; or, one
// thread per token, the statistics that a caller wants in place of a loss.
//
//   loss_n = token_weight ( (1-eps) (m lse - t) + eps/V (lse sum_v w_v - sum_v w_v z_v) )
//   z_n    = token_weight z_loss lse^2
//   m, t   = w_y, w_y z_y for index targets, sum_v w_v q_v, sum_v w_v q_v z_v for probabilities q
//   loss   = sum_n loss_n / D + sum_n z_n / D_z       or, not reduced, loss_n + z_n
//
// One thread block of 1024 threads: each takes every 1024th token, so accesses are coalesced, and
// the two sums meet in shared memory (256 bytes). 16K tokens are 16 steps of a few numbers each, so
// what counts is that the loads of a step do not wait for each other. fp64, in a fixed order.
#include <cmath>

#include "core/math.h"
#include "cuda/common/block_sum.cuh"
#include "cuda/tokens.h"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 1024;

struct TokenLoss {
  double cross_entropy = 0.0, z = 0.0;
};

template <class A>
MEMEFF_DEVICE TokenLoss loss_of(const Problem& problem, const TokenArrays& tokens, int64_t token,
                                int64_t target) {
  const bool soft = problem.probabilities != nullptr;
  const double lse = tokens.lse[token];
  const double mass = tokens.target_mass[token];
  const double weight = problem.token_weight == nullptr ? 1.0 : problem.token_weight[token];
  const double dot =
      soft ? tokens.target_dot[token]
           : mass * static_cast<double>(static_cast<const A*>(tokens.target_logit)[token]);
  TokenLoss loss;
  if (!soft && target == kNoTarget) return loss;
  const double eps = problem.label_smoothing;
  // A class of weight 0 contributes nothing, even at a target logit of -inf.
  if (eps != 1.0 && (soft || mass != 0.0)) loss.cross_entropy = (1.0 - eps) * (mass * lse - dot);
  if (eps > 0.0)
    loss.cross_entropy += eps / static_cast<double>(tokens.vocab) *
                          (tokens.scalars->class_weight_total * lse - tokens.smooth[token]);
  loss.cross_entropy *= weight;
  if (target == kBadTarget) loss.cross_entropy = NAN;
  if (problem.z_loss != 0.0) loss.z = weight * problem.z_loss * lse * lse;
  return loss;
}

template <class A>
__global__ void __launch_bounds__(kThreads) write_loss_kernel(Problem problem, TokenArrays tokens) {
  MEMEFF_SHARED_ARRAY(double, scratch, kMaxWarpsPerBlock);
  const int64_t n = problem.tokens;
  A* losses = static_cast<A*>(problem.loss);
  A* statistics = static_cast<A*>(problem.statistics_out);
  double total = 0.0, z_total = 0.0;
  for (int64_t token = threadIdx.x; token < n; token += kThreads) {
    const int64_t target = tokens.target[token];
    const TokenLoss loss = loss_of<A>(problem, tokens, token, target);
    const A sum = static_cast<A>(loss.cross_entropy + loss.z);
    total += loss.cross_entropy;
    z_total += loss.z;
    // Without statistics the CPU does not compute tokens that are left out; 0 here as there.
    const bool left_out = problem.target != nullptr && target == kNoTarget;
    problem.lse[token] = left_out && !problem.statistics ? 0.0 : tokens.lse[token];
    if (problem.reduction == Reduction::kNone) losses[token] = sum;
    if (statistics == nullptr) continue;
    statistics[token] = sum;
    statistics[n + token] = problem.probabilities != nullptr
                                ? static_cast<A>(tokens.target_plain[token])
                                : static_cast<const A*>(tokens.target_logit)[token];
    statistics[2 * n + token] = static_cast<A>(tokens.entropy[token]);
    statistics[3 * n + token] = static_cast<A>(tokens.maximum[token]);
    problem.argmax[token] = tokens.argmax[token];
  }
  if (problem.reduction == Reduction::kNone) return;
  total = block_sum(total, scratch);
  z_total = block_sum(z_total, scratch);
  if (threadIdx.x != 0) return;
  double loss = total / tokens.scalars->denominator;
  if (problem.z_loss != 0.0) loss += z_total / tokens.scalars->z_denominator;
  losses[0] = static_cast<A>(loss);
}

constexpr int kStatisticsThreads = 256;

template <class A>
__global__ void __launch_bounds__(kStatisticsThreads)
    write_token_statistics_kernel(Problem problem, TokenArrays tokens, int64_t begin, int64_t end) {
  const int64_t token = begin + int64_t{blockIdx.x} * kStatisticsThreads + threadIdx.x;
  if (token >= end) return;
  const TokenStatistics& wanted = tokens.wanted;
  const int64_t target = tokens.target[token];
  const bool left_out = target == kNoTarget && wanted.skip_ignored;
  const double lse = tokens.lse[token];
  problem.lse[token] = left_out ? 0.0 : lse;
  if (wanted.logprob != nullptr) {
    const double logit = static_cast<const A*>(tokens.target_logit)[token];  // NaN of bad targets
    static_cast<A*>(wanted.logprob)[token] =
        target == kNoTarget ? A(0) : static_cast<A>(logit - lse);
  }
  if (wanted.entropy != nullptr) wanted.entropy[token] = left_out ? 0.0 : tokens.entropy[token];
  if (wanted.logit_sum != nullptr)
    static_cast<A*>(wanted.logit_sum)[token] =
        left_out ? A(0) : static_cast<A>(tokens.smooth[token]);
  static_cast<A*>(wanted.max_logit)[token] =
      left_out ? A(0) : static_cast<A>(tokens.maximum[token]);
  if (wanted.argmax != nullptr) wanted.argmax[token] = left_out ? 0 : tokens.argmax[token];
}

}  // namespace

Status write_token_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                              int64_t end, void* stream) {
  if (begin == end) return {};
  const auto write = in_double(problem) ? write_token_statistics_kernel<double>
                                        : write_token_statistics_kernel<float>;
  const auto blocks = static_cast<unsigned>(ceil_div(end - begin, kStatisticsThreads));
  MEMEFF_LAUNCH(write, dim3(blocks), dim3(kStatisticsThreads), 0, stream, problem, tokens, begin,
                end);
  return launch_status();
}

Status write_loss(const Problem& problem, const TokenArrays& tokens, void* stream) {
  const auto write = in_double(problem) ? write_loss_kernel<double> : write_loss_kernel<float>;
  MEMEFF_LAUNCH(write, dim3(1), dim3(kThreads), 0, stream, problem, tokens);
  return launch_status();
}

}  // namespace memeff::cuda
