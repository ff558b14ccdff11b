// What both CPU backends share: blocks of scores, and the rounding of sums into gradients. Tokens are
// CpuTokens' business (tokens.h); the backends add the matrix products.
//
//   BlasBackend<T>   any dtype: products by torch (MKL, oneDNN), scores kept as T
//   Bf16Backend      bf16: handwritten products, scores kept in 16 bits
#pragma once

#include <memory>
#include <string>

#include "core/problem.h"
#include "cpu/cpu_context.h"
#include "cpu/layout.h"
#include "cpu/tiling.h"
#include "cpu/tokens.h"
#include "driver/backend.h"

namespace memeff {

template <class T>
class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const CpuContext& context);

  int64_t select_tokens() override { return tokens_.select(); }
  void merge_statistics(Range tokens) override { tokens_.merge(tokens); }
  void differentiate_statistics(Range tokens) override { tokens_.differentiate(tokens); }
  void restore_statistics() override { tokens_.restore(); }
  SharedNumbers shared_numbers(Shared what, Range tokens) override {
    return tokens_.shared_numbers(what, tokens);
  }
  void merge_ranks(Shared what, Range tokens) override { tokens_.merge_ranks(what, tokens); }
  InputSums input_sums(Range tokens) override;
  void write_loss() override { tokens_.write_loss(); }
  void finish_grad_input(Range tokens) override;
  void finish_gradients() override;
  ScoreBlock block_in_gradient() override;
  ScoreBlock block_in_workspace() override;
  ScoreBlock slice_block(int64_t tokens) override;

 protected:
  using Coefficients = typename CpuTokens<T>::Coefficients;

  template <class U>
  U* at(int64_t offset) const {
    return reinterpret_cast<U*>(context_.workspace + offset);
  }
  /// In fp64: chunks of a few tokens add to it one after the other.
  double* bias_sum() const { return bias_sum_; }
  /// What finishes the scores of a tile. Its bias, as T, lies in `bias`.
  ScoreTransform<T> score_transform(Range classes, T (&bias)[kTileVocab]) const;
  /// Sums of grad_input for tokens.begin on: the gradient itself when it has full precision.
  T* input_sum(Range tokens) const;
  int64_t input_sum_stride() const;
  /// Whether the ranks add up sums that are rounded to bf16.
  bool rounds_sums() const {
    return std::is_same_v<T, float> && problem_.shard != nullptr &&
           problem_.shard->reduce_in_bfloat16;
  }
  void widen_sums(Range tokens);
  T* weight_sum() const { return at<T>(layout_.weight_step.sum); }
  /// Rounds the sums of a slice into its rows of grad_weight.
  void update_grad_weight(Range classes, WeightUpdate update);

  const CpuContext context_;
  const Problem& problem_;
  const Plan& plan_;
  const CpuLayout layout_;
  CpuTokens<T> tokens_;

 private:
  double* bias_sum_ = nullptr;
  bool sums_of_all_tokens_ = false;
};

extern template class CpuBackend<float>;
extern template class CpuBackend<double>;

/// The backend for the problem's dtype on this machine.
std::unique_ptr<Backend> make_cpu_backend(const CpuContext& context);
/// Completes a request by what depends on the problem's options, this machine and its threads. It
/// matters which of the problem's pointers are null, not what they point to.
///
/// The environment variable MEMEFF_CPU_KERNELS chooses what computes the products of bf16 calls whose
/// options the bf16 kernels support; all others are computed by "blas":
///   avx512_bf16     handwritten kernels; the default on processors with AVX512-BF16
///   bf16_portable   the same kernels in plain C++, slow, for tests on any processor
///   blas            torch's products of fp32 numbers; the default on other processors
/// or of all calls:
///   batch_invariant   as blas, but scores are sums in a fixed order (blas_backend.h)
/// Returns "", or what is wrong with the variable's value.
std::string complete_request(const Problem& problem, CpuPlanRequest* request);
/// What computes the products of a completed request: one of these.
std::string kernels_of(const CpuPlanRequest& request);
/// The plan of a call on this machine. Returns "", or why there is none.
std::string plan_call(const Problem& problem, const PlanRequest& request, CpuCallPlan* call);

}  // namespace memeff
