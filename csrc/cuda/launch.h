// Host entry points of the CUDA kernels: plain structs of device pointers and a stream in, a status
// out. No torch, no CUDA headers; nothing synchronises. All functions are safe inside a CUDA graph
// capture.
//
// "Accumulation type" means float, or double when the logits are double.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cuda/status.h"

namespace memeff::cuda {

/// A block of products u = x W^T: some tokens, a range of the vocabulary. The kernels add the bias,
/// scale and cap while they read:
///   z = logit_scale * (u + bias)                      softcap == 0
///   z = softcap * tanh(logit_scale * (u + bias) / softcap)
struct LogitsBlock {
  void* logits = nullptr;  // [tokens, classes], rows `row_stride` elements apart; fastest when rows
                           // start at multiples of 16 bytes
  int64_t tokens = 0;
  int64_t classes = 0;
  int64_t row_stride = 0;
  DType dtype = DType::kFloat32;
  int64_t first_class = 0;  // vocabulary index of column 0; indexes bias, class_weight, target

  const void* bias = nullptr;          // [V] in the accumulation type, or null
  const void* class_weight = nullptr;  // [V] in the accumulation type, or null (all ones)
  double logit_scale = 1.0;
  double softcap = 0.0;

  // At most one of the two targets is set.
  const int64_t* target = nullptr;  // [tokens] vocabulary indices; others (ignored) match nothing
  const void* probabilities = nullptr;  // [tokens, V], rows `probabilities_stride` elements apart
  DType probabilities_dtype = DType::kFloat32;
  int64_t probabilities_stride = 0;
};

/// What a loss needs to know of each token's logits. Every array is [tokens] in the accumulation
/// type, argmax is int64. Null members beyond `max` and `sum` are not computed.
///
///   lse = max + log(sum)
struct TokenStatistics {
  void* max = nullptr;     // max_v z_v
  void* sum = nullptr;     // sum_v exp(z_v - max)
  void* target = nullptr;  // z_y, or sum_v w_v q_v z_v with probabilities q and class weights w
  void* target_mass = nullptr;  // sum_v w_v q_v; with probabilities only
  void* weighted = nullptr;     // sum_v w_v z_v, for label smoothing
  void* entropy = nullptr;      // sum_v exp(z_v - max) z_v; entropy = lse - this / sum
  int64_t* argmax =
      nullptr;  // the first class of largest z; with max and sum of all earlier slices
};

/// Reads the block once. With `continues`, the statistics of earlier slices of the vocabulary are
/// combined with this one's; slices come in ascending order.
Status row_statistics(const LogitsBlock& block, const TokenStatistics& statistics, bool continues,
                      void* stream);

/// The gradient of any loss that is a function of the token statistics, with respect to z:
///
///   dz_v = p_v (A + B z_v) + C [v == y] + S w_v          p_v = exp(z_v - lse)
///
/// and with class probabilities q, C w_v q_v in place of C [v == y].
struct GradientCoefficients {
  const void* lse = nullptr;       // [tokens], accumulation type, as are the others
  const void* softmax = nullptr;   // A
  const void* entropy = nullptr;   // B, or null (zero)
  const void* target = nullptr;    // C
  const void* weighted = nullptr;  // S, or null (zero)
};

/// Replaces each u of the block by the gradient with respect to u, reading and writing it once. The
/// gradient has type `gradient_dtype`, either the logits' own or, for float logits, a 16-bit type;
/// in that case its rows start where the rows of logits start, 2 row_stride elements apart. A token
/// whose coefficients are all zero gets zeros, whatever its logits.
Status logits_gradient(const LogitsBlock& block, const GradientCoefficients& coefficients,
                       DType gradient_dtype, void* stream);

/// sums[first_class + v] += sum_n gradient[n, v] in the accumulation type: the bias's gradient.
/// `gradient` describes the block that logits_gradient left behind (dtype, row_stride).
Status add_column_sums(const LogitsBlock& gradient, void* sums, void* stream);

/// Logits that are never stored: u = x W^T, of 16-bit inputs. Bias, scale, cap and index target as
/// in LogitsBlock.
struct LinearLogits {
  const void* input = nullptr;   // x [tokens, features], features adjacent
  const void* weight = nullptr;  // W [classes, features], features adjacent
  int64_t tokens = 0;
  int64_t features = 0;
  int64_t classes = 0;
  int64_t input_stride = 0;   // elements from row to row; fastest when both strides and addresses
  int64_t weight_stride = 0;  // are multiples of 8 elements
  DType dtype = DType::kBFloat16;
  int64_t first_class = 0;

  const void* bias = nullptr;          // [V] float, or null
  const void* class_weight = nullptr;  // [V] float, or null (all ones)
  double logit_scale = 1.0;
  double softcap = 0.0;
  const int64_t* target = nullptr;  // [tokens] or null
};

/// Bytes of device memory that linear_statistics needs besides its arguments.
int64_t linear_statistics_workspace(int64_t tokens, int64_t classes);

/// row_statistics of x W^T straight from the accumulators of the matrix product; sm_80 and newer.
/// Statistics are floats. `workspace` is 16-byte aligned.
Status linear_statistics(const LinearLogits& logits, const TokenStatistics& statistics,
                         bool continues, void* workspace, void* stream);

}  // namespace memeff::cuda
