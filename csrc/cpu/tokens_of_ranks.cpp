// CpuTokens of a sharded vocabulary: what a rank says of its tokens, and what follows from what all ranks
// have said.
//
//   lse = log sum_r exp lse_r        entropy = sum_r p_r (entropy_r - log p_r), p_r = exp(lse_r - lse)
//
// Sums go through the ranks in order, so that every rank gets the same bits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/tokens.h"

namespace memeff {
namespace {

constexpr int64_t kTokenGrain = 16;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

template <class T>
SharedNumbers CpuTokens<T>::shared_numbers(Shared what, Range tokens) {
  SharedNumbers numbers{own_numbers_, all_numbers_, 0};
  const RankNumbers& places = rank_numbers_;
  if (what == Shared::kTotals) {
    if (problem_.class_weight == nullptr) return numbers;
    own_numbers_[0] = class_weight_total_;
    own_numbers_[1] = target_weight_total_;
    numbers.count = 2;
    return numbers;
  }
  const int64_t size = tokens.size(), targets = problem_.targets;
  numbers.count = places.count * size;
  const auto say = [&](int64_t place, const auto& value_of) {
    for (int64_t i = 0; place >= 0 && i < size; ++i)
      own_numbers_[place * size + i] = value_of(tokens.begin + i);
  };
  say(places.target_weight, [&](int64_t token) {
    if (problem_.probabilities != nullptr) return target_mass_[token];
    const int64_t y = target_[token];
    return is_here(y) ? static_cast<double>(class_weight_[y]) : 0.0;
  });
  if (what == Shared::kTargetWeights) return numbers;
  say(places.lse, [&](int64_t token) { return lse_[token]; });
  say(places.smooth, [&](int64_t token) { return smooth_[token]; });
  say(places.entropy, [&](int64_t token) { return entropy_[token]; });
  say(places.maximum, [&](int64_t token) { return maximum_[token]; });
  say(places.argmax,
      [&](int64_t token) { return static_cast<double>(argmax_[token] + first_class(problem_)); });
  say(places.target_plain, [&](int64_t token) { return target_plain_[token]; });
  for (int64_t k = 0; places.target_logit >= 0 && k < targets; ++k) {
    say(places.target_logit + k, [&](int64_t token) {
      const bool known = problem_.probabilities != nullptr || is_here(target_[token * targets + k]);
      return known ? target_logit(token, k) : 0.0;
    });
  }
  if (places.top < 0) return numbers;
  const int64_t top = statistics_->top;
  const T* scores = static_cast<const T*>(statistics_->top_logprobs);
  for (int64_t j = 0; j < top; ++j) {
    const bool filled = j < problem_.vocab;
    say(places.top + j, [&](int64_t token) {
      return filled ? static_cast<double>(scores[rows_[token] * top + j]) : 0.0;
    });
    say(places.top + top + j, [&](int64_t token) {
      const int64_t id = statistics_->top_ids[rows_[token] * top + j];
      return filled ? static_cast<double>(id + first_class(problem_)) : -1.0;
    });
  }
  return numbers;
}

template <class T>
void CpuTokens<T>::merge_ranks(Shared what, Range tokens) {
  if (what == Shared::kTotals) return merge_totals();
  parallel_for(tokens.size(), kTokenGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = tokens.begin + i;
      if (rank_numbers_.target_weight >= 0) {
        double sum = 0;
        for (int64_t rank = 0; rank < problem_.shard->ranks; ++rank)
          sum += said(rank, rank_numbers_.target_weight, tokens, i);
        target_mass_[token] = sum;
      }
      if (what == Shared::kStatistics) merge_token_of_ranks(tokens, i);
      set_coefficients(token);
    }
  });
}

template <class T>
void CpuTokens<T>::merge_totals() {
  class_weight_total_ = 0;
  double target_weights = 0;
  for (int64_t rank = 0; rank < problem_.shard->ranks; ++rank) {
    class_weight_total_ += all_numbers_[2 * rank];
    target_weights += all_numbers_[2 * rank + 1];
  }
  // With probability targets every token counts as 1, on every rank.
  if (problem_.target != nullptr) target_weight_total_ = target_weights;
  set_denominators();
}

