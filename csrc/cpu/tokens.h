// All that is known of the tokens of a call on the CPU: which take part, their statistics, the
// coefficients of their gradients, the loss. No matrices.
//
// Per-token numbers are kept in fp64: there are few of them, and target probabilities near 1 then lose
// nothing when 1 is subtracted.
#pragma once

#include <cmath>
#include <vector>

#include "core/problem.h"
#include "core/rank_numbers.h"
#include "cpu/column_kernels.h"
#include "cpu/cpu_context.h"
#include "cpu/layout.h"
#include "driver/backend.h"

namespace memeff {

/// Per-tile partial sums of scores. Where a problem does not want one, it has no room.
enum Partial { kMaximum, kSum, kSmooth, kWeighted, kArgmax, kTargetDot, kTargetMass, kTargetPlain };
constexpr int kPartials = 8;

/// Tokens are numbered by their place among those that take part, rows() has
/// their rows of the input.
template <class T>
class CpuTokens {
 public:
  CpuTokens(const CpuContext& context, const CpuLayout& layout);

  // ---- the steps of a call, as in driver/backend.h ----

  int64_t select();
  void merge(Range tokens);
  void differentiate(Range tokens);
  void restore();
  void write_loss();
  SharedNumbers shared_numbers(Shared what, Range tokens);
  void merge_ranks(Shared what, Range tokens);

  // ---- what the products' backends read and fill ----

  int64_t count() const { return count_; }
  const int64_t* rows() const { return rows_; }
  bool contiguous_rows(Range tokens) const;
  /// The target of a token that is class probabilities: that of class v.
  double probability(int64_t token, int64_t v) const;

  /// Per-tile partial sums, [tiles, token_block] each; null: not requested.
  T* partial(Partial which, int64_t tile) const;
  TilePartials<T> tile_partials(int64_t tile, int64_t token) const;
  /// z_y of the token's k-th target; with class probabilities sum_v w_v q_v z_v.
  double target_logit(int64_t token, int64_t k) const {
    return target_logit_[token * problem_.targets + k];
  }
  /// Sets it from what a block of scores keeps of it.
  void set_target_logit(int64_t token, int64_t k, T kept) {
    const int64_t at = token * problem_.targets + k;
    const T softcap = static_cast<T>(problem_.softcap);
    target_logit_[at] = score_of(kept, softcap) * scale_of(token);
    target_slope_[at] = softcap > 0 ? cap_slope(kept) : 1;
  }
  /// Calls body(row of the class, position of the token, which of its targets) for the targets that lie
  /// in `classes`; a class that is several targets of a token counts as the first of them.
  template <class Body>
  void for_each_target(Range classes, Range tokens, const Body& body) const {
    const int64_t targets = problem_.targets;
    for (int64_t i = 0; i < tokens.size(); ++i) {
      for (int64_t k = 0; k < targets; ++k) {
        const int64_t y = target_[(tokens.begin + i) * targets + k];
        if (y >= classes.begin && y < classes.end) body(y - classes.begin, i, k);
      }
    }
  }
  /// [from `token` on] 1 / temperature of each, which multiplies finished scores; or null: 1.
  const T* token_scale(int64_t token) const {
    return token_scale_.empty() ? nullptr : token_scale_.data() + token;
  }
  bool wants_top() const { return statistics_ != nullptr && statistics_->top > 0; }
  /// Merges finished scores [classes, tokens] into the tokens' largest ones.
  void update_top(const T* z, int64_t stride, Range classes, Range tokens);

