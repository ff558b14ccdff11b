// Host entry points of the CUDA kernels: plain structs of device pointers and a stream in, a status
// out. No torch, no CUDA headers; nothing synchronises or allocates. All functions are safe inside
// a CUDA graph capture.
//
// Everything is vocabulary-major: a block of scores is a matrix [classes, tokens] with adjacent
// tokens, "stride" elements from class to class, so that row v of a block can live in row v of
// grad_weight (docs/design.md). Stride and pointers of 16-bit and float blocks are best multiples of
// 16 bytes; anything else works, slower.
//
// "A" is the accumulation type: float, or double when the inputs are double. Arrays over tokens
// start at the block's first token; arrays over classes at class 0 of the vocabulary.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/weight_update.h"
#include "cuda/status.h"

namespace memeff::cuda {

// ---- what a block of scores is ----

/// From the product u = x W^T to the logit:
///   z = logit_scale * (u + bias)                                softcap == 0
///   z = softcap * tanh(logit_scale * (u + bias) / softcap)
struct LogitTerms {
  const void* bias = nullptr;          // A [V], or null
  const void* class_weight = nullptr;  // A [V], or null (all ones)
  double logit_scale = 1.0;
  double softcap = 0.0;
};

/// At most one of the two is set.
struct Targets {
  const int64_t* index = nullptr;       // [tokens], vocabulary index; < 0: the token has none
  const void* probabilities = nullptr;  // element of token 0 of the block and class 0, or null
  DType dtype = DType::kFloat32;
  int64_t token_stride = 0;  // elements
  int64_t class_stride = 0;
};

struct Block {
  int64_t first_class = 0;  // of the vocabulary
  int64_t classes = 0;
  int64_t tokens = 0;
};

/// Statistics of ranges of classes, [ranges, tokens] each, "stride" elements from range to range; to
/// be merged by merge_statistics. Null members are not computed; max and sum always are. A range
/// of -inf logits alone has max -inf and sum 0; a NaN logit makes the sum NaN.
struct PartialStatistics {
  void* max = nullptr;         // A: max_v z_v
  int64_t max_stride = 0;      // of max alone: it may be kept elsewhere, as stored scores do
  int64_t stride = 0;          // of all others
  void* sum = nullptr;         // A: sum_v exp(z_v - max)
  void* entropy = nullptr;     // A: sum_v exp(z_v - max) (z_v - max), without logits of -inf
  void* smooth = nullptr;      // A: sum_v w_v z_v
  int32_t* argmax = nullptr;   // of the vocabulary: the first class of the largest logit, or, where
                               // all are -inf, of the range
  void* target_dot = nullptr;  // A: sum_v w_v q_v z_v of class probabilities q, where w_v q_v != 0
  void* target_mass = nullptr;   // A: sum_v w_v q_v
  void* target_plain = nullptr;  // A: sum_v q_v z_v, where q_v != 0
};

/// The gradient with respect to z, per token (arrays [tokens] of A):
///   dz_v = p_v (softmax + entropy (z_v - centre)) + target [v == y] + weighted w_v
///   p_v = exp(z_v - shift)
/// or, with class probabilities q,  ... + target w_v q_v. A token whose coefficients are all zero
/// gets zeros, whatever its logits. The entry of an index target of p_y >= 1/2 is computed as
///   softmax expm1(z_y - shift) + target_rest + p_y entropy (z_y - centre) + weighted w_y
/// whose digits survive a p_y close to 1; target_rest = softmax + target, made in fp64. At a small p_y
/// it is this form that cancels, softmax - softmax, and p_y softmax + target that does not.
/// Terms of the entropy cancel the expected logit, sum_v p_v z_v, which is thus what the centre is: with
/// another one softmax would have to contain the difference, and errs by what fp32 loses of that.
///
/// The gradient with respect to u is dz times dz/du, of which kernels apply 1 - (z / softcap)^2
/// alone. Factors that all scores share, logit_scale included, are the caller's: in the
/// coefficients, or, for 16-bit gradients, in the scale of their fp32 sums (docs/design.md,
/// "Numerics"). So kernels use logit_scale to find z, and not again.
struct Coefficients {
  const void* shift = nullptr;        // lse, rounded to A
  const void* softmax = nullptr;      // includes exp(shift - lse)
  const void* entropy = nullptr;      // null: zero
  const void* centre = nullptr;       // of the entropy's term, rounded to A; null: zero
  const void* target = nullptr;       // null: targets count for nothing
  const void* target_rest = nullptr;  // of index targets; goes with `target`
  const void* weighted = nullptr;     // null: zero
};

/// Scores kept in 16 bits: E = exp(z - m), fp16 (relative error 2^-11), with the maximum m of each
/// tile of kStoredTile classes and token in fp32.
struct StoredScores {
  void* data = nullptr;  // [classes, tokens] fp16
  int64_t stride = 0;
  float* maxima = nullptr;  // [ceil(classes / kStoredTile), tokens]
  int64_t maxima_stride = 0;
};
constexpr int64_t kStoredTile = 128;

// ---- generic kernels: every GPU from sm_75 on, elementwise or reductions, bound by memory ----

/// Partial statistics of stored products u, [classes, tokens] of A, one range per
/// `classes_per_range` (a multiple of 64) classes. `target_logit` [tokens] of A gets z_y of the
/// tokens whose index target lies in the block and is otherwise left alone; null: not wanted.
Status block_statistics(const Block& block, const void* products, int64_t stride, DType dtype,
                        const LogitTerms& terms, const Targets& targets, int64_t classes_per_range,
                        const PartialStatistics& partials, void* target_logit, void* stream);

/// Replaces u by the gradient with respect to u, in place. The gradient's type is that of u, or a
/// 16-bit type for float u; its rows then start where those of u start, 2 stride elements apart.
Status block_gradient(const Block& block, void* products, int64_t stride, DType dtype,
                      DType gradient_dtype, const LogitTerms& terms, const Targets& targets,
                      const Coefficients& coefficients, void* stream);

/// Replaces stored scores by the gradient with respect to u, in place, in the 16-bit type
/// `gradient_dtype`. The entry of an index target is target_gradient[token] (float), as it is, or
/// zero where all coefficients are. first_class is a multiple of kStoredTile. No class
/// probabilities; not softcap with `weighted`.
Status stored_gradient(const Block& block, const StoredScores& scores, DType gradient_dtype,
                       const LogitTerms& terms, const Targets& targets,
                       const Coefficients& coefficients, const float* target_gradient,
                       void* stream);

/// sums[v] += sum over tokens of gradient[v, token], sums [V] of A: the gradient of the bias.
Status add_bias_gradient(const Block& block, const void* gradient, int64_t stride, DType dtype,
                         void* sums, void* stream);

/// What split sums (kSplit*, core/weight_update.h) of a 16-bit gradient keep beside it. One is given:
/// `remainder` [rows, columns], the lower halves of fp32 sums (bf16 only), or `exponents` of compact
/// sums (core/compact_sum.h) [rows, ceil(columns / kCompactBlock)]. For sm90 the latter and their rows
/// start at multiples of 4 bytes, all of which it may read; remainders are as all of 16 bits.
struct SplitSums {
  uint16_t* remainder = nullptr;
  int64_t remainder_stride = 0;
  uint8_t* exponents = nullptr;
  int64_t exponents_stride = 0;
};

/// Rows of sums [rows, columns] of A into a gradient of type `dtype`, scaled by *scale (A, on the
/// device; null: 1).
struct RowUpdate {
  const void* sums = nullptr;
  int64_t sums_stride = 0;
  void* gradient = nullptr;
  int64_t gradient_stride = 0;
  SplitSums split;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0;
  WeightUpdate update = WeightUpdate::kWrite;
  const void* scale = nullptr;  // kSplitFirst and kSplitNext keep unscaled sums
};
Status update_rows(const RowUpdate& update, void* stream);

/// Copies a matrix, to the same type or to fp32.
Status copy_rows(const void* from, int64_t from_stride, DType from_dtype, void* to,
                 int64_t to_stride, DType to_dtype, int64_t rows, int64_t columns, void* stream);

/// gradient = from * *scale (fp64, on the device), n adjacent elements, computed in A. `from` may
/// be `gradient`; then nothing is written where the scale is 1.
Status scale_gradient(const void* from, void* gradient, DType dtype, int64_t n, const double* scale,
                      void* stream);

/// sums [columns] (float) = sum over rows of factors[row] * matrix[row]; no factors: ones. 16 bits.
Status weighted_row_sum(const void* matrix, int64_t stride, DType dtype, int64_t rows,
                        int64_t columns, const float* factors, float* sums, void* stream);
/// out[row, column] = factors[row] * values[column], or += with `accumulate`; no factors: ones.
Status outer_product(const float* factors, const float* values, int64_t rows, int64_t columns,
                     bool accumulate, float* out, int64_t stride, void* stream);

// ---- which tiles of a gradient count ----
//
// A product of a gradient G [classes, tokens] may leave out tiles of kStoredTile classes by kTokenTile
// tokens that are marked 0. A row of tiles of its result is a sum over "k tiles": tiles of classes for
// grad_input, of tokens for grad_weight.

constexpr int64_t kTokenTile = 128;

/// A row of tiles of the result, and how many of its k tiles count.
struct WorkRow {
  int32_t row, count;
};
struct WorkList {
  const WorkRow* rows = nullptr;  // all rows of tiles by decreasing count; null: every tile counts
  // [rows of tiles, k tiles]: of each row those that count, in ascending order, then nothing
  const int32_t* k_tiles = nullptr;
};

/// Of `rows` rows of tiles, each a sum over `k_tiles` k tiles.
constexpr int64_t work_list_bytes(int64_t rows, int64_t k_tiles) {
  return rows * (static_cast<int64_t>(sizeof(WorkRow)) + 4 * (1 + k_tiles));
}

/// Lists what a product has to do from the marks of tiles [ceil(classes / kStoredTile), ceil(tokens /
/// kTokenTile)], rows "tiles_stride" apart. `memory`, on the device, has work_list_bytes() and starts
/// at a multiple of 8; the list points into it.
enum class ProductOfGradient { kGradInput, kGradWeight };
Status make_work_list(ProductOfGradient product, int64_t classes, int64_t tokens,
                      const uint8_t* tiles, int64_t tiles_stride, void* memory, WorkList* list,
                      void* stream);

// ---- products of 16-bit matrices on tensor cores ----
//
// The same functions in namespaces sm80 (mma.sync, cp.async; sm_80 and newer), sm90 (wgmma, TMA;
// sm_90a) and sm90x2 (the same in pairs of thread blocks that load the second operand together).
// Sums in fp32; nothing but the results is rounded.

/// u = x W^T of some tokens and classes.
struct LinearOperands {
  const void* input = nullptr;  // x [tokens, features], features adjacent
  int64_t input_stride = 0;
  const void* weight = nullptr;  // W [classes, features]: from the block's first class on
  int64_t weight_stride = 0;
  int64_t features = 0;
  DType dtype = DType::kBFloat16;  // or fp16
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
  // The product may run at the same time as the one launched before it in the stream (and as those
  // beside which that one runs): none writes what another reads or writes. A product whose last tiles
  // leave multiprocessors idle then shares them with this one. sm80 takes no notice.
  bool beside = false;

