// What the host entry points of the CUDA kernels take: plain structs of device pointers; a stream goes
// in, a status comes out. No torch, no CUDA headers; nothing synchronises or allocates. All functions
// are safe inside a CUDA graph capture. They are declared in
//
//   generic_kernels.h, tokens.h   kernels for every GPU: elementwise work and reductions
//   work_list.h                   which tiles of a gradient a product has to multiply
//   fused_kernels.h               scores and gradient products on tensor cores, per architecture
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
#include "cuda/status.h"

namespace memeff::cuda {

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
/// of -inf logits alone has max -inf and sum 0; a NaN logit makes max and sum NaN; +inf makes the sum NaN.
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
/// The gradient with respect to u is dz times dz/du, of which kernels apply the derivative of the cap
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

constexpr int64_t kBiasTokens = 64;  // of the partial sums of the bias's gradient (BiasPartials)

/// What split sums (kSplit*, core/weight_update.h) of a 16-bit gradient keep in addition to it. One is given:
/// `remainder` [rows, columns], the lower halves of fp32 sums (bf16 only), or `exponents` of compact
/// sums (core/compact_sum.h) [rows, ceil(columns / kCompactBlock)]. For sm90 the latter and their rows
/// start at multiples of 4 bytes, all of which it may read; remainders are as all of 16 bits.
struct SplitSums {
  uint16_t* remainder = nullptr;
  int64_t remainder_stride = 0;
  uint8_t* exponents = nullptr;
  int64_t exponents_stride = 0;
};

}  // namespace memeff::cuda