template <class T>
void CpuTokens<T>::merge_token_of_ranks(Range tokens, int64_t i) {
  const RankNumbers& places = rank_numbers_;
  const int64_t token = tokens.begin + i, ranks = problem_.shard->ranks;
  const auto sum_of = [&](int64_t place) {
    double sum = 0;
    for (int64_t rank = 0; rank < ranks; ++rank) sum += said(rank, place, tokens, i);
    return sum;
  };
  const auto lse_of = [&](int64_t rank) { return said(rank, places.lse, tokens, i); };

  // Infinite and NaN logits end as they do in one process (CpuTokens::merge).
  double largest = -kInfinity;
  bool nan = false;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    nan = nan || std::isnan(lse_of(rank));
    largest = std::max(largest, lse_of(rank));
  }
  double lse = nan ? std::nan("") : largest;
  if (std::isfinite(lse)) {
    double sum = 0;
    for (int64_t rank = 0; rank < ranks; ++rank) sum += std::exp(lse_of(rank) - largest);
    lse = largest + std::log(sum);
  }
  lse_[token] = lse;

  if (places.entropy >= 0) {
    double entropy = std::isfinite(lse) ? 0 : std::nan("");
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const double log_share = lse_of(rank) - lse, share = std::exp(log_share);
      if (share > 0) entropy += share * (said(rank, places.entropy, tokens, i) - log_share);
    }
    entropy_[token] = entropy;
  }
  if (places.maximum >= 0) {
    double maximum = -kInfinity, argmax = 0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const double value = said(rank, places.maximum, tokens, i);
      const double id = places.argmax >= 0 ? said(rank, places.argmax, tokens, i) : 0;
      // The first class wins among equal ones, whatever the order of the shards.
      const bool earlier = value == maximum && maximum > -kInfinity && id < argmax;
      if (value > maximum || earlier) maximum = value, argmax = id;
    }
    maximum_[token] = nan ? lse : maximum;
    argmax_[token] = static_cast<int64_t>(argmax);
  }
  if (places.smooth >= 0) smooth_[token] = sum_of(places.smooth);
  if (places.target_plain >= 0) target_plain_[token] = sum_of(places.target_plain);
  // A class index is known to one rank, and the others say 0; of probabilities each knows a part.
  for (int64_t k = 0; places.target_logit >= 0 && k < problem_.targets; ++k)
    target_logit_[token * problem_.targets + k] = sum_of(places.target_logit + k);
  if (places.top >= 0) merge_top_of_ranks(tokens, i);
}

template <class T>
void CpuTokens<T>::merge_top_of_ranks(Range tokens, int64_t i) {
  const int64_t top = statistics_->top, row = rows_[tokens.begin + i];
  T* scores = static_cast<T*>(statistics_->top_logprobs) + row * top;
  int64_t* ids = statistics_->top_ids + row * top;
  int64_t filled = 0;
  for (int64_t rank = 0; rank < problem_.shard->ranks; ++rank) {
    for (int64_t j = 0; j < top; ++j) {
      const T score = static_cast<T>(said(rank, rank_numbers_.top + j, tokens, i));
      const auto id = static_cast<int64_t>(said(rank, rank_numbers_.top + top + j, tokens, i));
      const auto comes_before = [&](int64_t place) {
        return score > scores[place] || (score == scores[place] && id < ids[place]);
      };
      if (id < 0) continue;
      if (filled == top && !comes_before(top - 1)) continue;
      int64_t place = filled < top ? filled++ : top - 1;
      for (; place > 0 && comes_before(place - 1); --place) {
        scores[place] = scores[place - 1];
        ids[place] = ids[place - 1];
      }
      scores[place] = score;
      ids[place] = id;
    }
  }
}

// tokens.cpp instantiates the members that it defines.
template SharedNumbers CpuTokens<float>::shared_numbers(Shared, Range);
template SharedNumbers CpuTokens<double>::shared_numbers(Shared, Range);
template void CpuTokens<float>::merge_ranks(Shared, Range);
template void CpuTokens<double>::merge_ranks(Shared, Range);
template void CpuTokens<float>::merge_totals();
template void CpuTokens<double>::merge_totals();
template void CpuTokens<float>::merge_token_of_ranks(Range, int64_t);
template void CpuTokens<double>::merge_token_of_ranks(Range, int64_t);
template void CpuTokens<float>::merge_top_of_ranks(Range, int64_t);
template void CpuTokens<double>::merge_top_of_ranks(Range, int64_t);

}  // namespace memeff