  /// Whether adding zeros is adding nothing, so that rows without work may be left as they are.
  bool only_adds() const {
    return sums != nullptr ? accumulate : update == WeightUpdate::kSplitNext;
  }
};

/// Partial statistics of x W^T, never stored, or (scores.data not null) kept as stored scores; then
/// classes_per_range is kStoredTile and first_class a multiple of it. No probabilities.
using LinearStatistics = Status(const Block& block, const LinearOperands& operands,
                                const LogitTerms& terms, const Targets& targets,
                                int64_t classes_per_range, const PartialStatistics& partials,
                                float* target_logit, const StoredScores& scores, void* stream);

/// The gradient with respect to u of x W^T computed again: `gradient` [classes, tokens] of the
/// operands' type. With `tiles`, a tile (as make_work_list takes them) is marked 0 where no target lies
/// in it and each token that has a gradient has a probability mass of less than skip_mass * (classes
/// of the tile) / vocab there, else 1. No probabilities.
using LinearGradient = Status(const Block& block, const LinearOperands& operands,
                              const LogitTerms& terms, const Targets& targets,
                              const Coefficients& coefficients, void* gradient, int64_t stride,
                              uint8_t* tiles, int64_t tiles_stride, double skip_mass, int64_t vocab,
                              void* stream);

/// G^T W [tokens, features], or G x [classes, features].
using GradientProduct = Status(int64_t classes, int64_t tokens, const GradientOperands& operands,
                               const ProductOutput& output, void* stream);

/// What stored_gradient makes of stored scores, beside the scores themselves.
struct ScoreGradient {
  const float* maxima = nullptr;  // of StoredScores
  int64_t maxima_stride = 0;
  LogitTerms terms;
  Targets targets;
  Coefficients coefficients;
  const float* target_gradient = nullptr;
};

/// The same products straight from stored scores: `operands.gradient` is StoredScores::data, and G
/// what stored_gradient would write there, bit for bit, but is never written.
using ProductFromScores = Status(const Block& block, const GradientOperands& operands,
                                 const ScoreGradient& scores, const ProductOutput& output,
                                 void* stream);

namespace sm80 {
LinearStatistics linear_statistics;
LinearGradient linear_gradient;
GradientProduct grad_input_product, grad_weight_product;
}  // namespace sm80

namespace sm90 {
LinearStatistics linear_statistics;
LinearGradient linear_gradient;
GradientProduct grad_input_product, grad_weight_product;
ProductFromScores grad_input_from_scores, grad_weight_from_scores;

/// Whether this family can work on the operands: TMA wants 16-bit rows that start at multiples of 16
/// bytes and do not overlap. `block` is what is stored, scores or a gradient [classes, tokens], or
/// null. Where rows of what is stored end inside 16 bytes, the rest of these is overwritten, too.
bool accepts(const LinearOperands& operands, const void* block, int64_t block_stride);
bool accepts(const GradientOperands& operands, const ProductOutput& output);
/// Products from scores know the softmax's term and index targets: no soft cap, no `entropy` or
/// `weighted`, no class probabilities.
bool accepts(const ScoreGradient& scores);
}  // namespace sm90

/// Accepts what sm90 accepts. Products that skip tiles are those of sm90: which tiles count differs
/// between the two blocks of a pair.
namespace sm90x2 {
LinearStatistics linear_statistics;
LinearGradient linear_gradient;
GradientProduct grad_input_product, grad_weight_product;
}  // namespace sm90x2

}  // namespace memeff::cuda
