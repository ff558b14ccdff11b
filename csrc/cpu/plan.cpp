#include "cpu/plan.h"

#include <algorithm>

#include "core/planning.h"
#include "cpu/layout.h"
#include "cpu/tiling.h"

namespace memeff {
namespace {

// Enough tokens per chunk that a pass over grad_weight (8 bytes per element) costs little compared with the
// chunk's 2 * tokens FLOPs per element; the bf16 kernels, where chunks cost less, in this much score storage.
constexpr int64_t kPreferredChunkBytes = int64_t{128} << 20;
constexpr int64_t kPreferredChunkTokens = 1024;
constexpr int64_t kLeastChunkTokens = 256;
// Compact sums make chunks possible where the alternative is to compute scores twice.
constexpr int64_t kLeastCompactChunk = 96;
// Their rounding errors add up: 256 chunks still leave the error of grad_weight within 6 % of that of its
// final rounding.
constexpr int64_t kMostCompactChunks = 256;
constexpr int64_t kPreferredBlock = 1024;
constexpr int64_t kLeastBlock = kPanel;
// A slice ends in a barrier between threads: large ones wait less, and pack hidden states less often. The
// sums of a slice should stay near the last-level cache.
constexpr int64_t kPreferredSliceBytes = int64_t{16} << 20;
constexpr int64_t kMostSlice = 16 * kTileVocab;
constexpr int64_t kLeastEfficientSlice = 4 * kTileVocab;
constexpr int64_t kMostFp64Slice = kLeastEfficientSlice;

/// Vocab slices: tokens whose gradients are computed from scores made for them.
int64_t fresh_tokens(const CpuPlanRequest& r, const Plan& plan) {
  return r.statistics_known ? r.tokens : r.tokens - stored_tokens(r, plan);
}

/// What a memory budget bounds.
int64_t memory_bytes(const CpuPlanRequest& r, const Plan& plan) {
  return layout_workspace(r, plan).total + library_bytes(r);
}

enum class Shrink { kNothing, kEfficiently, kAnyhow };

/// Shrinks blocks and slices until the plan fits; false when it cannot.
bool shrink_to_fit(const CpuPlanRequest& r, int64_t budget, Shrink shrink, Plan* plan) {
  for (;;) {
    if (memory_bytes(r, *plan) <= budget) return true;
    if (shrink == Shrink::kNothing) return false;
    plan->weight_block = std::min(plan->weight_block, plan->token_block);
    if (memory_bytes(r, *plan) <= budget) return true;
    if (plan->slice_vocab > kLeastEfficientSlice) {
      plan->slice_vocab = round_up(plan->slice_vocab / 2, kTileVocab);
    } else if (plan->token_block > kLeastChunkTokens) {
      plan->token_block = std::max(kLeastChunkTokens, round_up(plan->token_block / 2, kPanel));
    } else if (shrink == Shrink::kEfficiently) {
      return false;
    } else if (plan->slice_vocab > kTileVocab) {
      plan->slice_vocab = kTileVocab;
    } else if (plan->token_block > kLeastBlock) {
      plan->token_block = std::max(kLeastBlock, round_up(plan->token_block / 2, kPanel));
    } else {
      return false;
    }
  }
}

/// The plan with chunks of that many tokens (0: no other chunk than the one in grad_weight). Under token
/// chunks a chunk passes through the products as one block.
Plan with_chunks(const CpuPlanRequest& r, int64_t chunk, const Plan& plan) {
  Plan result = plan;
  result.chunk_tokens = chunk;
  if (plan.kind == PlanKind::kVocabSlices) return result;
  if (chunk > 0) result.token_block = std::min(plan.token_block, round_up(chunk, kPanel));
  result.weight_block = result.token_block;
  if (r.bf16_kernels) {
    const int64_t largest = round_up(std::max(plan.stored_in_gradient, chunk), kPanel);
    result.weight_block = std::max(result.token_block, largest);
  }
  return result;
}

/// The largest chunk_tokens in [least, most] that fits; 0 when none does.
int64_t largest_chunk(const CpuPlanRequest& r, int64_t budget, int64_t least, int64_t most,
                      Shrink shrink, const Plan& plan) {
  return largest_fitting(least, most, kPanel, [&](int64_t chunk) {
    Plan trial = with_chunks(r, chunk, plan);
    return shrink_to_fit(r, budget, shrink, &trial);
  });
}

struct Limits {
  int64_t budget;
  int64_t least_chunk;
  int64_t most_chunk;
  Shrink shrink = Shrink::kAnyhow;
};

/// Chunk sizes to consider: what the caller fixed, or what a budget allows.
Limits chunk_limits(const CpuPlanRequest& r) {
  const int64_t padded = round_up(std::max<int64_t>(1, r.tokens), kPanel);
  Limits limits;
  limits.budget = r.memory_budget < 0 ? INT64_MAX : r.memory_budget;
  if (r.chunk_size > 0) {
    limits.least_chunk = limits.most_chunk = std::min(r.chunk_size, padded);
    return limits;
  }
  int64_t most = kPreferredChunkTokens;
  if (!r.blas) {
    const int64_t row = std::max<int64_t>(1, r.vocab * score_bytes(r));
    most = std::clamp(kPreferredChunkBytes / row / kPanel * kPanel, kLeastChunkTokens, most);
  }
  limits.most_chunk = std::min(most, padded);
  limits.least_chunk = std::min(r.memory_budget < 0 ? limits.most_chunk : kPanel, padded);
  return limits;
}

Plan base_plan(const CpuPlanRequest& r, PlanKind kind) {
  Plan plan;
  plan.kind = kind;
  plan.token_block = std::min(kPreferredBlock, round_up(std::max<int64_t>(1, r.tokens), kPanel));
  const int64_t slice =
      kPreferredSliceBytes / (sum_stride(r.features) * 4) / kTileVocab * kTileVocab;
  const int64_t most = r.dtype == DType::kFloat64 ? kMostFp64Slice : kMostSlice;
  plan.slice_vocab = std::min(std::clamp(slice, kLeastEfficientSlice, most),
                              round_up(std::max<int64_t>(1, r.vocab), kTileVocab));
  if (r.chunk_size > 0)
    plan.token_block = std::min(plan.token_block, round_up(r.chunk_size, kPanel));
  plan.weight_block = plan.token_block;
  return plan;
}

bool plan_token_chunks(const CpuPlanRequest& r, Accumulation accumulation, const Limits& limits,
                       Plan* out) {
  Plan plan = base_plan(r, PlanKind::kTokenChunks);
  plan.stored_in_gradient = first_chunk(r, score_bytes(r));
  plan.accumulation = accumulation;
  const int64_t rest = r.tokens - plan.stored_in_gradient;
  if (rest > 0) {
    const int64_t most = std::min(limits.most_chunk, round_up(rest, kPanel));
    const int64_t least = std::min(limits.least_chunk, most);
    const int64_t largest = largest_chunk(r, limits.budget, least, most, limits.shrink, plan);
    if (largest == 0) return false;
    // As many chunks, of about the same size.
    const int64_t even = round_up(ceil_div(rest, ceil_div(rest, largest)), kPanel);
    plan = with_chunks(r, std::min(largest, even), plan);
  } else {
    plan = with_chunks(r, 0, plan);
  }
  // A chunk is whole panels: it may have room for the tokens of the first one, too.
  if (r.tokens <= plan.chunk_tokens) plan.stored_in_gradient = 0;
  if (!r.grad_weight || plan.stored_in_gradient == r.tokens || r.tokens <= plan.chunk_tokens) {
    plan.accumulation = Accumulation::kExact;
  }
  if (plan.accumulation == Accumulation::kFloat32 && !has_float32_sums(r.dtype)) return false;
  const bool compact = plan.accumulation == Accumulation::kCompact;
  if (compact && ceil_div(rest, plan.chunk_tokens) > kMostCompactChunks) return false;
  if (!shrink_to_fit(r, limits.budget, limits.shrink, &plan)) return false;
  *out = plan;
  return true;
}

/// Vocab slices: the rest of the budget keeps more scores, which are then not computed again.
Plan keep_more_scores(const CpuPlanRequest& r, int64_t budget, const Plan& plan) {
  const int64_t rest = round_up(r.tokens - plan.stored_in_gradient, kPanel);
  Plan more = plan;
  more.stored_chunks = 1;
  more.chunk_tokens = largest_chunk(r, budget, kPanel, rest, Shrink::kNothing, more);
  return more.chunk_tokens > 0 ? more : plan;
}

bool plan_vocab_slices(const CpuPlanRequest& r, bool separate_sweeps, const Limits& limits,
                       Plan* out) {
  Plan plan = base_plan(r, PlanKind::kVocabSlices);
  plan.stored_in_gradient = separate_sweeps ? 0 : first_chunk(r, score_bytes(r));
  plan.separate_sweeps = separate_sweeps;
  const int64_t half_block = round_up(plan.token_block / 2, kPanel);
  if (memory_bytes(r, plan) > limits.budget && half_block >= kLeastChunkTokens) {
    // Packing is repeated for every slice, so large slices come before large blocks.
    plan.token_block = plan.weight_block = half_block;
  }
  if (!shrink_to_fit(r, limits.budget, limits.shrink, &plan)) return false;
  if (!r.statistics_known && !separate_sweeps && r.memory_budget >= 0) {
    // Small slices, less efficient, where they leave room for the scores of many more tokens.
    Plan small = plan;
    small.slice_vocab = kTileVocab;
    small.token_block = small.weight_block = std::min(plan.token_block, kLeastChunkTokens);
    plan = keep_more_scores(r, limits.budget, plan);
    small = keep_more_scores(r, limits.budget, small);
    if (stored_tokens(r, small) - stored_tokens(r, plan) > r.tokens / 4) plan = small;
  }
  *out = plan;
  return true;
}

/// Chunks of the tokens whose scores do not lie in grad_weight.
int64_t other_chunks(const CpuPlanRequest& r, const Plan& plan) {
  if (plan.chunk_tokens == 0) return 0;
  return ceil_div(r.tokens - plan.stored_in_gradient, plan.chunk_tokens);
}

/// What token chunks take, as the FLOPs that products could do in that time. A chunk is a pass over grad_weight
/// and packs the weight anew. Fitted to an AMD EPYC with AVX2 and MKL's products; benchmarks/plans.py measures them.
struct ChunkCosts {
  double work;  // products and softmax of all tokens
  double pass;  // of each chunk
};

ChunkCosts chunk_costs(const CpuPlanRequest& r) {
  constexpr double kPassOverGradient = 200, kPassOverWeight = 80;  // per element of the weight
  constexpr double kSoftmax = 280;                                 // per score
  const int products = 1 + (r.grad_input ? 1 : 0) + (r.grad_weight ? 1 : 0);
  const auto scores = static_cast<double>(r.tokens) * static_cast<double>(r.vocab);
  const auto elements = static_cast<double>(r.features) * static_cast<double>(r.vocab);
  return {products * product_flops(r) + kSoftmax * scores,
          elements * (r.grad_weight ? kPassOverGradient : kPassOverWeight)};
}

/// The most chunks with which a call takes at most `share` longer than with `least` of them.
int64_t most_chunks(const CpuPlanRequest& r, int64_t least, double share) {
  const ChunkCosts costs = chunk_costs(r);
  const double more = share * (costs.work / costs.pass + static_cast<double>(least));
  return least + static_cast<int64_t>(std::min(more, 1e6));
}

/// Replaces a plan of a call without a budget by a leaner one that is predicted to take little longer: its
/// chunks take a quarter of what the logits would in the dtype of the inputs, unless that costs more than 10 %,
/// and less where that costs less than 3 %. Compact sums take about as long as fp32 ones.
void prefer_lean(const CpuPlanRequest& r, const Limits& limits, Accumulation accumulation,
                 Plan* plan) {
  constexpr int64_t kLittle = int64_t{16} << 20;
  if (plan->chunk_tokens == 0 || memory_bytes(r, *plan) <= kLittle) return;
  const int64_t rest = r.tokens - plan->stored_in_gradient;
  const int64_t least = other_chunks(r, *plan);
  const auto chunk_of = [&](double share) {
    return round_up(ceil_div(rest, most_chunks(r, least, share)), kPanel);
  };
  Limits lean = limits;
  lean.shrink = Shrink::kEfficiently;
  lean.budget = std::max(kLittle, r.tokens * r.vocab * size_of(r.dtype) / 4);
  lean.most_chunk = std::min(limits.most_chunk, chunk_of(0.03));
  lean.least_chunk = std::min(lean.most_chunk, chunk_of(0.10));
  Plan found;
  if (!plan_token_chunks(r, accumulation, lean, &found)) {
    lean.budget = limits.budget;
    lean.most_chunk = lean.least_chunk;
    if (!plan_token_chunks(r, accumulation, lean, &found)) return;
  }
  if (memory_bytes(r, found) < memory_bytes(r, *plan)) *plan = found;
}

/// Sets the plan that suits the request best among those that fit, most wanted first.
bool choose(const CpuPlanRequest& r, const Limits& limits, Plan* plan) {
  if (!wants_gradient(r)) {
    *plan = base_plan(r, PlanKind::kStatistics);
    return shrink_to_fit(r, limits.budget, limits.shrink, plan);
  }
  const bool both = r.grad_input && r.grad_weight;
  if (r.statistics_known) {
    return plan_vocab_slices(r, false, limits, plan) ||
           (both && plan_vocab_slices(r, true, limits, plan));
  }
  // Sums over chunks cost a pass over grad_weight per chunk: not for tiny chunks. The bf16 kernels are
  // fast, so a pass weighs more there.
  Limits efficient = limits;
  efficient.shrink = Shrink::kEfficiently;
  const auto at_least = [&](int64_t chunk) {
    if (r.chunk_size == 0 && r.grad_weight)
      efficient.least_chunk = std::min(limits.most_chunk, chunk);
    return efficient;
  };
  const int64_t least = r.bf16_kernels ? kLeastChunkTokens : kLeastChunkTokens / 4;
  const bool compact =
      r.grad_weight && r.dtype == DType::kBFloat16 && r.accumulation == GradAccumulation::kAuto;
  const bool free_chunks = r.chunk_size == 0;
  Plan exact, packed;
  const bool float32 = plan_token_chunks(r, Accumulation::kFloat32, at_least(least), &exact);
  if (float32 && free_chunks && r.memory_budget < 0) {
    const Accumulation sums = compact ? Accumulation::kCompact : Accumulation::kFloat32;
    if (r.blas) prefer_lean(r, limits, sums, &exact);
  } else if (compact && (free_chunks || !float32) &&
             plan_token_chunks(r, Accumulation::kCompact, at_least(kLeastCompactChunk), &packed)) {
    // fp32 sums may leave room only for many more chunks.
    const bool faster =
        float32 && most_chunks(r, other_chunks(r, packed), 0.03) < other_chunks(r, exact);
    if (!float32 || faster) {
      *plan = packed;
      return true;
    }
  }
  if (float32) {
    *plan = exact;
    return true;
  }
  if (!r.grad_weight) return plan_token_chunks(r, Accumulation::kFloat32, limits, plan);
  return plan_vocab_slices(r, false, limits, plan) ||
         (both && plan_vocab_slices(r, true, limits, plan)) ||
         (both && plan_token_chunks(r, Accumulation::kFloat32, limits, plan));
}

}  // namespace

int64_t library_bytes(const CpuPlanRequest& r) {
  if (!r.blas) return 0;
  // Measured with the MKL of torch's wheels on Zen 4, by products C[rows, columns] of many shapes: in fp32
  // each thread packs 192 of the inner dimension, for all columns up to 6240; in fp64 256, for all rows up
  // to 5000 (hence kMostFp64Slice); and less than 1 MiB of the other operand. It keeps these buffers, and
  // adds another for a product that needs a larger one: at worst, one per kind of product. Other
  // libraries and processors may differ.
  const int64_t block = std::min(r.tokens, kPreferredBlock);
  const int64_t scores = r.fixed_order ? 0 : 1;
  const int64_t gradients = (r.grad_input ? 1 : 0) + (r.grad_weight ? 1 : 0);
  const int64_t kinds = scores + gradients;
  if (accumulation_dtype(r.dtype) == DType::kFloat64) {
    const int64_t rows = std::max(block, std::min(r.vocab, kMostFp64Slice));
    // Rows are classes in two kinds of product, which share a buffer.
    return r.threads * std::min<int64_t>(kinds, 2) * ((1 << 20) + 256 * 8 * rows);
  }
  const auto columns = [](int64_t count) { return std::min<int64_t>(6240, count); };
  const int64_t packed = scores * columns(block) + gradients * columns(r.features);
  return r.threads * (kinds * (300 << 10) + 192 * 4 * packed);
}

namespace {

/// The least budget for which choose() finds a plan. More memory never hurts, so bisection finds it.
int64_t least_budget(CpuPlanRequest r) {
  const auto fits = [&](int64_t budget) {
    Plan plan;
    r.memory_budget = budget;
    return choose(r, chunk_limits(r), &plan);
  };
  int64_t high = 1;
  while (high < (int64_t{1} << 50) && !fits(high)) high *= 2;
  int64_t low = high / 2;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? high : low) = middle;
  }
  return high;
}

}  // namespace

