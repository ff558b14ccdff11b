// What one call computes: shapes, options and plain pointers. No torch, no CUDA.
//
// N tokens, D features, V classes of the vocabulary.
//
//   u[n,v] = sum_d input[n,d] weight[v,d] + bias[v]
//   z[n,v] = logit_scale * u                                    (softcap == 0)
//            softcap * tanh(logit_scale * u / softcap)          (softcap > 0)
//   lse[n] = log sum_v exp z[n,v]
//
// With class weights w (1 when absent), eps = label_smoothing and target y the loss of a token is
//
//   token_weight * ( (1-eps) w_y (lse - z_y) + eps/V sum_v w_v (lse - z_v) + z_loss lse^2 )
//
// and with a probability target q the first two terms are  sum_v w_v ((1-eps) q_v + eps/V) (lse - z_v).
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/vocab_shard.h"

namespace memeff {

enum class Reduction { kNone, kSum, kMean };

/// Numbers per token from which a caller builds a loss of its own, and their upstream gradients:
///
///   dz[v] = p_v (grad_lse - sum_k grad_logprob_k - grad_entropy (log p_v + entropy))
///           + sum_k grad_logprob_k [v == target_k] + grad_logit_sum
///
/// with p the softmax. Null outputs are not requested, null gradients are zero. Other floating outputs are
/// fp32, or fp64 when the problem is.
struct TokenStatistics {
  // Leave out tokens each of whose targets is ignore_index: all their statistics are 0.
  bool skip_ignored = false;

  // [N] the logits of token n are inverse_temperature[n] z[n,v], and dz above the gradient with respect to
  // these; or null: 1
  const double* inverse_temperature = nullptr;

  void* logprob = nullptr;  // [N, K] log p of each target; 0 where it is ignore_index
  // [N] -sum_v p_v log p_v. fp64 as lse: its rounding would be an error that all classes share.
  double* entropy = nullptr;
  const double* known_entropy = nullptr;  // [N] the same, for grad_entropy
  void* logit_sum = nullptr;              // [N] sum_v z_v
  void* max_logit = nullptr;              // [N]
  int64_t* argmax = nullptr;              // [N]
  int64_t top = 0;                        // the `top` most probable classes, largest first
  void* top_logprobs = nullptr;           // [N, top]
  int64_t* top_ids = nullptr;             // [N, top]

  const double* grad_logprob = nullptr;    // [N, K]
  const double* grad_lse = nullptr;        // [N]
  const double* grad_entropy = nullptr;    // [N]
  const double* grad_logit_sum = nullptr;  // [N]

  // Gradients in the forward pass: called as soon as the statistics of rows [begin, end) are written, sets
  // their upstream gradients. Rows that skip_ignored leaves out may lie in no such range.
  void (*differentiate)(void* context, int64_t begin, int64_t end) = nullptr;
  void* context = nullptr;
};

/// What a caller chooses about a loss or statistics. An option is a field here (or in PlanOptions) and a
/// row of the table in bindings/arguments.cpp.
struct ProblemOptions {
  Reduction reduction = Reduction::kMean;
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  double softcap = 0.0;  // 0: off
  double logit_scale = 1.0;
  double z_loss = 0.0;
  // Gradients may leave out parts of the softmax that sum to less than this per token; 0: exact.
  double skip_mass = 0.0;
  bool statistics = false;  // also loss, target logit, entropy, max, argmax of every token
};

struct Problem : ProblemOptions {
  int64_t tokens = 0;    // N
  int64_t features = 0;  // D
  int64_t vocab = 0;     // V, or those of this rank's shard

  // Null: all classes are here. Otherwise everything per class (weight, bias, probabilities, class_weight,
  // their gradients) is the shard's, and target holds indices among the classes of all ranks.
  const VocabShard* shard = nullptr;

  DType dtype = DType::kFloat32;  // of input, weight, bias and their gradients
  const void* input = nullptr;    // [N, D], rows input_stride elements apart, features adjacent
  int64_t input_stride = 0;
  const void* weight = nullptr;  // [V, D], rows weight_stride elements apart, features adjacent
  int64_t weight_stride = 0;
  const void* bias = nullptr;  // [V] or null

  // Exactly one of the two targets is set; none or one with token statistics.
  const int64_t* target = nullptr;      // [N, K] class indices, ignore_index for none
  int64_t targets = 1;                  // K; 1 for a loss
  const void* probabilities = nullptr;  // [N, V] class probabilities
  DType probabilities_dtype = DType::kFloat32;
  int64_t probabilities_token_stride = 0;
  int64_t probabilities_class_stride = 0;

  const double* class_weight = nullptr;  // [V] or null (all ones)
  const double* token_weight = nullptr;  // [N] or null (all ones)

  // [1]: denominator of the mean, in place of the counts; or null
  const double* num_items = nullptr;

  // Statistics in place of a loss. loss, reduction, weights and what else only a loss has are unused.
  const TokenStatistics* token_statistics = nullptr;

  // Upstream gradient: null means 1 (gradients computed in the forward pass).
  const double* grad_loss = nullptr;  // [N] when reduction is none, else [1]

  // Outputs. Floating [N] outputs are fp32, or fp64 when dtype is fp64.
  void* loss = nullptr;   // [N] when reduction is none, else [1]
  double* lse = nullptr;  // [N]; read instead of written by the backward pass. fp64, because
                          // exp(z - lse) would inherit the rounding of a large lse
  void* statistics_out = nullptr;  // [4, N]: loss, target logit, entropy, max; or null
  int64_t* argmax = nullptr;       // [N]; null unless statistics
  void* grad_input = nullptr;      // [N, D] contiguous, or null: not requested
  void* grad_weight = nullptr;     // [V, D] contiguous, or null
  void* grad_bias = nullptr;       // [V], or null
};

/// The classes of all ranks, and the first of them that is here.
inline int64_t total_vocab(const Problem& p) {
  return p.shard != nullptr ? p.shard->vocab : p.vocab;
}
inline int64_t first_class(const Problem& p) { return p.shard != nullptr ? p.shard->start : 0; }

inline bool skips_tiles(const Problem& p) { return p.skip_mass > 0; }

/// Which numbers of a row, in addition to maximum and sum, the caller's statistics need.
inline bool wants_entropy(const Problem& p) {
  return p.statistics || (p.token_statistics != nullptr && p.token_statistics->entropy != nullptr);
}
/// sum_v w_v z_v
inline bool wants_logit_sum(const Problem& p) {
  return p.label_smoothing > 0 ||
         (p.token_statistics != nullptr && p.token_statistics->logit_sum != nullptr);
}
inline bool wants_argmax(const Problem& p) {
  return p.statistics || (p.token_statistics != nullptr && p.token_statistics->argmax != nullptr);
}

inline bool has_temperatures(const Problem& p) {
  return p.token_statistics != nullptr && p.token_statistics->inverse_temperature != nullptr;
}

/// Whether gradients of the logits have a term for every class that does not depend on its score.
inline bool reaches_all_classes(const Problem& p) {
  return p.label_smoothing > 0 ||
         (p.token_statistics != nullptr && p.token_statistics->grad_logit_sum != nullptr);
}

}  // namespace memeff
