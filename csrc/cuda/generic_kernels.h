// The generic kernels: every GPU from sm_75 on, elementwise or reductions, bound by memory.
#pragma once

#include "core/weight_update.h"
#include "cuda/kernel_arguments.h"

namespace memeff::cuda {

/// Partial statistics of stored products u, [classes, tokens] of A, one range per
/// `classes_per_range` (a multiple of 64) classes. `target_logit` [tokens] of A gets z_y of the
/// tokens whose index target lies in the block and is otherwise left alone; null: not requested.
struct BlockStatistics {
  Block block;
  const void* products = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kFloat32;
  LogitTerms terms;
  Targets targets;
  int64_t classes_per_range = 0;
  PartialStatistics partials;
  void* target_logit = nullptr;
  const double* token_scale = nullptr;  // [tokens] multiplies z; null: 1
};
Status block_statistics(const BlockStatistics& call, void* stream);

/// The same of fp32 products with a range per tile of kStoredTile classes, and the scores to be kept
/// (StoredScores, whose maxima are partials.max). The block begins at a tile. No class probabilities.
struct KeptScores {
  Block block;
  const float* products = nullptr;
  int64_t stride = 0;
  LogitTerms terms;
  Targets targets;
  PartialStatistics partials;
  float* target_logit = nullptr;
  void* scores = nullptr;  // [classes, tokens] fp16; null: statistics alone
  int64_t scores_stride = 0;
};
Status keep_scores(const KeptScores& call, void* stream);

/// The gradient of the bias from gradients that are rounded to 16 bits, added up before that:
/// sums[v] += sum over tokens of factors[token] * gradient[v, token]. Where all tokens have about the same
/// gradient the roundings do not average out.
struct BiasSums {
  float* sums = nullptr;           // [V]; null: not requested
  const float* factors = nullptr;  // [tokens]; null: ones
};

/// Replaces u by the gradient with respect to u, in place. The gradient's type is that of u, or a
/// 16-bit type for float u; its rows then start where those of u start, 2 stride elements apart.
struct BlockGradient {
  Block block;
  void* products = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kFloat32, gradient_dtype = DType::kFloat32;
  LogitTerms terms;
  Targets targets;
  Coefficients coefficients;
  const double* token_scale = nullptr;  // as in BlockStatistics; the coefficients contain it, too
  BiasSums bias = {};                   // of 16-bit gradients alone
};
Status block_gradient(const BlockGradient& call, void* stream);

/// Replaces stored scores by the gradient with respect to u, in place, in the 16-bit type
/// `gradient_dtype`. The entry of an index target is target_gradient[token] (float), as it is, or
/// zero where all coefficients are. first_class is a multiple of kStoredTile. No class
/// probabilities; not softcap with `weighted`.
struct StoredGradient {
  Block block;
  StoredScores scores;
  DType gradient_dtype = DType::kBFloat16;
  LogitTerms terms;
  Targets targets;
  Coefficients coefficients;
  const float* target_gradient = nullptr;
  BiasSums bias = {};
};
Status stored_gradient(const StoredGradient& call, void* stream);

/// sums[v] += sum over tokens of gradient[v, token], [V] and [classes, tokens] of A: the gradient of the bias
/// from gradients that are not rounded, or from their sums over some tokens each (BiasPartials).
Status add_bias_gradient(const Block& block, const void* gradient, int64_t stride, DType dtype,
                         void* sums, void* stream);

/// Rows of sums [rows, columns] of A into a gradient of type `dtype`, row i scaled by
/// scale[i * scale_stride] (A, on the device; null: 1; a stride of 0: one scale for all). The sums may be in
/// `parts` of the same shape, part_stride elements apart, which are added in their order.
struct RowUpdate {
  const void* sums = nullptr;
  int64_t sums_stride = 0;
  int64_t parts = 1, part_stride = 0;
  void* gradient = nullptr;
  int64_t gradient_stride = 0;
  SplitSums split;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0;
  WeightUpdate update = WeightUpdate::kWrite;
  const void* scale = nullptr;  // kSplitFirst and kSplitNext keep unscaled sums
  int64_t scale_stride = 0;
};
Status update_rows(const RowUpdate& update, void* stream);

/// A copy of a matrix [rows, columns], of the same type or fp32.
struct RowCopy {
  const void* from = nullptr;
  int64_t from_stride = 0;
  DType from_dtype = DType::kFloat32;
  void* to = nullptr;
  int64_t to_stride = 0;
  DType to_dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0;
};
Status copy_rows(const RowCopy& copy, void* stream);

/// to[row] = factors[row] * from[row], computed in A; where the factor is 0 zeros, whatever lies there.
struct RowProduct {
  const void* from = nullptr;  // [rows, columns]
  int64_t from_stride = 0;
  DType dtype = DType::kFloat32;  // of both
  const float* factors = nullptr;
  void* to = nullptr;
  int64_t to_stride = 0;
  int64_t rows = 0, columns = 0;
};
Status multiply_rows(const RowProduct& call, void* stream);

/// Sets *found to 1 if a row of the matrix whose factor is 0 holds a number that is not finite.
struct NonFiniteRows {
  const void* matrix = nullptr;  // [rows, columns]
  int64_t stride = 0;
  DType dtype = DType::kFloat32;
  const float* factors = nullptr;
  int64_t rows = 0, columns = 0;
  int32_t* found = nullptr;
};
Status find_non_finite_rows(const NonFiniteRows& call, void* stream);

/// gradient = from * *scale (fp64, on the device), n adjacent elements, computed in A. `from` may
/// be `gradient`; then nothing is written where the scale is 1.
Status scale_gradient(const void* from, void* gradient, DType dtype, int64_t n, const double* scale,
                      void* stream);

/// sums [columns] = sum over rows of factors[row] * matrix[row], but of those whose factor is 0, whatever
/// they hold; no factors: ones.
struct WeightedRowSum {
  const void* matrix = nullptr;  // [rows, columns], of 16 bits
  int64_t stride = 0;
  DType dtype = DType::kBFloat16;
  int64_t rows = 0, columns = 0;
  const float* factors = nullptr;
  float* sums = nullptr;
};
Status weighted_row_sum(const WeightedRowSum& call, void* stream);

/// out[row, column] = factors[row] * values[column], or += with `accumulate`; no factors: ones.
struct OuterProduct {
  const float *factors = nullptr, *values = nullptr;
  float* out = nullptr;  // [rows, columns]
  int64_t stride = 0;
  int64_t rows = 0, columns = 0;
  bool accumulate = false;
};
Status outer_product(const OuterProduct& call, void* stream);

}  // namespace memeff::cuda
