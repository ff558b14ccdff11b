// Which numbers of a token the ranks of a sharded vocabulary exchange, and in which order.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace memeff {

/// Places of a token's numbers; -1: not exchanged. The ranks give [count, tokens of a block] each.
struct RankNumbers {
  int64_t lse = -1, smooth = -1, entropy = -1, maximum = -1, argmax = -1;
  int64_t target_weight = -1;  // w_y, or sum_v w_v q_v
  int64_t target_plain = -1;   // of class probabilities q: sum_v q_v z_v
  int64_t target_logit = -1;   // z_y, of each target; or sum_v w_v q_v z_v
  int64_t top = -1;            // scores of the largest ones, then their classes
  int64_t count = 0;
};

/// `statistics_known`: for the backward operator.
inline RankNumbers rank_numbers(const Problem& p, bool statistics_known) {
  RankNumbers numbers;
  const auto take = [&](int64_t* place, bool wanted, int64_t size = 1) {
    if (!wanted || size == 0) return;
    *place = numbers.count;
    numbers.count += size;
  };
  const bool soft = p.probabilities != nullptr, loss = p.token_statistics == nullptr;
  take(&numbers.target_weight, loss && (soft || p.class_weight != nullptr));
  if (statistics_known) return numbers;
  take(&numbers.lse, true);
  take(&numbers.smooth, wants_logit_sum(p));
  take(&numbers.entropy, wants_entropy(p));
  take(&numbers.maximum, !loss || p.statistics);
  take(&numbers.argmax, wants_argmax(p));
  take(&numbers.target_plain, soft && p.statistics);
  take(&numbers.target_logit, true, p.targets);
  take(&numbers.top, !loss && p.token_statistics->top > 0, loss ? 0 : 2 * p.token_statistics->top);
  return numbers;
}

}  // namespace memeff
