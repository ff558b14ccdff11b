// CPU backend for bf16: handwritten products (bf16_kernels.h) with the softmax statistics in the
// epilogue of the first one.
//
// Scores are kept as fp16 exp(z - max of tile and token), 2^-11 relative error, and turned into bf16
// dlogits in place, so grad_weight's rows have room for the scores of D tokens.
#pragma once

#include "cpu/bf16_kernels.h"
#include "cpu/cpu_backend.h"

namespace memeff {

class Bf16Backend final : public CpuBackend<float> {
 public:
  Bf16Backend(const CpuContext& context, const Bf16Kernels& kernels);

  void scores(Range tokens, const ScoreBlock* block) override;
  void fresh_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) override;
  void to_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) override;
  void add_grad_input(Range classes, Range tokens, const ScoreBlock& block, bool first) override;
  void grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first, bool last,
                   WeightUpdate update) override;
  ScoreBlock part(const ScoreBlock& block, int64_t classes, int64_t tokens) const override;

 private:
  enum class Packing { kAlongFeatures, kAlongTokens };
  /// Hidden states of a block, packed unless they still are.
  const uint16_t* pack_input(Range tokens, Packing packing);
  /// Steps of token chunks share memory: what one packs, the next overwrites.
  void forget_packed() {
    packed_along_features_ = packed_along_tokens_ = packed_classes_ = {-1, -1};
  }
  enum class ScoreUse { kStatistics, kKeep, kGradient };
  void compute_scores(Range classes, Range tokens, const ScoreBlock* block, ScoreUse use);
  /// One tile of scores, of tokens that start `column` tokens into their block.
  void score_task(Range classes, Range tokens, int64_t column, const uint16_t* panels,
                  const ScoreBlock* block, ScoreUse use, float* scratch);
  /// Gradients of classes of one tile for tokens that start `column` tokens into their block.
  void gradient_task(Range classes, Range tokens, int64_t column, const ScoreBlock& block,
                     float* factors, bool add_bias);
  void update_rows(const Product& product, int64_t row, int64_t column, WeightUpdate update);
  template <class U>
  U* scratch(int thread) const {
    return at<U>(layout_.thread_scratch + thread * thread_scratch_bytes(*context_.request, plan_));
  }

  const Bf16Kernels kernels_;
  const uint16_t* const input_;
  const uint16_t* const weight_;
  Range packed_along_features_ = {-1, -1};
  Range packed_along_tokens_ = {-1, -1};
  Range packed_classes_ = {-1, -1};
};

}  // namespace memeff
