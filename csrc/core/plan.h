// How a call runs and how many bytes of workspace it takes, decided before anything is allocated by the
// planner of the device (cpu/plan.h, cuda/plan.h).
//
// Two kinds of plan (docs/design.md has the pictures):
//   token chunks   scores of a chunk of tokens are kept (16 bits each) until the chunk's softmax
//                  statistics are known, then turned into gradients in place.          6 N D V FLOPs
//   vocab slices   statistics first; then, slice by slice of the vocabulary, scores are
//                  computed again and all tokens contribute to that slice of grad_weight
//                  in one go, so it is rounded once and needs no accumulator.          8 N D V FLOPs
//
// grad_weight's own memory serves as storage: row v of it has room for the scores of D tokens (for a
// 16-bit score), and is read back just before the row's gradient overwrites it. Up to D tokens are
// therefore kept for free in either plan; vocab slices then recompute only the rest.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace memeff {

enum class PlanKind {
  kStatistics,  // no gradient wanted
  kTokenChunks,
  kVocabSlices,
};

/// How the caller wants contributions of several token chunks to grad_weight to add up.
enum class GradAccumulation { kAuto, kFloat32 };

/// How they do.
enum class Accumulation {
  kExact,    // each element written once
  kFloat32,  // in fp32: bf16 gradients hold the upper 16 bits of it; or in fp64, as the gradient is
  kCompact,  // 16 bits per element that share exponents: 32 times finer than bf16; chunks of tokens, or
             // under vocab slices (GPU) the parts of a slice
};

/// Whether Accumulation::kFloat32 exists: fp16 gradients are no halves of fp32 sums.
inline bool has_float32_sums(DType dtype) { return dtype != DType::kFloat16; }

/// What a caller chooses about how a call is computed, and which gradients it wants.
struct PlanOptions {
  bool grad_input = false;
  bool grad_weight = false;
  bool grad_bias = false;
  int64_t memory_budget = -1;  // bytes; -1: none given
  int64_t chunk_size = 0;      // tokens; 0: the planner's choice
  GradAccumulation accumulation = GradAccumulation::kAuto;
};

/// What every planner must know of a call. Ranks that share a vocabulary plan the same request: the largest
/// shard, the smallest budget, the most threads.
struct PlanRequest : PlanOptions {
  int64_t tokens = 0;
  int64_t features = 0;
  int64_t vocab = 0;
  int64_t ranks = 0;     // that share the vocabulary; 0: nobody does
  int most_threads = 0;  // of a rank; 0: those of this process
  DType dtype = DType::kFloat32;
  bool statistics_known = false;  // the backward op: lse is an input
};

/// A complete plan: planners fill every field that its kind of plan has.
struct Plan {
  std::string kernels, kernels_reason;  // what computes it, and why
  PlanKind kind = PlanKind::kStatistics;
  Accumulation accumulation = Accumulation::kExact;
  int64_t stored_in_gradient = 0;  // tokens of the first chunk, whose scores live in grad_weight
  int64_t chunk_tokens = 0;        // tokens of every other stored chunk
  int64_t stored_chunks = 0;  // vocab slices: chunks of chunk_tokens kept in the workspace (0 or 1)
  int64_t token_block = 0;    // tokens that pass through the matrix products together
  int64_t score_block = 0;    // the same where statistics are computed
  int64_t weight_block = 0;   // tokens per grad_weight product: whole chunks if there is room
  int64_t slice_vocab = 0;    // vocabulary rows that pass together
  // How kept scores are divided for grad_input:
  int64_t input_block = 0;       // tokens
  int64_t input_slice = 0;       // vocabulary rows
  bool separate_sweeps = false;  // vocab slices: one sweep for grad_input, one for grad_weight
  // Vocab slices: grad_input adds up over slices in compact sums, rather than in fp32 sums of all tokens
  // whose scores are not kept.
  bool compact_input_sums = false;
  // Tokens and vocabulary rows that pass together in a sweep for grad_input alone.
  int64_t input_sweep_block = 0;
  int64_t input_sweep_slice = 0;
  int64_t num_chunks = 0;
  int64_t num_slices = 0;
  // What the budget bounds is the sum of these two; where no plan fits it, those of the smallest plan.
  int64_t workspace_bytes = 0;
  int64_t library_bytes = 0;  // what products take in addition
  int64_t floor_bytes = 0;    // the gradients themselves
  double flops = 0;
  double floor_flops = 0;  // 2 N D V per product that any implementation needs
  // What products alone would do in this plan's predicted time; 0 where the planner predicts none: on the CPU
  // for vocab slices, statistics and the bf16 kernels.
  double predicted_flops = 0;
};

}  // namespace memeff
