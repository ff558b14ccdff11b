// The kernels of fused architectures (architecture.h): scores and gradient products of 16-bit matrices
// on tensor cores, with all that follows them in their epilogues. Each architecture has the same
// functions in its own namespace. Sums in fp32, truncated by tensor cores (docs/numerics.md, GPU).
#pragma once

#include "core/weight_update.h"
#include "cuda/architecture.h"
#include "cuda/kernel_arguments.h"
#include "cuda/work_list.h"

namespace memeff::cuda {

// ---- scores ----

/// u = x W^T of some tokens and classes.
struct LinearOperands {
  const void* input = nullptr;  // x [tokens, features], features adjacent
  int64_t input_stride = 0;
  const void* weight = nullptr;  // W [classes, features]: from the block's first class on
  int64_t weight_stride = 0;
  int64_t features = 0;
  DType dtype = DType::kBFloat16;  // or fp16
};

/// Partial statistics of x W^T, one per kStoredTile classes, which are never stored, or (scores.data not
/// null) kept as stored scores; then first_class is a multiple of kStoredTile. No probabilities.
///
/// Those of a token are the same bits whatever the other tokens and its place among them, and whether
/// scores are kept: a promise to callers (docs/numerics.md), of which the width of ranges is a part.
struct LinearStatistics {
  Block block;
  LinearOperands operands;
  LogitTerms terms;
  Targets targets;
  PartialStatistics partials;
  float* target_logit = nullptr;  // as in BlockStatistics
  StoredScores scores;
};

/// Where gradients that are rounded to 16 bits are added up before that, for the gradient of the bias:
/// sums over kBiasTokens tokens at a time, each times its factor. add_bias_gradient adds them up further.
struct BiasPartials {
  float* sums = nullptr;  // [classes, ceil(tokens / kBiasTokens)]; null: not requested
  int64_t stride = 0;
  const float* factors = nullptr;  // [tokens]; null: ones
};

/// The gradient with respect to u of x W^T computed again: `gradient` [classes, tokens] of the
/// operands' type. Marks its tiles where that is requested. No probabilities.
struct LinearGradient {
  Block block;
  LinearOperands operands;
  LogitTerms terms;
  Targets targets;
  Coefficients coefficients;
  void* gradient = nullptr;
  int64_t stride = 0;
  TileMarks marks;
  BiasPartials bias = {};
};

// ---- gradient products ----

/// Rows of hidden states that a gradient product must not look at: those of tokens without a gradient,
/// whose columns of G are zeros, where some of them are not finite, so that 0 times them is not 0.
struct RowMask {
  const float* factors = nullptr;   // [tokens]: 0 for such tokens; null: there are none
  const int32_t* needed = nullptr;  // on the device: 0 where all rows are finite, as most often
};

/// A gradient with respect to u, times the other operand of the linear layer.
struct GradientOperands {
  const void* gradient = nullptr;  // G [classes, tokens] of `dtype`
  int64_t gradient_stride = 0;
  const void* other = nullptr;  // W [classes, features] for grad_input, x [tokens, features] else
  int64_t other_stride = 0;
  int64_t features = 0;
  DType dtype = DType::kBFloat16;
  WorkList list = {};  // of this product; tiles of G that are not in it count as zero
  RowMask mask = {};   // of x, for grad_weight
};

/// Where a product [rows, features] goes. With `sums` it is written there in fp32 (added with
/// `accumulate`); else it goes to the 16-bit gradient as RowUpdate describes.
struct ProductOutput {
  float* sums = nullptr;
  int64_t sums_stride = 0;
  bool accumulate = false;
  void* gradient = nullptr;
  int64_t gradient_stride = 0;
  SplitSums split;
  WeightUpdate update = WeightUpdate::kWrite;
  const float* scale = nullptr;
  int64_t scale_stride = 0;  // as in RowUpdate
  // The product may run at the same time as the one launched before it in the stream (and as those
  // that it overlaps): none writes what another reads or writes. A product whose last tiles keep few
  // multiprocessors busy then shares the others with this one. sm80 ignores it.
  bool overlaps_previous = false;

