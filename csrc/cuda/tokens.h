// Host entry points of the kernels that work on tokens, not on scores: what takes part, statistics
// from partial statistics, coefficients of the gradient, the loss. The formulas are those of
// core/problem.h; all pointers of the Problem are device pointers here. Nothing
// synchronises; arithmetic is in fp64 (a few numbers per token), in a fixed order.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "core/rank_numbers.h"
#include "cuda/work_list.h"

namespace memeff::cuda {

/// Numbers that all tokens share, in device memory.
struct CallScalars {
  double denominator;         // of the cross entropy terms of the loss
  double z_denominator;       // of the z-loss
  double class_weight_total;  // sum_v w_v (V without class weights)
  // Factor of all gradients of 16-bit inputs, applied to their fp32 sums: logit_scale / denominator
  // times a scalar upstream gradient. 1 for fp32 and fp64, whose coefficients contain it.
  double output_scale;
  // fp16 gradients of logits: those of token n are stored 2^-e_n times, with 0 <= e_n so large that no
  // coefficient overflows; the sums over tokens that make grad_weight and grad_bias 2^-exponent times.
  // 0 for the other types, and for fp16 unless coefficients may be beyond 4096.
  int exponent;
  float output_scale_float;  // output_scale 2^exponent
  int32_t non_finite;        // 1: hidden states of a token without a gradient are known to be that
};

/// All that is kept of N tokens: device arrays [N], fp64 unless said otherwise.
struct TokenArrays {
  // Classes of all ranks that share the vocabulary, or of the problem; the first of them that is here;
  // and whether ranks share it.
  int64_t vocab = 0, first_class = 0;
  bool shared = false;
  CallScalars* scalars = nullptr;
  int64_t* target =
      nullptr;  // index among the classes that are here; kNoTarget: left out (or class
                // probabilities); kElsewhere: a class of another rank; kBadTarget: out
                // of range, whose loss and gradients become NaN
  double* lse = nullptr;
  // A: z_y of index targets, written by the kernels that see the logits; prepare_tokens sets it to
  // 0, and to NaN where the target is bad. Null with class probabilities.
  void* target_logit = nullptr;
  double* target_dot = nullptr;    // of class probabilities q: sum_v w_v q_v z_v
  double* target_mass = nullptr;   // w_y, or sum_v w_v q_v
  double* target_plain = nullptr;  // of class probabilities: sum_v q_v z_v
  double* smooth = nullptr;        // sum_v w_v z_v; null where not requested
  double* entropy = nullptr;       // null unless the problem wants statistics; so are:
  double* maximum = nullptr;
  int64_t* argmax = nullptr;
  // The arrays of Coefficients (kernel_arguments.h), of A: target_rest for index targets, weighted with label
  // smoothing, else they may be null.
  void *shift = nullptr, *softmax = nullptr, *target_coefficient = nullptr, *target_rest = nullptr,
       *weighted = nullptr;
  // A; of token statistics with a gradient of the entropy
  void *entropy_coefficient = nullptr, *centre = nullptr;
  // What kernels need of a problem's token statistics, whose pointer lies in host memory.
  bool for_statistics = false;
  TokenStatistics wanted;
  // Whether the gradients of the logits leave `weighted` out: it is then added to their products.
  bool weighted_apart = false;
  // What grad_weight's product makes of row n of the hidden states, float: 0 for a token without a
  // gradient, whose row is not looked at, else 2^(e_n - exponent). Null: not requested.
  float* input_factor = nullptr;
  float* input_scale = nullptr;  // of fp16: output_scale 2^e_n, the factor of row n of grad_input
  // The entry of the target, for stored scores: dz_y times dz/du (without logit_scale for 16-bit
  // inputs, whose output_scale has it); null: no scores are stored.
  float* target_gradient = nullptr;
};
/// Whether A is double; else it is float.
inline bool in_double(const Problem& problem) {
  return accumulation_dtype(problem.dtype) == DType::kFloat64;
}

constexpr int64_t kNoTarget = -1;
constexpr int64_t kBadTarget = -2;
constexpr int64_t kElsewhere = -3;

/// Reads the targets: fills `target`, `scalars`, target_logit, and target_mass of index targets. A
/// token takes part in the loss unless its target is ignore_index. num_items <= 0 is not refused:
/// the loss is what the division gives.
Status prepare_tokens(const Problem& problem, const TokenArrays& tokens, void* stream);

/// Merges `ranges` partial statistics of tokens [begin, end), whose arrays start at `begin`: lse
/// and the other statistics, then the coefficients and target_gradient. These are not made of a
/// caller's token statistics: they wait for restore_statistics, with upstream gradients; nor of a
/// vocabulary that ranks share, of which merge_ranks makes them.
Status merge_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                        int64_t end, const PartialStatistics& partials, int64_t ranges,
                        void* stream);

/// lse of tokens [begin, end) from problem.lse instead, then the coefficients, and target_gradient
/// where merge_statistics has left target_logit: the backward op, or a caller's token statistics
/// whose upstream gradients have become known.
Status restore_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                          int64_t end, void* stream);

/// A vocabulary that ranks share. First the numbers that all tokens share: what this rank has to say of
/// them, kTotals numbers, and what follows from what all ranks have said, [ranks, kTotals]. Needed with
/// class weights alone.
constexpr int64_t kTotals = 3;
Status say_totals(const Problem& problem, const TokenArrays& tokens, double* own, void* stream);
Status merge_totals(const Problem& problem, const TokenArrays& tokens, const double* all,
                    int64_t ranks, void* stream);
/// Then what merge_statistics or restore_statistics has left of tokens [begin, end): what this rank has
/// to say of them, [places.count, end - begin], and what follows from what all ranks have said, [ranks,
/// places.count, end - begin]: statistics of the whole vocabulary, coefficients, target_gradient.
Status say_tokens(const Problem& problem, const TokenArrays& tokens, const RankNumbers& places,
                  int64_t begin, int64_t end, double* own, void* stream);
Status merge_ranks(const Problem& problem, const TokenArrays& tokens, const RankNumbers& places,
                   int64_t begin, int64_t end, const double* all, int64_t ranks, void* stream);

/// Coefficients and target_gradient of tokens [begin, end) from the statistics in `tokens`.
Status set_coefficients(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                        int64_t end, void* stream);

/// problem.loss, lse, statistics_out, argmax from the statistics of all tokens. Without statistics
/// the lse of tokens left out is 0. tokens.lse may be problem.lse.
Status write_loss(const Problem& problem, const TokenArrays& tokens, void* stream);

/// The caller's token statistics (problem.token_statistics: one target per token or none, no top) in
/// place of a loss; of tokens [begin, end).
Status write_token_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                              int64_t end, void* stream);

/// Marks the tiles of stored scores that a gradient may leave out (TileMarks; tokens left out do not
/// matter). Ranges of the partial statistics are tiles of kStoredTile
/// classes. For 16-bit inputs, whose scores are stored; not with class probabilities, nor label
/// smoothing unless weighted_apart: their gradient reaches every class.
Status mark_tiles(const Problem& problem, const TokenArrays& tokens, int64_t begin, int64_t end,
                  const PartialStatistics& partials, const TileMarks& marks, void* stream);

}  // namespace memeff::cuda
