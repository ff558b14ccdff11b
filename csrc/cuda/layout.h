// The workspace of a plan on a GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "core/planning.h"
#include "cuda/kernel_arguments.h"
#include "cuda/plan.h"

namespace memeff::cuda {

/// Byte offsets of everything in the workspace. What a step needs only while it runs shares memory
/// with the other steps' under token chunks, as on the CPU; under vocab slices so do maxima of
/// kept scores, once these are gradients, and what the sweeps over slices need.
struct Layout {
  int64_t scalars = 0;          // CallScalars
  int64_t token_arrays = 0;     // kTokenArrays arrays of 8-byte numbers [N]
  int64_t own_numbers = 0;      // what ranks exchange of a block [shared_numbers, tokens], fp64,
  int64_t all_numbers = 0;      // [ranks, shared_numbers, tokens]
  int64_t rounded_sums = 0;     // rounds_sums: sums of grad_input of a block, bf16
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
  int64_t slice = 0;        // gradients of one slice [slice_vocab, token_block]; products at first
  int64_t slice_tiles = 0;  // their tiles
  int64_t bias_partials = 0;  // fused: sums over kBiasTokens tokens of each of its classes, fp32
  int64_t partials = 0;       // partial statistics of a token block, one array after another
  int64_t products = 0;       // generic kernels: their products, slice by slice
  int64_t row_sums = 0;       // smoothing apart: sum_v w_v W[v], sum_n weighted_n x[n], [2, D]
  int64_t input_sum = 0;      // fp32 sums of grad_input
  int64_t input_copy = 0;     // copies_input: hidden states of a product's tokens [tokens, D]
  int64_t weight_copy = 0;    // gradients moved out of grad_weight [slice_vocab, weight_block]
  int64_t weight_sum = 0;     // sums of a slice of grad_weight [slice_vocab, D] of A
  int64_t total = 0;
};
constexpr int kTokenArrays = 20;

/// `areas`, if given, gets everything in it at its exact size.
Layout layout(const GpuPlanRequest& request, const PlanTraits& traits, const Plan& plan,
              std::vector<Area>* areas = nullptr);

/// Elements between the rows of bias_partials: whole vectors.
inline int64_t bias_partial_stride(int64_t tokens) {
  return round_up(ceil_div(tokens, kBiasTokens), int64_t{4});
}

/// Classes that share one entry of the partial statistics.
int64_t classes_per_range(const PlanTraits& traits);

}  // namespace memeff::cuda
