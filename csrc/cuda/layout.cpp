// The workspace of a plan.
#include "cuda/plan_sizes.h"

#include <algorithm>

#include "core/compact_sum.h"
#include "core/planning.h"
#include "cuda/layout.h"
#include "cuda/tokens.h"
#include "cuda/work_list.h"

namespace memeff::cuda {
namespace {

constexpr int64_t kAlignment = 256;  // what kernels and TMA like best
constexpr int64_t kRow = 8;          // tokens to which rows of blocks are padded: 16 bytes

int64_t tiles(int64_t classes) { return ceil_div(classes, kStoredTile); }
int64_t token_tiles(int64_t tokens) { return ceil_div(tokens, kTokenTile); }

/// Whether all kept scores have become gradients, and their maxima are of no more use, before the
/// sweeps over slices begin: the driver computes grad_input from kept scores first. Products of
/// scores as they are need them to the end.
bool maxima_end_early(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  return t.keeps_16_bits && plan.kind == PlanKind::kVocabSlices && r.grad_input &&
         !plan.products_from_scores;
}

/// Classes whose compact sums exist at a time.
int64_t summed_classes(const PlanRequest& r, const Plan& plan) {
  return plan.kind == PlanKind::kTokenChunks ? r.vocab : std::min(r.vocab, plan.slice_vocab);
}

/// Whether the statistics see scores that are not kept.
bool drops_scores(const PlanRequest& r, const Plan& plan) {
  return plan.kind != PlanKind::kTokenChunks &&
         kept_tokens(r, plan) < std::max<int64_t>(1, r.tokens);
}

/// The most tokens whose sums of grad_input ranks add up at a time.
int64_t longest_reduction(const Plan& plan) {
  return std::max({plan.input_block, plan.token_block, plan.input_sweep_block});
}

/// Bytes of the longest list of tiles for a product, of the driver's blocks and slices.
int64_t longest_list(const PlanRequest& r, const Plan& plan) {
  int64_t bytes = 0;
  const auto product = [&](int64_t classes, int64_t tokens) {
    const int64_t v = tiles(std::min(classes, r.vocab)),
                  n = token_tiles(std::min(tokens, r.tokens));
    if (r.grad_input) bytes = std::max(bytes, work_list_bytes(n, v));
    if (r.grad_weight) bytes = std::max(bytes, work_list_bytes(v, n));
  };
  product(plan.input_slice, plan.input_block);
  product(plan.slice_vocab, std::max(plan.weight_block, plan.token_block));
  product(plan.input_sweep_slice, plan.input_sweep_block);
  return bytes;
}

}  // namespace

bool writes_gradients(const PlanTraits& t) {
  return t.kernels.products.fused() && !t.smoothing_apart;
}

bool writes_input(const PlanRequest& r, const PlanTraits& t) {
  return writes_gradients(t) && r.ranks == 0;
}

int64_t kept_tokens(const PlanRequest& r, const Plan& plan) {
  const int64_t rest = std::max<int64_t>(0, r.tokens - plan.stored_in_gradient);
  const int64_t chunk = std::min(rest, plan.chunk_tokens);
  if (plan.kind == PlanKind::kTokenChunks) return std::max(plan.stored_in_gradient, chunk);
  return plan.stored_in_gradient + plan.stored_chunks * chunk;
}

int64_t fresh_tokens(const PlanRequest& r, const Plan& plan) {
  if (plan.kind != PlanKind::kVocabSlices) return 0;
  return r.statistics_known ? r.tokens : r.tokens - kept_tokens(r, plan);
}

int64_t summed_tokens(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  if (!r.grad_input || !is_16_bit(r.dtype)) return 0;
  int64_t rows = 0;
  if (!writes_input(r, t) && kept_tokens(r, plan) > 0) rows = plan.input_block;
  if (plan.kind == PlanKind::kVocabSlices) {
    const bool all_at_once = r.grad_weight && !plan.separate_sweeps && !plan.compact_input_sums;
    const int64_t fresh = fresh_tokens(r, plan);
    const bool at_once =
        writes_input(r, t) && (plan.compact_input_sums || plan.input_sweep_slice >= r.vocab);
    if (!at_once)
      rows = std::max(rows, all_at_once ? fresh : std::min(plan.input_sweep_block, fresh));
  }
  return std::min(rows, r.tokens);
}

int64_t summed_while_kept(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  const bool sums = r.grad_input && is_16_bit(r.dtype) && !writes_input(r, t);
  return sums && kept_tokens(r, plan) > 0 ? std::min(plan.input_block, r.tokens) : 0;
}

int64_t rows_of_parts(const PlanRequest& r, const Plan& plan) {
  return plan.input_parts == 1 ? 0 : plan.input_parts * std::min(plan.input_block, r.tokens);
}

bool products_write_weight(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  if (!writes_gradients(t)) return false;
  if (plan.kind == PlanKind::kTokenChunks) return plan.weight_block >= kept_tokens(r, plan);
  if (plan.accumulation == Accumulation::kCompact) return true;
  const bool all_fresh = fresh_tokens(r, plan) == r.tokens;
  const bool all_in_gradient = plan.stored_in_gradient == r.tokens;
  return (all_fresh || all_in_gradient) && plan.token_block >= r.tokens;
}

int64_t kept_score_bytes(const PlanRequest& r, const PlanTraits& t) {
  return t.keeps_16_bits ? 2 : accumulation_size(r);
}

int64_t classes_per_range(const PlanTraits& t) {
  return t.keeps_16_bits ? kStoredTile : kGenericRange;
}

Layout layout(const GpuPlanRequest& r, const PlanTraits& t, const Plan& plan,
              std::vector<Area>* areas) {
  const int64_t sum_bytes = accumulation_size(r);
  const bool fused = t.kernels.scores.fused();
  const int64_t kept = kept_tokens(r, plan);
  const int64_t block = round_up(std::min(plan.score_block, std::max<int64_t>(1, r.tokens)), kRow);

  Cursor cursor(kAlignment, areas);
  Layout at;
  at.scalars = cursor.take(sizeof(CallScalars));
  at.token_arrays = cursor.take(kTokenArrays * 8 * r.tokens);
  if (r.ranks > 0) {
    const int64_t tokens = std::min(r.tokens, std::max(plan.score_block, plan.token_block));
    const int64_t bytes = std::max(kTotals, t.shared_numbers * tokens) * 8;
    at.own_numbers = cursor.take(bytes);
    at.all_numbers = cursor.take(r.ranks * bytes);
    if (t.rounds_sums)
      at.rounded_sums = cursor.take(std::min(r.tokens, longest_reduction(plan)) * r.features * 2);
  }
  at.bias = cursor.take(r.vocab * sum_bytes);
  at.class_weight = cursor.take(r.vocab * sum_bytes);
  at.bias_sum = cursor.take(r.vocab * sum_bytes);
  if (t.skips) {
    at.tiles = cursor.take(tiles(r.vocab) * (token_tiles(kept) + 2));
    at.work_list = cursor.take(longest_list(r, plan));
  }
  const int64_t chunk = std::min(plan.chunk_tokens, r.tokens - plan.stored_in_gradient);
  if (chunk > 0) at.scores = cursor.take(r.vocab * round_up(chunk, kRow) * kept_score_bytes(r, t));
  if (plan.accumulation == Accumulation::kFloat32 && r.dtype == DType::kBFloat16 && r.grad_weight)
    at.remainder = cursor.take(r.vocab * r.features * 2);
  if (plan.accumulation == Accumulation::kCompact && r.grad_weight)
    at.exponents = cursor.take(summed_classes(r, plan) * compact_exponent_stride(r.features));
  if (plan.compact_input_sums)
    at.input_exponents = cursor.take(fresh_tokens(r, plan) * compact_exponent_stride(r.features));
  if (t.smoothing_apart) at.row_sums = cursor.take(2 * r.features * 4);
  const auto take_maxima = [&] {
    if (!t.keeps_16_bits) return;
    // Under vocab slices the blocks in grad_weight and in the workspace are alive at the same time.
    const int64_t first =
        plan.kind == PlanKind::kVocabSlices ? std::min(plan.stored_in_gradient, kept) : 0;
    at.kept_maxima =
        cursor.take(tiles(r.vocab) * (round_up(first, kRow) + round_up(kept - first, kRow)) * 4);
  };
  const auto take_slice = [&] {
    const int64_t most = fresh_tokens(r, plan);
    if (most == 0) return;
    const int64_t blocks[2] = {std::min(plan.token_block, most),
                               std::min(plan.input_sweep_block, most)};
    const int64_t slices[2] = {plan.slice_vocab, plan.input_sweep_slice};
    const auto larger = [](int64_t x, int64_t y) { return std::max(x, y); };
    at.slice = cursor.take(
        larger(slices[0] * round_up(blocks[0], kRow), slices[1] * round_up(blocks[1], kRow)) *
        (fused ? 2 : sum_bytes));
    if (t.skips)
      at.slice_tiles = cursor.take(larger(tiles(slices[0]) * token_tiles(blocks[0]),
                                          tiles(slices[1]) * token_tiles(blocks[1])));
    if (fused && r.grad_bias)
      at.bias_partials = cursor.take(larger(slices[0] * bias_partial_stride(blocks[0]),
                                            slices[1] * bias_partial_stride(blocks[1])) *
                                     4);
  };
  const bool early = maxima_end_early(r, t, plan);
  if (!early) take_maxima(), take_slice();

  // First the statistics, then the sums of grad_input that kept scores make.
  const int64_t steps = cursor.offset();
  if (!r.statistics_known) {
    const int64_t ranges = ceil_div(r.vocab, classes_per_range(t));
    const auto bytes = [&](bool is_kept) {
      const int64_t arrays = t.partials - (t.keeps_16_bits && is_kept ? 1 : 0);  // maxima are kept
      return ranges * block * (arrays * sum_bytes + (t.argmax ? 4 : 0)) +
             (t.partials + 1) * kAlignment;
    };
    const bool some_kept = kept > 0, some_not = drops_scores(r, plan);
    at.partials = cursor.take(
        std::max(some_kept ? bytes(true) : 0, some_not || !some_kept ? bytes(false) : 0));
    // Products that are kept as they are lie there at once.
    if (!fused && (t.keeps_16_bits || some_not))
      at.products = cursor.take(plan.slice_vocab * block * sum_bytes);
  }
  if (early) {
    const int64_t sums = summed_while_kept(r, t, plan) * r.features * 4;
    cursor.move_to(std::max(cursor.offset(), steps + round_up(sums, kAlignment)));
    take_maxima();
  }

  // Then the sweeps, or the rest of a chunk.
  cursor.move_to(steps);
  const int64_t sums = std::max(summed_tokens(r, t, plan), rows_of_parts(r, plan));
  if (sums > 0) at.input_sum = cursor.take(sums * r.features * 4);
  const int64_t input_end = cursor.offset();
  // Sums of a chunk that ranks are adding up stay where they are.
  const bool after_sums = plan.kind == PlanKind::kTokenChunks && r.ranks == 0;
  if (after_sums || plan.separate_sweeps) cursor.move_to(steps);
  if (t.copies_input)
    at.input_copy = cursor.take(plan.copied_tokens * round_up(r.features, kRow) * size_of(r.dtype));
  if (r.grad_weight) {
    if (!products_write_weight(r, t, plan)) {
      at.weight_sum = cursor.take(plan.slice_vocab * r.features * sum_bytes);
    } else if (plan.stored_in_gradient > 0) {
      at.weight_copy = cursor.take(plan.slice_vocab * round_up(plan.stored_in_gradient, kRow) * 2);
    }
  }
  if (early) {
    cursor.move_to(std::max(cursor.offset(), input_end));
    take_slice();
  }
  at.total = cursor.end();
  return at;
}

}  // namespace memeff::cuda
