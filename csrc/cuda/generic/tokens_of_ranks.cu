// A vocabulary that ranks share: what a rank says of its tokens, and what follows from what all ranks have
// said. One thread per token, numbers in fp64.
//
//   lse = log sum_r exp lse_r        entropy = sum_r p_r (entropy_r - log p_r), p_r = exp(lse_r - lse)
//
// and plain sums of the others; of equal maxima the first class wins, whatever the order of the shards.
// Sums go through the ranks in order, so that every rank gets the same bits.
//
// A class index is the class of one rank; the others give NaN for its logit. Nobody compares the targets
// of ranks on GPUs: where none of them or several know a token's class, they have other targets, as ranks
// of FSDP would, and the result is NaN.
#include <cmath>

#include "core/math.h"
#include "cuda/common/device.cuh"
#include "cuda/tokens.h"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 256;

template <class A>
__global__ void __launch_bounds__(kThreads)
    say_tokens_kernel(Problem problem, TokenArrays tokens, RankNumbers places, int64_t begin,
                      int64_t end, double* own) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = end - begin;
  if (i >= size) return;
  const int64_t token = begin + i;
  const auto say = [&](int64_t place, double value) { own[place * size + i] = value; };
  if (places.target_weight >= 0) {
    // An index target's weight, 0 where its class is another rank's; NaN on all if it is no class.
    say(places.target_weight, tokens.target_mass[token]);
  }
  if (places.lse >= 0) say(places.lse, tokens.lse[token]);
  if (places.smooth >= 0) say(places.smooth, tokens.smooth[token]);
  if (places.entropy >= 0) say(places.entropy, tokens.entropy[token]);
  if (places.maximum >= 0) say(places.maximum, tokens.maximum[token]);
  if (places.argmax >= 0)
    say(places.argmax, static_cast<double>(tokens.argmax[token] + tokens.first_class));
  if (places.target_plain >= 0) say(places.target_plain, tokens.target_plain[token]);
  if (places.target_logit >= 0) {
    if (problem.probabilities != nullptr)
      say(places.target_logit, tokens.target_dot[token]);
    else if (tokens.target[token] == kElsewhere)
      say(places.target_logit, NAN);
    else
      say(places.target_logit, static_cast<const A*>(tokens.target_logit)[token]);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    merge_ranks_kernel(Problem problem, TokenArrays tokens, RankNumbers places, int64_t begin,
                       int64_t end, const double* all, int64_t ranks) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = end - begin;
  if (i >= size) return;
  const int64_t token = begin + i;
  const auto said = [&](int64_t rank, int64_t place) {
    return all[(rank * places.count + place) * size + i];
  };
  const auto sum_of = [&](int64_t place) {
    double sum = 0.0;
    for (int64_t rank = 0; rank < ranks; ++rank) sum += said(rank, place);
    return sum;
  };
  if (places.target_weight >= 0) tokens.target_mass[token] = sum_of(places.target_weight);
  if (places.lse < 0) return;

  // Infinite and NaN logits end as they do in one process.
  double largest = -INFINITY, sum = 0.0;
  bool nan = false;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const double lse = said(rank, places.lse);
    nan = nan || lse != lse;
    largest = fmax(largest, lse);
  }
  double lse = nan ? NAN : largest;
  if (isfinite(lse)) {
    for (int64_t rank = 0; rank < ranks; ++rank) sum += exp(said(rank, places.lse) - largest);
    lse = largest + log(sum);
  }
  tokens.lse[token] = lse;

  if (places.entropy >= 0) {
    double entropy = isfinite(lse) ? 0.0 : NAN;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const double log_share = said(rank, places.lse) - lse, share = exp(log_share);
      if (share > 0.0) entropy += share * (said(rank, places.entropy) - log_share);
    }
    tokens.entropy[token] = entropy;
  }
  if (places.maximum >= 0) {
    double maximum = -INFINITY, argmax = 0.0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const double value = said(rank, places.maximum);
      const double id = places.argmax >= 0 ? said(rank, places.argmax) : 0.0;
      const bool earlier = value == maximum && maximum > -INFINITY && id < argmax;
      if (value > maximum || earlier) maximum = value, argmax = id;
    }
    tokens.maximum[token] = nan ? lse : maximum;
    if (tokens.argmax != nullptr) tokens.argmax[token] = static_cast<int64_t>(argmax);
  }
  if (places.smooth >= 0) tokens.smooth[token] = sum_of(places.smooth);
  if (places.target_plain >= 0) tokens.target_plain[token] = sum_of(places.target_plain);
  if (places.target_logit >= 0) {
    if (problem.probabilities != nullptr) {
      tokens.target_dot[token] = sum_of(places.target_logit);
      return;
    }
    double logit = 0.0;
    int64_t known = 0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const double value = said(rank, places.target_logit);
      if (value == value) logit += value, ++known;
    }
    // A token without a target is that on every rank.
    if (known != (tokens.target[token] == kNoTarget ? ranks : 1)) logit = NAN;
    static_cast<A*>(tokens.target_logit)[token] = static_cast<A>(logit);
  }
}

unsigned blocks_of(int64_t tokens) { return static_cast<unsigned>(ceil_div(tokens, kThreads)); }

}  // namespace

Status say_tokens(const Problem& problem, const TokenArrays& tokens, const RankNumbers& places,
                  int64_t begin, int64_t end, double* own, void* stream) {
  if (begin == end) return {};
  const auto say = in_double(problem) ? say_tokens_kernel<double> : say_tokens_kernel<float>;
  MEMEFF_LAUNCH(say, dim3(blocks_of(end - begin)), dim3(kThreads), 0, stream, problem, tokens,
                places, begin, end, own);
  return launch_status();
}

Status merge_ranks(const Problem& problem, const TokenArrays& tokens, const RankNumbers& places,
                   int64_t begin, int64_t end, const double* all, int64_t ranks, void* stream) {
  if (begin == end) return {};
  const auto merge = in_double(problem) ? merge_ranks_kernel<double> : merge_ranks_kernel<float>;
  MEMEFF_LAUNCH(merge, dim3(blocks_of(end - begin)), dim3(kThreads), 0, stream, problem, tokens,
                places, begin, end, all, ranks);
  const Status status = launch_status();
  if (!status.ok() || tokens.for_statistics) return status;
  return set_coefficients(problem, tokens, begin, end, stream);
}

}  // namespace memeff::cuda
