// What both CPU backends share: the list of tokens, per-token statistics and coefficients, the loss,
// and the rounding of sums into gradients. The backends add the matrix products.
//
//   BlasBackend<T>   any dtype: products by torch (MKL, oneDNN), scores kept as T
//   Bf16Backend      bf16 on AVX512-BF16: handwritten products, scores kept in 16 bits
//
// Per-token numbers are kept in fp64: there are few of them, and target probabilities near 1 then lose
// nothing when 1 is subtracted.
#pragma once

#include <memory>
#include <vector>

#include "core/planner.h"
#include "core/problem.h"
#include "cpu/column_kernels.h"
#include "driver/backend.h"

namespace memeff {

/// Work that the caller wants besides the problem itself.
struct CpuContext {
  const Problem* problem;
  const PlanRequest* request;
  const Plan* plan;
  char* workspace;  // layout_workspace(request, plan).total bytes
};

template <class T>
class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const CpuContext& context);

  int64_t select_tokens() override;
  void merge_statistics(Range tokens) override;
  void differentiate_statistics(Range tokens) override;
  void restore_statistics() override;
  void write_loss() override;
  void finish_grad_input(Range tokens) override;
  void finish_gradients() override;
  ScoreBlock block_in_gradient() override;
  ScoreBlock block_in_workspace() override;
  ScoreBlock slice_block() override;

 protected:
  enum Partial {
    kMaximum,
    kSum,
    kSmooth,
    kWeighted,
    kArgmax,
    kTargetDot,
    kTargetMass,
    kTargetPlain
  };
  static constexpr int kPartials = 8;

  /// Per-tile partial sums, [tiles, token_block] each; null when not wanted.
  T* partial(Partial which, int64_t tile) const;
  TilePartials<T> tile_partials(int64_t tile, int64_t token) const;
  /// Coefficients of a block's tokens as the kernels read them: dlogits before the target's term is
  /// exp(z - shift) (scale_p + scale_entropy (z - shift)) - scale_w w.
  struct Coefficients {
    std::vector<T> shift, scale_p, scale_p_rest, scale_entropy, scale_target, scale_w;
  };
  const Coefficients& coefficients(Range tokens);
  const Coefficients& current_coefficients() const { return coefficients_; }
  const T* class_weight(int64_t first_class) const {
    return class_weight_ == nullptr ? nullptr : class_weight_ + first_class;
  }
  /// Value of the gradient of the token's k-th target: exact where the softmax is close to 1.
  double target_gradient(int64_t token, int64_t k) const;
  double* target_logit(int64_t token, int64_t k) const {
    return target_logit_ + token * problem_.targets + k;
  }
  bool has_entropy_gradient() const {
    return statistics_ != nullptr && statistics_->grad_entropy != nullptr;
  }
  bool wants_top() const { return statistics_ != nullptr && statistics_->top > 0; }
  /// Merges finished scores [classes, tokens] into the tokens' largest ones.
  void update_top(const T* z, int64_t stride, Range classes, Range tokens);
  T* bias_sum() const { return bias_sum_; }
  bool contiguous_rows(Range tokens) const;
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

  template <class U>
  U* at(int64_t offset) const {
    return reinterpret_cast<U*>(context_.workspace + offset);
  }
  /// Sums of grad_input for tokens.begin on: the gradient itself when it has full precision.
  T* input_sum(Range tokens) const;
  int64_t input_sum_stride() const;
  T* weight_sum() const { return at<T>(layout_.weight_step.sum); }
  /// Rounds the sums of a slice into its rows of grad_weight.
  void update_grad_weight(Range classes, WeightUpdate update);
  double output_scale() const { return output_scale_; }

  const CpuContext context_;
  const Problem& problem_;
  const TokenStatistics* const statistics_;  // or null
  const Plan& plan_;
  const WorkspaceLayout layout_;
  int64_t tiles_;

  // Per processed token.
  int64_t count_ = 0;
  int64_t* rows_;    // row of the input
  int64_t* target_;  // [targets] class indices, -1: none (left out, probabilities, seen before)
  double* lse_;
  double* target_logit_;  // [targets] z_y, or sum_v w_v q_v z_v
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

 private:
  bool is_ignored(int64_t token) const;
  bool takes_part(int64_t n) const;
  void list_token(int64_t n);
  void set_coefficients(int64_t token);
  void set_statistics_coefficients(int64_t token);
  void clear_token_statistics();
  void write_token_statistics(Range tokens);
  double token_loss(int64_t token, double* z_term) const;
  double upstream(int64_t token) const;

  T* class_weight_ = nullptr;
  T* bias_sum_ = nullptr;
  int partial_offset_[kPartials];
  double class_weight_total_ = 0;
  double denominator_ = 1;    // of the cross entropy terms
  double z_denominator_ = 1;  // of the z-loss
  // Factor of all gradients of 16-bit inputs, applied to their sums. Folded into dlogits it would be
  // rounded there, the same way for every token: an error that does not average out.
  double output_scale_ = 1;
  bool sums_of_all_tokens_ = false;
  Range cached_ = {-1, -1};
  Coefficients coefficients_;
};

extern template class CpuBackend<float>;
extern template class CpuBackend<double>;

/// The backend for the problem's dtype on this machine.
std::unique_ptr<Backend> make_cpu_backend(const CpuContext& context);
/// Completes a request by what depends on the problem's options, this machine and its threads. Of the
/// problem's pointers it matters only which are null.
void complete_request(const Problem& problem, PlanRequest* request);

}  // namespace memeff
