// Where everything of a call lies on the device: the offsets of the layout and the caller's tensors
// as typed pointers, block by block. Launches nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/plan.h"
#include "core/problem.h"
#include "cuda/fused_kernels.h"
#include "cuda/gemm.h"
#include "cuda/layout.h"
#include "cuda/plan.h"
#include "cuda/tokens.h"
#include "driver/backend.h"

namespace memeff::cuda {

class CallMemory {
 public:
  CallMemory(const Problem& problem, const GpuPlanRequest& request, const Plan& plan,
             const PlanTraits& traits, char* workspace);

  static constexpr int64_t kRowPadding = 8;  // elements: rows of every block start at 16 bytes

  // ---- arrays over tokens and over classes ----

  const TokenArrays& tokens() const { return tokens_; }
  Targets targets(Range tokens) const;
  /// Label smoothing that is added to the products is not among them.
  Coefficients coefficients(Range tokens) const;
  const float* weighted(Range tokens) const {
    return static_cast<const float*>(from_token(tokens_.weighted, tokens.begin));
  }
  /// z_y of index targets, of the accumulation type; null with class probabilities.
  void* target_logit(Range tokens) const;

  /// Room for bias and class weights in the accumulation type, and for the sums of grad_bias.
  void* bias() const { return place<char>(layout_.bias); }
  void* class_weight() const { return place<char>(layout_.class_weight); }
  void* bias_sum() const { return place<char>(layout_.bias_sum); }

  /// Numbers that ranks exchange: this rank's, and room for those of all. And room for sums of grad_input
  /// that are rounded to bf16.
  double* own_numbers() const { return place<double>(layout_.own_numbers); }
  double* all_numbers() const { return place<double>(layout_.all_numbers); }
  void* rounded_sums() const { return place<char>(layout_.rounded_sums); }

  /// Partial statistics of a block of tokens, one per `range` classes. The maxima of scores that are
  /// kept in 16 bits stay with their block.
  PartialStatistics partial_statistics(Range tokens, const ScoreBlock* block, int64_t range) const;
  /// The same from range `first` on.
  PartialStatistics advanced(PartialStatistics partials, int64_t first) const;

  // ---- blocks of scores and of gradients ----

  ScoreBlock block_in_gradient() const;
  ScoreBlock block_in_workspace() const;
  ScoreBlock slice_block(int64_t tokens) const;
  /// Room for the products of a slice of classes, of scores that are kept elsewhere or not at all.
  ScoreBlock product_block(int64_t tokens) const;
  /// Of the classes and tokens of a slice's gradients.
  BiasPartials bias_partials(Range tokens) const {
    return {place<float>(layout_.bias_partials), bias_partial_stride(tokens.size()),
            bias_factors(tokens)};
  }
  ScoreBlock part(const ScoreBlock& block, int64_t classes, int64_t tokens) const;

  static StoredScores stored_scores(const ScoreBlock& block) {
    return {block.data, block.stride, static_cast<float*>(block.maxima), block.maxima_stride};
  }
  /// Elements between rows of gradients that lie where scores lay.
  int64_t gradient_stride(const ScoreBlock& block) const;
  bool in_gradient(const ScoreBlock& block) const;

  // ---- operands and results of products ----

  LinearOperands linear_operands(Range tokens, int64_t first_class) const;
  /// `other`: rows of W for grad_input, of x for grad_weight.
  GradientOperands gradient_operands(const ScoreBlock& block, const Matrix& other) const;
  Matrix input_rows(Range tokens) const {
    return rows(problem_.input, problem_.input_stride, tokens);
  }
  /// Room for a copy of those, its rows padded as those of blocks are: the rows of that range.
  Matrix input_copy(Range rows_of_copy) const {
    return rows(place<char>(layout_.input_copy), round_up(problem_.features, kRowPadding),
                rows_of_copy);
  }
  const float* input_factors(Range tokens) const { return tokens_.input_factor + tokens.begin; }
  Matrix weight_rows(Range classes) const {
    return rows(problem_.weight, problem_.weight_stride, classes);
  }
  void* grad_input_row(int64_t token) const {
    return at(problem_.grad_input, token * problem_.features);
  }
  void* grad_weight_row(int64_t label) const {
    return at(problem_.grad_weight, label * problem_.features);
  }
  /// What is kept in addition to the sums of grad_weight from class `label` on, and of grad_input from
  /// `token` on, a token whose scores are not kept.
  SplitSums split_sums_of_weight(int64_t label) const;
  SplitSums split_sums_of_input(int64_t token) const;
  /// Sums of grad_input from tokens.begin on: the gradient itself when it has full precision.
  void* input_sum(Range tokens) const;
  void* weight_sum() const { return place<char>(layout_.weight_sum); }
  /// Room for gradients that are moved out of grad_weight before their product is written there.
  void* weight_copy() const { return place<char>(layout_.weight_copy); }
  /// Room for the list of the product that comes next (make_work_list).
  void* work_list() const { return place<char>(layout_.work_list); }
  /// [D] each, of label smoothing added to the products: sum_v w_v W[v], sum_n weighted_n x[n].
  float* weight_row_sum() const { return place<float>(layout_.row_sums); }
  float* input_row_sum() const { return place<float>(layout_.row_sums) + problem_.features; }
  /// Factor of the rows of a 16-bit grad_input from a token on: one for all, or fp16, one each.
  const float* input_scale(int64_t token) const {
    return tokens_.input_scale == nullptr ? output_scale() : tokens_.input_scale + token;
  }
  /// Factors of gradients in the sums of the bias, null: ones.
  const float* bias_factors(Range tokens) const {
    return scales_rows() ? input_factors(tokens) : nullptr;
  }
  bool scales_rows() const { return tokens_.input_scale != nullptr; }
  /// Factor of the sums of other 16-bit gradients; null for those of full precision.
  const float* output_scale() const {
    return is_16_bit(problem_.dtype) ? &tokens_.scalars->output_scale_float : nullptr;
  }

 private:
  template <class T>
  T* place(int64_t offset) const {
    return reinterpret_cast<T*>(workspace_ + offset);
  }
  /// Element `index` of an array of the problem's type.
  template <class Pointer>
  Pointer at(Pointer array, int64_t index) const {
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return array == nullptr ? array : static_cast<Byte*>(array) + index * size_of(problem_.dtype);
  }
  /// The part of a [tokens] array of the accumulation type that starts at token `begin`.
  void* from_token(void* array, int64_t begin) const {
    return array == nullptr ? nullptr : static_cast<char*>(array) + begin * size_of(sum_dtype_);
  }
  Matrix rows(const void* matrix, int64_t stride, Range range) const {
    const void* first = at(matrix, range.begin * stride);
    return {first, problem_.dtype, range.size(), problem_.features, stride, 1};
  }
  void place_token_arrays();
  void add_kept(ScoreBlock* block, int64_t before, int64_t count) const;

  const Problem& problem_;
  const GpuPlanRequest& request_;
  const Plan& plan_;
  const PlanTraits& traits_;
  const Layout layout_;
  char* const workspace_;
  const bool keeps_16_bits_;
  const DType sum_dtype_;
  TokenArrays tokens_;
};

}  // namespace memeff::cuda
