// What the planners of all devices share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/math.h"
#include "core/plan.h"
#include "core/problem.h"

namespace memeff {

inline bool wants_gradient(const PlanOptions& r) {
  return r.grad_input || r.grad_weight || r.grad_bias;
}

/// What the planner must know of a problem; of one whose vocabulary ranks share, not yet all.
PlanRequest plan_request(const Problem& problem, const PlanOptions& options);

/// FLOPs of one matrix product: 2 N D V.
inline double product_flops(const PlanRequest& r) {
  return 2.0 * static_cast<double>(r.tokens) * static_cast<double>(r.features) *
         static_cast<double>(r.vocab);
}

/// Tokens whose scores fit a row of grad_weight. None if a row is no whole number of scores (odd D): the
/// rows of scores and of gradients must coincide.
inline int64_t tokens_in_gradient_row(const PlanRequest& r, int64_t score_bytes) {
  const int64_t bytes = r.features * size_of(r.dtype);
  return bytes % score_bytes == 0 ? bytes / score_bytes : 0;
}

/// Tokens of the chunk whose scores lie in grad_weight.
int64_t first_chunk(const PlanRequest& request, int64_t score_bytes);

/// The largest size in [least, most], `least` or a multiple of `step` where it is not `most`, that fits;
/// 0: none does. What fits, fits when it is smaller.
template <class Fits>
int64_t largest_fitting(int64_t least, int64_t most, int64_t step, const Fits& fits) {
  if (most < least || !fits(least)) return 0;
  int64_t low = least, high = most;
  while (low < high) {
    const int64_t middle = std::min(high, round_up(low + (high - low + 1) / 2, step));
    if (fits(middle)) {
      low = middle;
    } else {
      high = std::max(least, std::min(high - 1, (middle - 1) / step * step));
    }
  }
  return low;
}

/// Part of a workspace.
struct Area {
  int64_t begin = 0, end = 0;  // bytes
};

/// Hands out offsets in a workspace.
class Cursor {
 public:
  /// `areas`, if given, gets everything that is handed out, at its exact size.
  explicit Cursor(int64_t alignment, std::vector<Area>* areas = nullptr)
      : alignment_(alignment), areas_(areas) {}
  int64_t take(int64_t bytes) {
    const int64_t at = offset_;
    if (areas_ != nullptr && bytes > 0) areas_->push_back({at, at + bytes});
    offset_ += round_up(bytes, alignment_);
    end_ = std::max(end_, offset_);
    return at;
  }
  int64_t offset() const { return offset_; }
  int64_t end() const { return end_; }
  /// What is taken next shares memory with what was taken from `offset` on.
  void move_to(int64_t offset) { offset_ = offset; }

 private:
  const int64_t alignment_;
  std::vector<Area>* const areas_;
  int64_t offset_ = 0, end_ = 0;
};

/// In order, those that overlap as one: what lies between them belongs to nothing.
std::vector<Area> united(std::vector<Area> areas);

/// Completes a plan by its FLOPs, bytes of the gradients, and numbers of chunks and slices.
/// `fresh_tokens`: those whose gradients are computed from scores that are made for them.
void count_work(const PlanRequest& request, int64_t fresh_tokens, Plan* plan);

/// Why no plan fits the budget, the smallest of which has these bytes. `where`: " on a GPU", or nothing.
std::string budget_error(const PlanRequest& request, const char* where, const Plan& smallest);

/// Collects what is wrong with the operators of one call, which share a memory budget, and reports the
/// one that needs most: the minimum that it names is enough for all of them.
class Objections {
 public:
  /// `plan` is that of the operator, or where there is an objection the smallest one.
  void add(const std::string& objection, const Plan& plan) {
    const int64_t bytes = plan.workspace_bytes + plan.library_bytes;
    if (objection.empty() || (!worst_.empty() && bytes <= bytes_)) return;
    worst_ = objection;
    bytes_ = bytes;
  }
  const std::string& worst() const { return worst_; }

 private:
  std::string worst_;
  int64_t bytes_ = 0;
};

}  // namespace memeff
