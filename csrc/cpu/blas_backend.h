// CPU backend over general matrix products (MKL, oneDNN through torch), for every dtype.
//
// Scores are kept as T: float, or double for fp64. 16-bit hidden states and classifier rows are upcast
// block by block, so that every product has fp32 inputs and sums: no score is ever rounded to 16 bits.
//
// The bits of a BLAS's product depend on its shape. Where those of a token's statistics must not
// (MEMEFF_CPU_KERNELS=batch_invariant), ColumnKernels::multiply computes the scores.
#pragma once

#include "cpu/cpu_backend.h"

namespace memeff {

template <class T>
class BlasBackend final : public CpuBackend<T> {
 public:
  using CpuBackend<T>::CpuBackend;

  void scores(Range tokens, const ScoreBlock* block) override;
  void fresh_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) override;
  void to_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) override;
  void add_grad_input(Range classes, Range tokens, const ScoreBlock& block, bool first) override;
  void grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first, bool last,
                   WeightUpdate update) override;
  ScoreBlock part(const ScoreBlock& block, int64_t classes, int64_t tokens) const override;

 private:
  /// With fewer rows, for each thread, BLAS libraries add up all terms one after the other (MKL: a sum of
  /// 3584 for 3 rows errs four times as much as one for 8), and slowly: ColumnKernels::multiply computes
  /// such products.
  int64_t enough_tokens() const;
  /// Columns of a BLAS's product that computes scores; 0: ColumnKernels::multiply does. Scores that are
  /// made again for a gradient must have the bits of those that lse comes from: where p is close to 1
  /// other ones leave more of the gradient than there is. Products with enough rows and columns have
  /// them, whatever else is in them (MKL: 4 rows and 12 columns), so that few tokens at the end of many are
  /// padded. With fewer than 12 rows, too, MKL adds up one after the other (test_scores_of_few_classes).
  /// `kept`: the scores are not made again, and there is no room.
  int64_t product_columns(Range tokens, bool kept) const;
  static constexpr int64_t kEnoughClasses = 12;
  void compute_scores(Range classes, Range tokens, const ScoreBlock* block, bool statistics);
  /// Rows of a matrix as T, in place when they are already.
  struct Rows {
    const T* data;
    int64_t stride;
  };
  /// `padding`: rows of zeros after those of the tokens.
  Rows input_rows(Range tokens, int64_t workspace_offset, int64_t padding = 0);
  /// Hidden states in panels [features, kPanel] of kPanel tokens, in place of input_rows().
  const T* input_panels(Range tokens);
  void multiply_panels(const Rows& w, const T* panels, int64_t classes, int64_t tokens, T* z,
                       int64_t stride);
  Rows weight_rows(Range classes, int64_t workspace_offset);
  void finish_tile(T* z, int64_t stride, Range classes, Range tokens, Range columns,
                   bool statistics);
  /// Partial sums of a strip that starts `at` tokens into its block.
  void probability_partials(const T* z, int64_t stride, Range classes, Range tokens, int64_t at);
};

extern template class BlasBackend<float>;
extern template class BlasBackend<double>;

}  // namespace memeff
