// Decides, before anything is allocated, how a call runs and how many bytes of workspace it takes.
//
// Two plans (docs/design.md has the pictures):
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

struct PlanRequest {
  int64_t tokens = 0;
  int64_t features = 0;
  int64_t vocab = 0;
  DType dtype = DType::kFloat32;
  bool bf16_kernels = false;  // scores come from the fused bf16 kernels (16 bits each)
  bool compact_sums = false;  // the backend can keep sums of a bf16 grad_weight in this form
  bool cpu_blas = false;     // a BLAS computes the products; it packs operands in memory of its own
  bool gpu_upcasts = false;  // the GPU does not multiply the dtype: operands are upcast by torch
  int64_t multiprocessors = 132;  // of the GPU
  bool grad_input = false;
  bool grad_weight = false;
  bool grad_bias = false;
  bool statistics_known = false;  // the backward op: lse is an input
  int partials = 2;     // per-tile partial sums: max, sum [, smoothing] [, entropy, argmax]
  int64_t targets = 1;  // class indices per token
  int threads = 1;
  int64_t memory_budget = -1;  // bytes; -1: none given
  int64_t chunk_size = 0;      // tokens; 0: the planner's choice
  GradAccumulation accumulation = GradAccumulation::kAuto;
};

struct Plan {
  PlanKind kind = PlanKind::kStatistics;
  Accumulation accumulation = Accumulation::kExact;
  int64_t stored_in_gradient = 0;  // tokens of the first chunk, whose scores live in grad_weight
  int64_t chunk_tokens = 0;        // tokens of every other stored chunk
  int64_t stored_chunks = 0;  // vocab slices: chunks of chunk_tokens kept in the workspace (0 or 1)
  int64_t token_block = 0;    // tokens that pass through the matrix products together
  int64_t score_block = 0;    // the same where statistics are computed; 0: token_block
  int64_t weight_block = 0;   // tokens per grad_weight product: whole chunks if there is room
  int64_t slice_vocab = 0;    // vocabulary rows that pass together
  // How kept scores are divided for grad_input; 0: like everything else.
  int64_t input_block = 0;       // tokens
  int64_t input_slice = 0;       // vocabulary rows
  bool separate_sweeps = false;  // vocab slices: one sweep for grad_input, one for grad_weight
  // Vocab slices: grad_input adds up over slices in compact sums, rather than in fp32 sums of all tokens
  // whose scores are not kept.
  bool compact_input_sums = false;
  bool own_products = false;          // GPU: handwritten products of gradients are predicted to win
  bool products_from_scores = false;  // kept scores go into the products of gradients as they are
  // Tokens and vocabulary rows that pass together in the sweep for grad_input; 0: as in the other.
  int64_t input_sweep_block = 0;
  int64_t input_sweep_slice = 0;
  int64_t num_chunks = 0;
  int64_t num_slices = 0;
  int64_t workspace_bytes = 0;
  int64_t library_bytes = 0;  // what products take beside; the budget bounds the sum of the two
  int64_t floor_bytes = 0;    // the gradients themselves
  double flops = 0;
  double floor_flops = 0;  // 2 N D V per product that any implementation needs
  // Of products that would fill a GPU for as long as this plan is predicted to take; 0 on the CPU.
  double predicted_flops = 0;
};

/// Byte offsets of everything a plan keeps in its one workspace allocation.
///
/// What a step needs only while it runs is grouped by step. Under token chunks the steps follow one
/// another and share memory; under vocab slices they alternate and each has its own.
struct WorkspaceLayout {
  int64_t token_arrays =
      0;  // kTokenArrays arrays of 8-byte numbers [N], of which two are [N, targets]
  int64_t class_arrays = 0;    // class weights and sum of the bias gradient, [2, V]
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

constexpr int kTokenArrays = 14;
/// A tile of scores and the weight rows that it is computed from.
constexpr int64_t kScoreScratchBytes = 672 * 1024;

/// Bytes of one stored score.
int64_t score_bytes(const PlanRequest& request);
/// Whether Accumulation::kFloat32 exists: fp16 gradients are no halves of fp32 sums.
inline bool has_float32_sums(DType dtype) { return dtype != DType::kFloat16; }
/// Tokens whose scores fit a row of grad_weight.
int64_t tokens_per_gradient_row(const PlanRequest& request);

int64_t thread_scratch_bytes(const PlanRequest& request, const Plan& plan);
WorkspaceLayout layout_workspace(const PlanRequest& request, const Plan& plan);
/// Upper bound of the memory in which a BLAS on the CPU packs the operands of any plan's products.
int64_t library_bytes(const PlanRequest& request);

/// Completes a plan by its FLOPs, bytes of the gradients, and numbers of chunks and slices.
/// `fresh_tokens`: those whose gradients are computed from scores that are made for them.
void count_work(const PlanRequest& request, int64_t fresh_tokens, Plan* plan);

/// Returns an empty string and fills `plan`, or says why no plan fits (and the least budget that would).
std::string make_plan(const PlanRequest& request, Plan* plan);

}  // namespace memeff