  /// Whether adding zeros is adding nothing, so that rows without work may be left as they are.
  bool only_adds() const {
    return sums != nullptr ? accumulate : update == WeightUpdate::kSplitNext;
  }
};

/// G^T W [tokens, features], or G x [classes, features].
struct GradientProduct {
  Block block;
  GradientOperands operands;
  ProductOutput output;
};

/// What stored_gradient makes of stored scores, in addition to the scores themselves.
struct ScoreGradient {
  const float* maxima = nullptr;  // of StoredScores
  int64_t maxima_stride = 0;
  LogitTerms terms;
  Targets targets;
  Coefficients coefficients;
  const float* target_gradient = nullptr;
};

// ---- what every architecture asks of a call ----

inline Status check(const LinearStatistics& call) {
  if (!is_16_bit(call.operands.dtype) || call.operands.features <= 0)
    return {"linear_statistics: operands are bfloat16 or float16, and have features"};
  if (call.targets.probabilities != nullptr)
    return {"linear_statistics: class probabilities need stored products"};
  if (call.partials.max == nullptr || call.partials.sum == nullptr)
    return {"linear_statistics: max and sum must be given"};
  return {};
}

inline Status check(const LinearGradient& call) {
  if (!is_16_bit(call.operands.dtype) || call.operands.features <= 0)
    return {"linear_gradient: operands are bfloat16 or float16, and have features"};
  if (call.targets.probabilities != nullptr)
    return {"linear_gradient: class probabilities need stored products"};
  if (call.coefficients.shift == nullptr || call.coefficients.softmax == nullptr)
    return {"linear_gradient: shift and softmax must be given"};
  return {};
}

inline Status check(const GradientProduct& call) {
  const ProductOutput& output = call.output;
  if (!is_16_bit(call.operands.dtype))
    return {"gradient product: operands are bfloat16 or float16"};
  if (output.sums != nullptr) return {};
  if (output.gradient == nullptr) return {"gradient product: sums or gradient must be given"};
  if (output.update != WeightUpdate::kWrite && output.split.exponents == nullptr &&
      (call.operands.dtype != DType::kBFloat16 || output.split.remainder == nullptr))
    return {"gradient product: split sums need exponents, or a remainder of bfloat16 gradients"};
  return {};
}

// ---- the functions of an architecture ----

/// Null: the architecture has no such kernel.
struct FusedKernels {
  using Product = Status(const GradientProduct& call, void* stream);
  /// Straight from stored scores: operands.gradient is StoredScores::data, and G what stored_gradient
  /// would write there, bit for bit, but is never written.
  using ProductFromScores = Status(const GradientProduct& call, const ScoreGradient& scores,
                                   void* stream);

  Status (*linear_statistics)(const LinearStatistics& call, void* stream) = nullptr;
  Status (*linear_gradient)(const LinearGradient& call, void* stream) = nullptr;
  Product *grad_input_product = nullptr, *grad_weight_product = nullptr;
  ProductFromScores *grad_input_from_scores = nullptr, *grad_weight_from_scores = nullptr;
  /// Whether products from scores know the terms of these gradients.
  bool (*accepts_scores)(const ScoreGradient& scores) = nullptr;
};

#define MEMEFF_DECLARE(name)               \
  namespace name {                         \
  FusedKernels fused_kernels(int cluster); \
  }
MEMEFF_CUDA_ARCHITECTURES(MEMEFF_DECLARE)
#undef MEMEFF_DECLARE

/// Those of one row of the table.
inline FusedKernels fused_kernels(const Architecture& architecture, int cluster) {
#define MEMEFF_ROW(name) \
  if (&architecture == &name::architecture) return name::fused_kernels(cluster);
  MEMEFF_CUDA_ARCHITECTURES(MEMEFF_ROW)
#undef MEMEFF_ROW
  return {};  // no row: not reached
}

}  // namespace memeff::cuda