  /// Coefficients of a block's tokens as the kernels read them: dlogits before the target's term is
  /// exp(z - shift) (scale_p + scale_entropy (z - shift)) - scale_w w.
  struct Coefficients {
    std::vector<T> shift, scale_p, scale_p_rest, scale_entropy, scale_target, scale_w;
  };
  const Coefficients& coefficients(Range tokens);
  const Coefficients& current_coefficients() const { return coefficients_; }
  bool has_entropy_gradient() const {
    return statistics_ != nullptr && statistics_->grad_entropy != nullptr;
  }
  /// Value of the gradient of the token's k-th target: exact where the softmax is close to 1.
  double target_gradient(int64_t token, int64_t k) const;
  /// Coefficients scale_w, or null where all of them are 0.
  const T* scale_w(const Coefficients& values) const {
    return reaches_all_classes(problem_) ? values.scale_w.data() : nullptr;
  }
  const T* class_weight(int64_t first_class) const {
    return class_weight_ == nullptr ? nullptr : class_weight_ + first_class;
  }
  /// Factor of all gradients of 16-bit inputs, applied to their sums. Folded into dlogits it would be
  /// rounded there, the same way for every token: an error that does not average out.
  double output_scale() const { return output_scale_; }

 private:
  bool takes_part(int64_t n) const;
  bool is_sharded() const { return problem_.shard != nullptr; }
  /// With one class its probability is 1 and no gradient flows through it. A score that is computed again
  /// may have other last bits than the one that lse comes from, and the two would not cancel.
  bool is_certain(int64_t token) const {
    return total_vocab(problem_) == 1 && std::isfinite(lse_[token]);
  }
  /// Whether class y of this rank's numbering is in its shard.
  bool is_here(int64_t y) const { return y >= 0 && y < problem_.vocab; }
  void set_denominators();
  void merge_totals();
  void merge_token_of_ranks(Range tokens, int64_t i);
  void merge_top_of_ranks(Range tokens, int64_t i);
  /// What a rank has said of a token of the block.
  double said(int64_t rank, int64_t number, Range tokens, int64_t i) const {
    return all_numbers_[(rank * rank_numbers_.count + number) * tokens.size() + i];
  }
  void list_token(int64_t n);
  void set_coefficients(int64_t token);
  void set_statistics_coefficients(int64_t token);
  T scale_of(int64_t token) const { return token_scale_.empty() ? T(1) : *token_scale(token); }
  /// What the coefficients of token statistics have of the derivative of the scores.
  double statistics_scale(int64_t token) const;
  void clear_token_statistics();
  void write_token_statistics(Range tokens);
  double token_loss(int64_t token, double* z_term) const;

  const Problem& problem_;
  const TokenStatistics* const statistics_;  // or null
  const bool statistics_known_;              // the backward op
  const int64_t token_block_, tiles_;
  T* const partials_;
  int partial_offset_[kPartials];
  const RankNumbers rank_numbers_;
  double* const own_numbers_;
  double* const all_numbers_;

  int64_t count_ = 0;
  int64_t* rows_;
  // [targets] class indices, counted from this rank's first class and anything outside of its shard for
  // those of other ranks and for none (left out, probabilities, seen before)
  int64_t* target_;
  double* lse_;
  double* target_logit_;  // [targets]
  double* target_slope_;  // [targets] derivative of the soft cap there
  double* target_plain_;  // z_y, or sum_v q_v z_v
  double* target_mass_;   // w_y, or sum_v w_v q_v
  double* smooth_;        // sum_v w_v z_v
  double* entropy_;
  double* maximum_;
  int64_t* argmax_;
  double* scale_p_;        // coefficient of p = exp(z - lse) in dlogits
  double* scale_entropy_;  // coefficient of p log p
  double* scale_target_;   // coefficient of the target
  double* scale_w_;        // coefficient of the class weights

  std::vector<T> token_scale_;
  T* class_weight_ = nullptr;
  double class_weight_total_ = 0;
  double target_weight_total_ = 0;  // of the tokens that take part
  double denominator_ = 1;          // of the cross entropy terms
  double z_denominator_ = 1;        // of the z-loss
  double output_scale_ = 1;
  Range cached_ = {-1, -1};
  Coefficients coefficients_;
};

extern template class CpuTokens<float>;
extern template class CpuTokens<double>;

}  // namespace memeff
