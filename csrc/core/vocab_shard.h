// A vocabulary that the ranks of a process group share: each has the rows of some consecutive classes.
//
// Every rank sees all tokens. What a rank knows of a token from its own classes (log-sum-exp, the target's
// logit if the target is among them, ...) the ranks exchange before they need the coefficients of the
// token's gradients; grad_input is the sum of what all ranks contribute, grad_weight and grad_bias are
// a rank's own.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace memeff {

/// The ranks that share a vocabulary. All of them call the same functions in the same order.
class RankGroup {
 public:
  virtual ~RankGroup() = default;
  /// Writes what each rank gives as `own`, `count` numbers, to `all`: [ranks, count].
  virtual void all_gather(const double* own, double* all, int64_t count) = 0;
  /// Begins to sum over the ranks, in place; all ranks get the same bits. Until finish_all_reduce() the
  /// numbers are the group's, and others may be computed. On a GPU both return at once: they order what
  /// the device's current stream does.
  virtual void start_all_reduce(void* sums, DType dtype, int64_t count) = 0;
  virtual void finish_all_reduce() = 0;
};

struct VocabShard {
  RankGroup* group = nullptr;
  int64_t ranks = 1;
  int64_t start = 0;                // this rank's classes are [start, start + Problem::vocab)
  int64_t vocab = 0;                // classes of all ranks
  bool reduce_input_grad = true;    // otherwise grad_input is this rank's contribution
  bool reduce_in_bfloat16 = false;  // contributions in fp32 are rounded before they are summed
};

}  // namespace memeff
