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
  /// Whether a BLAS would be at its worst with them: ColumnKernels::multiply computes such products.
  bool are_few(Range tokens) const;
  void compute_scores(Range classes, Range tokens, const ScoreBlock* block, bool statistics);
  /// Rows of a matrix as T, in place when they are already.
  struct Rows {
    const T* data;
    int64_t stride;
  };
  Rows input_rows(Range tokens, int64_t workspace_offset);
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