std::string make_plan(const CpuPlanRequest& wanted, Plan* plan) {
  CpuPlanRequest request = wanted;
  // Each chunk adds to the sums of grad_weight: with one token each, one rounding more per token.
  constexpr int64_t kLeastBlasChunk = 8;
  if (request.blas && request.chunk_size > 0)
    request.chunk_size = std::max(request.chunk_size, kLeastBlasChunk);
  Plan chosen;
  if (!choose(request, chunk_limits(request), &chosen)) {
    plan->library_bytes = library_bytes(request);
    plan->workspace_bytes = least_budget(request) - plan->library_bytes;
    return budget_error(request, "", *plan);
  }
  chosen.kernels = plan->kernels, chosen.kernels_reason = plan->kernels_reason;
  *plan = chosen;
  plan->score_block = plan->input_block = plan->input_sweep_block = plan->token_block;
  plan->input_slice = plan->input_sweep_slice = plan->slice_vocab;
  const bool slices = plan->kind == PlanKind::kVocabSlices;
  count_work(request, slices ? fresh_tokens(request, *plan) : 0, plan);
  if (request.blas && plan->kind == PlanKind::kTokenChunks) {
    const ChunkCosts costs = chunk_costs(request);
    plan->predicted_flops = costs.work + static_cast<double>(plan->num_chunks) * costs.pass;
  }
  plan->workspace_bytes = layout_workspace(request, *plan).total;
  plan->library_bytes = library_bytes(request);
  return "";
}

}  // namespace memeff
