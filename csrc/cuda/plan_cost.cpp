#include "cuda/plan_cost.h"

#include <algorithm>

#include "core/math.h"
#include "core/planning.h"
#include "cuda/plan_sizes.h"

namespace memeff::cuda {
namespace {

// The part of a tile's epilogue that no tile's products hide, as so many more terms of its sums: some
// 1250 cycles of 2048 multiply-adds for 32768 sums, and 3700 where these are compact ones.
constexpr int64_t kEpilogueDepth = 80, kCompactEpilogueDepth = 230;
// Multiply-adds that a GPU with tensor cores does while it moves one byte: about 80 on H100 and H200,
// 75 on A100, 100 on T4; and while it starts a kernel and waits for its last tiles, about 4 us.
constexpr double kMultiplyAddsPerByte = 80;
constexpr double kMultiplyAddsPerLaunch = 1.4e9;
// While the last blocks of products that overlap end: half of their 75 us.
constexpr double kMultiplyAddsPerLastBlocks = 1.3e10;
// Of a launch that overlaps the one before it.
constexpr double kMultiplyAddsPerOverlappedLaunch = 0.5e9;
// Sums that are added to again and again, and what one kernel leaves to the next, stay in the L2 cache
// up to about this size, which moves about three times as many bytes in a second as memory does.
constexpr int64_t kCachedBytes = int64_t{24} << 20;
constexpr int64_t kCacheSpeed = 3;

/// Tiles of a product fill the GPU round by round; where it overlaps others
/// (ProductOutput::overlaps_previous) these fill its last round and the time of its launch. cuBLAS
/// divides long sums, or takes smaller tiles, so that at most a quarter of a round stays empty.
enum class Rounds { kWhole, kShared, kLibrary };

Rounds rounds_of(const KernelSet& kernels) {
  return kernels.fused() ? Rounds::kWhole : Rounds::kLibrary;
}

/// Multiply-adds in the time of a product [rows, columns] whose sums are over `depth`, launched in
/// parts, and each part `pieces` times. Tiles at the edges count in full, as do the last rounds.
double product_cost(const GpuPlanRequest& r, int64_t rows, int64_t row_part, int64_t columns,
                    int64_t column_part, int64_t depth, int64_t pieces, Rounds rounds,
                    int64_t epilogue = kEpilogueDepth) {
  double cost = 0;
  // Parts of one size, and what is left over.
  const auto for_each_part = [](int64_t size, int64_t part, const auto& visit) {
    part = std::clamp<int64_t>(part, 1, std::max<int64_t>(1, size));
    if (size >= part) visit(part, size / part);
    if (size % part > 0) visit(size % part, 1);
  };
  for_each_part(rows, row_part, [&](int64_t height, int64_t vertical) {
    for_each_part(columns, column_part, [&](int64_t width, int64_t horizontal) {
      const int64_t tiles = ceil_div(height, kTileRows) * ceil_div(width, kTileColumns);
      const int64_t round = rounds == Rounds::kWhole     ? 4 * r.multiprocessors
                            : rounds == Rounds::kLibrary ? r.multiprocessors
                                                         : 1;
      const int64_t elements = round_up(4 * tiles, round) / 4 * kTileRows * kTileColumns;
      cost +=
          static_cast<double>(vertical * horizontal) *
          (static_cast<double>(elements) * static_cast<double>(depth + pieces * epilogue) +
           static_cast<double>(rounds == Rounds::kShared ? 0 : pieces) * kMultiplyAddsPerLaunch);
    });
  });
  return cost;
}

int64_t parts_of(int64_t tokens, int64_t part) {
  return ceil_div(tokens, std::max<int64_t>(1, part));
}

/// What moving `bytes` takes, as bytes of memory traffic, where `resident` of them lie side by side.
int64_t traffic(int64_t bytes, int64_t resident) {
  return resident > kCachedBytes ? bytes : bytes / kCacheSpeed;
}

/// The product that makes scores of `tokens` tokens, and the kernels between it and what comes next.
/// `kept`: they are; `gradients`: they become that at once.
double score_cost(const GpuPlanRequest& r, const PlanTraits& t, int64_t tokens, int64_t block,
                  int64_t slice, bool kept, bool gradients, int64_t* bytes) {
  const int64_t v = r.vocab, d = r.features;
  if (t.kernels.scores.fused())
    return product_cost(r, tokens, block, v, gradients ? slice : v, d, 1, Rounds::kWhole);
  const int64_t size = accumulation_size(r), part = kept && !t.keeps_16_bits ? v : slice;
  *bytes += traffic(tokens * v * size, std::min(block, tokens) * part * size);
  if (kept && t.keeps_16_bits) *bytes += tokens * v * 2;
  if (gradients)
    *bytes += traffic(tokens * v * size_of(r.dtype), std::min(block, tokens) * part * size);
  const auto launches = static_cast<double>(parts_of(tokens, block) * parts_of(v, part));
  return product_cost(r, tokens, block, v, part, d, 1, Rounds::kLibrary) +
         launches * kMultiplyAddsPerLaunch;
}

/// Under token chunks, whether a chunk's gradient products overlap. (Those of
/// scores in the gradient cannot: a copy lies in between.)
bool products_overlap(const GpuPlanRequest& r, const PlanTraits& t, const Plan& plan) {
  return r.grad_input && r.grad_weight && plan.kind == PlanKind::kTokenChunks && !t.skips &&
         t.kernels.products.architecture->overlaps_launches && products_write_weight(r, t, plan);
}

/// The products that make grad_weight, and the bytes that they move back and forth.
double weight_cost(const GpuPlanRequest& r, const PlanTraits& t, const Plan& plan, int64_t* bytes) {
  const int64_t n = r.tokens, d = r.features, v = r.vocab, slice = plan.slice_vocab;
  const int64_t fresh = fresh_tokens(r, plan), kept = n - fresh;
  const int64_t stored = plan.stored_in_gradient, rest = n - stored;
  const bool direct = products_write_weight(r, t, plan);
  const int64_t epilogue = direct && plan.accumulation == Accumulation::kCompact
                               ? kCompactEpilogueDepth
                               : kEpilogueDepth;
  // Tokens of one product, of those that pass together.
  const bool in_pieces = t.copies_input && !t.kernels.products.fused();
  const auto at_once = [&](int64_t block) {
    return in_pieces ? std::min(block, plan.copied_tokens) : block;
  };
  double cost;
  int64_t passes = 1,
          products;  // passes: terms that are added in the gradient or in sums of their own
  const Rounds alone = rounds_of(t.kernels.products);
  if (plan.kind == PlanKind::kTokenChunks) {
    const int64_t blocks = parts_of(kept_tokens(r, plan), at_once(plan.weight_block));
    const int64_t others = rest > 0 ? parts_of(rest, plan.chunk_tokens) : 0;
    passes = std::max<int64_t>(1, (stored > 0 ? 1 : 0) + others);
    products = passes * blocks;
    const Rounds rounds = products_overlap(r, t, plan) ? Rounds::kShared : alone;
    cost = product_cost(r, v, slice, d, d, stored, stored > 0 ? blocks : 0, alone, epilogue) +
           product_cost(r, v, slice, d, d, rest, others * blocks, rounds, epilogue);
    if (rounds == Rounds::kShared) cost += static_cast<double>(others) * kMultiplyAddsPerLastBlocks;
  } else {
    const int64_t block = at_once(plan.token_block);
    products = parts_of(kept, block) + parts_of(fresh, block);
    cost = product_cost(r, v, slice, d, d, n, products, alone, epilogue);
    if (direct) passes = std::max<int64_t>(1, products);
  }
  // An fp32 sum that is added to moves 8 bytes, its halves back and forth; a compact one 4.
  const bool halves = plan.accumulation == Accumulation::kFloat32;
  const int64_t moved = v * d * (halves ? 8 * passes - 6 : 4 * passes - 2);
  if (direct && t.kernels.products.architecture->overlaps_epilogue)
    cost = std::max(cost, static_cast<double>(moved) * kMultiplyAddsPerByte);
  else
    *bytes += moved;
  if (!direct) {  // sums in the workspace, and parts of them where there are more than the cache holds
    *bytes += traffic(v * d * 8 * passes, slice * d * 4);
    if (slice * d * 4 > kCachedBytes) *bytes += v * d * 8 * (products - passes);
    cost += static_cast<double>(passes * parts_of(v, slice)) * kMultiplyAddsPerLaunch;
  }
  if (direct) *bytes += stored * v * 4;  // moved out of the gradient
  if (t.copies_input) {
    // Once, or where blocks of tokens take turns in the copy, for each slice of classes.
    const int64_t turns = plan.kind == PlanKind::kTokenChunks ? kept_tokens(r, plan) : n;
    const int64_t times = turns > plan.copied_tokens ? parts_of(v, slice) : 1;
    *bytes += n * d * 2 * size_of(r.dtype) * times;
    cost += static_cast<double>(times * parts_of(n, plan.copied_tokens)) * kMultiplyAddsPerLaunch;
  }
  return cost;
}

/// grad_input of token chunks in parts, as so many tiles more with so much shorter sums.
double parts_cost(const GpuPlanRequest& r, const Plan& plan, int64_t* bytes) {
  const int64_t parts = plan.input_parts, stored = plan.stored_in_gradient;
  const int64_t columns = round_up(r.features, kTileColumns) * parts;
  double cost = 0;
  const auto add = [&](int64_t tokens, int64_t block) {
    if (tokens == 0) return;
    const double blocks = static_cast<double>(parts_of(tokens, block));
    cost += product_cost(r, tokens, block, columns, columns, ceil_div(r.vocab, parts), 1,
                         Rounds::kWhole) +
            blocks * (static_cast<double>(parts - 1) * kMultiplyAddsPerOverlappedLaunch +
                      kMultiplyAddsPerLaunch);  // and that which adds them up
  };
  add(stored, plan.input_block);
  add(r.tokens - stored, std::min(plan.chunk_tokens, plan.input_block));
  *bytes += traffic(r.tokens * r.features * parts * 8, rows_of_parts(r, plan) * r.features * 4);
  return cost;
}

/// Likewise of grad_input.
double input_cost(const GpuPlanRequest& r, const PlanTraits& t, const Plan& plan, int64_t* bytes) {
  const int64_t d = r.features, v = r.vocab, stored = plan.stored_in_gradient;
  const int64_t fresh = fresh_tokens(r, plan), kept = r.tokens - fresh;
  const Rounds alone = rounds_of(t.kernels.products);
  if (plan.kind == PlanKind::kTokenChunks) {
    const int64_t rest = kept - stored, block = std::min(plan.chunk_tokens, plan.input_block);
    if (plan.input_parts > 1) return parts_cost(r, plan, bytes);
    const double first = product_cost(r, stored, plan.input_block, d, d, v, 1, alone);
    const double others = product_cost(r, rest, block, d, d, v, 1, alone);
    if (!products_overlap(r, t, plan)) return first + others;
    // Tiles are not divided: what fills the last round of grad_input's cannot make it shorter.
    const double fills = product_cost(r, v, plan.slice_vocab, d, d, rest,
                                      parts_of(rest, plan.chunk_tokens), Rounds::kShared);
    return first +
           std::max(product_cost(r, rest, block, d, d, v, 1, Rounds::kShared), others - fills);
  }
  const int64_t slices = parts_of(v, plan.input_sweep_slice);
  if (summed_tokens(r, t, plan) * d * 4 > kCachedBytes) *bytes += 8 * slices * fresh * d;
  if (plan.compact_input_sums && fresh * d * 2 > kCachedBytes) *bytes += 4 * slices * fresh * d;
  return product_cost(r, kept, plan.input_block, d, d, v, 1, alone) +
         product_cost(r, fresh, plan.input_sweep_block, d, d, v, slices, alone,
                      plan.compact_input_sums && t.kernels.products.fused() ? kCompactEpilogueDepth
                                                                            : kEpilogueDepth);
}

}  // namespace

double predicted_cost(const GpuPlanRequest& r, const PlanTraits& t, const Plan& plan) {
  const int64_t n = r.tokens, v = r.vocab;
  const int64_t fresh = fresh_tokens(r, plan), kept = n - fresh;
  int64_t bytes = 0;
  double cost = 0;
  const auto score = [&](int64_t tokens, int64_t block, int64_t slice, bool keep, bool gradients) {
    cost += score_cost(r, t, tokens, block, slice, keep, gradients, &bytes);
  };
  const bool keeps = plan.kind != PlanKind::kStatistics;
  if (!r.statistics_known) {
    score(keeps ? kept : 0, plan.score_block, plan.slice_vocab, true, false);
    score(keeps ? fresh : n, plan.score_block, plan.slice_vocab, false, false);
  }
  if (keeps) {
    if (!plan.products_from_scores)  // scores become gradients
      bytes += kept * v * (kept_score_bytes(r, t) + size_of(r.dtype));
    score(fresh, plan.token_block, plan.slice_vocab, false, true);
  }
  if (plan.separate_sweeps)
    score(fresh, plan.input_sweep_block, plan.input_sweep_slice, false, true);
  if (r.grad_weight) cost += weight_cost(r, t, plan, &bytes);
  if (r.grad_input) cost += input_cost(r, t, plan, &bytes);
  return cost + static_cast<double>(bytes) * kMultiplyAddsPerByte;
}

}  // namespace memeff::cuda
