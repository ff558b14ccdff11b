// Decides how a call runs on a GPU, and lays out its workspace, before anything is allocated: plain
// C++, tested without a GPU. The plans are those of core/planner.h; sizes differ, because a GPU wants
// large products and hides nothing in a thread's cache:
//
//   scores, statistics    token_block tokens at a time, so that partial statistics stay small
//   grad_input            of kept scores: input_block tokens, all classes in one product
//   grad_weight           weight_block tokens, slice_vocab classes
#pragma once

#include <cstdint>
#include <string>

#include "core/planner.h"
#include "core/problem.h"
#include "cuda/select.h"

namespace memeff::cuda {

/// What the planner needs to know of a call besides its PlanRequest.
struct PlanTraits {
  Selection kernels;
  int partials = 2;     // partial statistics of A: max, sum, ...
  bool argmax = false;  // and one of int32
  bool skips = false;   // products leave tiles out
  // Label smoothing is left out of the gradients of the logits and added to their products, so that
  // tiles can be skipped.
  bool smoothing_apart = false;
};
PlanTraits plan_traits(const Problem& problem, const PlanRequest& request,
                       const Selection& kernels);

/// Byte offsets of everything in the workspace. What a step needs only while it runs shares memory
/// with the other steps' under token chunks, as in core/planner.h; under vocab slices so do maxima of
/// kept scores, once these are gradients, and what the sweeps over slices need.
struct Layout {
  int64_t scalars = 0;          // CallScalars
  int64_t token_arrays = 0;     // kTokenArrays arrays of 8-byte numbers [N]
  int64_t bias = 0;             // A [V]
  int64_t class_weight = 0;     // A [V]
  int64_t bias_sum = 0;         // A [V]
  int64_t kept_maxima = 0;      // [tiles, kept tokens] fp32, of stored scores
  int64_t tiles = 0;            // [tiles, kept token tiles] bytes: which may not be skipped
  int64_t work_list = 0;        // which tiles a product does not skip: work_list_bytes()
  int64_t scores = 0;           // scores of the chunk [V, chunk_tokens]
  int64_t remainder = 0;        // lower halves of the fp32 sums of a bf16 grad_weight [V, D]
  int64_t exponents = 0;        // of compact sums of grad_weight [V or slice_vocab, exponents of D]
  int64_t input_exponents = 0;  // of those of grad_input, rows of tokens whose scores are not kept
  int64_t slice = 0;            // scores or gradients of one slice [slice_vocab, token_block]
  int64_t slice_tiles = 0;      // their tiles
  int64_t partials = 0;         // partial statistics of a token block, one array after another
  int64_t row_sums = 0;         // smoothing apart: sum_v w_v W[v], sum_n weighted_n x[n], [2, D]
  int64_t input_sum = 0;        // fp32 sums of grad_input
  int64_t weight_copy = 0;      // gradients moved out of grad_weight [slice_vocab, weight_block]
  int64_t weight_sum = 0;       // sums of a slice of grad_weight [slice_vocab, D] of A
  int64_t total = 0;
};
constexpr int kTokenArrays = 18;

Layout layout(const PlanRequest& request, const PlanTraits& traits, const Plan& plan);

/// Classes that share one entry of the partial statistics, for scores that are kept or not.
int64_t classes_per_range(const PlanRequest& request, const PlanTraits& traits, const Plan& plan,
                          bool kept);

/// Bytes of one kept score, and tokens whose scores fit a row of grad_weight.
int64_t kept_score_bytes(const PlanRequest& request, const PlanTraits& traits);
int64_t tokens_in_gradient_row(const PlanRequest& request, const PlanTraits& traits);

/// The predicted time of a plan, as multiply-adds of products that fill the GPU: those of its own
/// products, of tiles that stay empty, and what passes in the time of its launches and memory traffic.
double predicted_cost(const PlanRequest& request, const PlanTraits& traits, const Plan& plan);

/// make_plan for the problem on these kernels. Where cuBLAS would compute the products of gradients,
/// without anybody having asked for it or measured it under such a memory budget, and the handwritten
/// products are predicted to be faster (they need no fp32 sums beside the gradients), replaces them in
/// `kernels` and sets plan->own_products.
std::string choose_plan(const Problem& problem, const PlanRequest& request, Selection* kernels,
                        Plan* plan);
/// The kernels of a plan that choose_plan made, from the same selection.
Selection kernels_of_plan(const Selection& selection, const Plan& plan);

/// Returns an empty string and fills `plan`, or says why no plan fits and the least budget that does.
std::string make_plan(const PlanRequest& request, const PlanTraits& traits, Plan* plan);

}  // namespace memeff::cuda
