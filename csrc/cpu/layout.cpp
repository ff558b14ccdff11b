#include "cpu/layout.h"

#include <algorithm>

#include "core/planning.h"
#include "cpu/tiling.h"

namespace memeff {
namespace {

constexpr int64_t kAlignment = 64;  // a cache line keeps arrays apart

}  // namespace

int64_t score_bytes(const CpuPlanRequest& r) {
  return r.bf16_kernels ? 2 : size_of(accumulation_dtype(r.dtype));
}

int64_t stored_tokens(const CpuPlanRequest& r, const Plan& plan) {
  return std::min(r.tokens, plan.stored_in_gradient + plan.stored_chunks * plan.chunk_tokens);
}

int64_t thread_scratch_bytes(const CpuPlanRequest& r, const Plan& plan) {
  if (!r.bf16_kernels) return 0;
  const int64_t weight_task =
      kTaskRows * (sum_stride(kTaskColumns) * 4 + copy_stride(plan.weight_block) * 2);
  return round_up(r.grad_weight ? std::max(kScoreScratchBytes, weight_task) : kScoreScratchBytes,
                  kAlignment);
}

CpuLayout layout_workspace(const CpuPlanRequest& r, const Plan& plan, std::vector<Area>* areas) {
  const int64_t sum_bytes = size_of(accumulation_dtype(r.dtype));
  const int64_t tiles = ceil_div(r.vocab, kTileVocab);
  const int64_t block = plan.token_block;
  const int64_t features = round_up(r.features, kPanel);
  const int64_t sum_row = sum_stride(r.features);
  const int64_t slice = plan.slice_vocab;
  const bool chunks = plan.kind == PlanKind::kTokenChunks;
  const bool slices = plan.kind == PlanKind::kVocabSlices;
  const bool upcasts = !r.bf16_kernels && is_16_bit(r.dtype);
  const int64_t input_bytes = block * (r.bf16_kernels ? features * 2 : r.features * sum_bytes);
  const int64_t upcast_bytes = upcasts ? slice * r.features * sum_bytes : 0;

  Cursor cursor(kAlignment, areas);
  CpuLayout at;
  const int64_t arrays = kTokenArrays - 3 + 3 * std::max<int64_t>(1, r.targets);
  at.token_arrays = cursor.take(arrays * 8 * r.tokens);
  at.class_weight = cursor.take(r.vocab * sum_bytes);
  at.bias_sum = cursor.take(r.vocab * 8);
  at.thread_scratch = cursor.take(r.threads * thread_scratch_bytes(r, plan));

  const int64_t free_chunk = round_up(plan.stored_in_gradient, kPanel);
  const int64_t paid_chunk = round_up(plan.chunk_tokens, kPanel);
  const bool pays = plan.stored_chunks > 0 || (chunks && plan.stored_in_gradient < r.tokens);
  if (r.bf16_kernels) {
    const int64_t kept =
        chunks ? std::max(free_chunk, paid_chunk) : free_chunk + plan.stored_chunks * paid_chunk;
    at.kept_maxima = cursor.take(tiles * kept * sum_bytes);
  }
  if (pays) at.scores = cursor.take(r.vocab * paid_chunk * score_bytes(r));
  if (plan.accumulation == Accumulation::kFloat32 && r.dtype == DType::kBFloat16 && r.grad_weight) {
    at.remainder = cursor.take(r.vocab * r.features * 2);
  }
  if (plan.accumulation == Accumulation::kCompact) {
    at.exponents = cursor.take(r.vocab * ceil_div(r.features, kCompactBlock));
  }
  const bool discards = !chunks && !r.bf16_kernels;  // bf16 kernels discard scores tile by tile
  if (slices || discards) at.score_slice = cursor.take(slice * block * score_bytes(r));

  const int64_t steps = cursor.offset();
  at.score_step.input_block = cursor.take(input_bytes);
  at.score_step.weight_block = cursor.take(upcast_bytes);
  at.score_step.partials = cursor.take(r.partials * tiles * block * sum_bytes);
  if (r.shared_numbers > 0) {
    at.score_step.own_numbers = cursor.take(r.shared_numbers * block * 8);
    at.score_step.all_numbers = cursor.take(r.ranks * r.shared_numbers * block * 8);
  }

  const int64_t sweeps = cursor.offset();
  if (r.grad_input) {
    if (chunks) cursor.move_to(steps);
    if (is_16_bit(r.dtype)) {
      // A slice adds to the sums of all tokens but those of kept chunks; these, and a sweep of its own,
      // are finished block by block.
      const bool all_tokens = slices && r.grad_weight && !plan.separate_sweeps;
      const int64_t summed =
          all_tokens ? std::max(block, r.tokens - stored_tokens(r, plan)) : block;
      at.input_step.sum = cursor.take(summed * sum_row * sum_bytes);
    }
    at.input_step.weight_block = cursor.take(r.bf16_kernels ? slice * features * 2 : upcast_bytes);
    if (r.bf16_kernels) {
      at.input_step.gradient_block = cursor.take(slice * round_up(block, kMicroRows) * 2);
    }
    if (plan.separate_sweeps) cursor.move_to(sweeps);
  }
  if (r.grad_weight) {
    // The sums of grad_input are still being added up over the ranks, if there are some.
    if (chunks && r.ranks == 0) cursor.move_to(steps);
    at.weight_step.input_block = cursor.take(input_bytes / block * plan.weight_block);
    const bool one_product =
        r.bf16_kernels && chunks &&
        plan.weight_block >= std::max(plan.stored_in_gradient, plan.chunk_tokens);
    if (!one_product) at.weight_step.sum = cursor.take(slice * sum_row * sum_bytes);
  }
  at.total = cursor.end();
  return at;
}

}  // namespace memeff
