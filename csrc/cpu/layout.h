// The workspace of a plan on the CPU.
#pragma once

#include <vector>

#include "core/planning.h"
#include "cpu/plan.h"

namespace memeff {

/// Byte offsets of everything a plan keeps in its one workspace allocation.
///
/// What a step needs only while it runs is grouped by step. Under token chunks the steps follow one
/// another and share memory; under vocab slices they alternate and each has its own.
struct CpuLayout {
  int64_t token_arrays = 0;    // kTokenArrays of 8-byte numbers [N], three of them [N, targets]
  int64_t class_weight = 0;    // [V]
  int64_t bias_sum = 0;        // sum of the bias gradient [V], in fp64
  int64_t thread_scratch = 0;  // [threads, thread_scratch_bytes()]
  int64_t kept_maxima = 0;     // per-tile maxima of stored chunks (bf16 kernels)
  int64_t scores = 0;          // stored scores [V, chunk_tokens]
  int64_t remainder = 0;       // lower halves of the fp32 sums of a bf16 grad_weight [V, D]
  int64_t exponents = 0;       // bytes of its compact sums [V, D / kCompactBlock]
  int64_t score_slice = 0;     // vocab slices: scores of one slice [slice_vocab, token_block]
  struct {
    int64_t input_block = 0;   // packed (bf16 kernels) or gathered hidden states of a token block
    int64_t weight_block = 0;  // upcast rows of the classifier
    int64_t partials = 0;      // per-tile partial sums [partials, tiles, token_block]
    int64_t own_numbers = 0;   // what ranks exchange of a block [shared_numbers, token_block], and
    int64_t all_numbers = 0;   // [ranks, shared_numbers, token_block], in fp64
  } score_step;
  struct {
    int64_t sum = 0;             // fp32 sums, when grad_input itself has 16 bits
    int64_t weight_block = 0;    // packed or upcast rows of the classifier
    int64_t gradient_block = 0;  // packed dlogits of a token block
  } input_step;
  struct {
    int64_t input_block = 0;  // as above, for weight_block tokens
    int64_t sum = 0;  // one slice of grad_weight [slice_vocab, D], unless one product gives it
  } weight_step;
  int64_t total = 0;
};

constexpr int kTokenArrays = 15;
/// A tile of scores and the weight rows that it is computed from.
constexpr int64_t kScoreScratchBytes = 672 * 1024;

/// Bytes of one stored score.
int64_t score_bytes(const CpuPlanRequest& request);
/// Vocab slices: tokens whose scores are kept.
int64_t stored_tokens(const CpuPlanRequest& request, const Plan& plan);

int64_t thread_scratch_bytes(const CpuPlanRequest& request, const Plan& plan);
/// `areas`, if given, gets everything in it at its exact size.
CpuLayout layout_workspace(const CpuPlanRequest& request, const Plan& plan,
                           std::vector<Area>* areas = nullptr);

}  // namespace memeff
