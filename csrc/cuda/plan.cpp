#include "cuda/plan.h"

#include <algorithm>
#include <cstdio>
#include <limits>

#include "core/tiling.h"
#include "cuda/gemm.h"
#include "cuda/launch.h"
#include "cuda/tokens.h"

namespace memeff::cuda {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kAlignment = 256;  // what kernels and TMA like best
constexpr int64_t kRow = 8;          // tokens to which rows of blocks are padded: 16 bytes

// Preferred sizes; each scale of blocks() halves them.
constexpr int64_t kTokenBlock = 2048;  // of fused scores: partial statistics of 16 MiB at V = 128K
constexpr int64_t kSliceTokenBlock = 8192;  // of vocab slices: few slices, large products
constexpr int64_t kGenericTokenBlock = 1024;
constexpr int64_t kSliceBytes = 64 * kMiB;  // of a slice's gradients, or of its sums
constexpr int64_t kMostSlice = 16384;
constexpr int64_t kGenericRange = 512;  // classes per partial statistics of stored products
constexpr int kScales = 7;
// What blocks of that scale lose, as a share of all products: tiles that do not fill the GPU. Guesses,
// ordered the right way; larger blocks win as long as they fit.
constexpr double kScalePenalty[kScales] = {0, 0.01, 0.03, 0.08, 0.2, 0.4, 0.8};

// Enough for the GPU to be busy with the scores of one token tile row after row.
constexpr int64_t kWantedBlocks = 4 * 132;
// Multiply-adds that a GPU with tensor cores does while it moves one byte: about 80 on H100 and H200,
// 75 on A100, 100 on T4.
constexpr double kMultiplyAddsPerByte = 80;

// Without a budget the workspace stays below this or a quarter more than the gradients themselves.
constexpr int64_t kDefaultBudget = 512 * kMiB;

class Cursor {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = offset_;
    offset_ += round_up(bytes, kAlignment);
    end_ = std::max(end_, offset_);
    return at;
  }
  int64_t offset() const { return offset_; }
  int64_t end() const { return end_; }
  void rewind(int64_t offset) { offset_ = offset; }

 private:
  int64_t offset_ = 0, end_ = 0;
};

int64_t accumulation_size(const PlanRequest& r) { return size_of(accumulation_dtype(r.dtype)); }

/// Whether a product may write a gradient by itself, without fp32 sums in between.
bool writes_gradients(const PlanTraits& t) {
  return t.kernels.products != Family::kGeneric && !t.smoothing_apart;
}

int64_t kept_tokens(const PlanRequest& r, const Plan& plan) {
  const int64_t rest = std::max<int64_t>(0, r.tokens - plan.stored_in_gradient);
  const int64_t chunk = std::min(rest, plan.chunk_tokens);
  if (plan.kind == PlanKind::kTokenChunks) return std::max(plan.stored_in_gradient, chunk);
  return plan.stored_in_gradient + plan.stored_chunks * chunk;
}

/// Tokens under vocab slices whose gradients are computed from scores made again.
int64_t fresh_tokens(const PlanRequest& r, const Plan& plan) {
  if (plan.kind != PlanKind::kVocabSlices) return 0;
  return r.statistics_known ? r.tokens : r.tokens - kept_tokens(r, plan);
}

/// Rows of grad_input that are summed in the workspace.
int64_t summed_tokens(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  if (!r.grad_input || !is_16_bit(r.dtype)) return 0;
  int64_t rows = 0;
  if (!writes_gradients(t) && kept_tokens(r, plan) > 0) rows = plan.input_block;
  if (plan.kind == PlanKind::kVocabSlices) {
    const bool all_at_once = r.grad_weight && !plan.separate_sweeps;
    const int64_t fresh = fresh_tokens(r, plan);
    if (fresh > 0) rows = std::max(rows, all_at_once ? fresh : plan.token_block);
  }
  return std::min(rows, r.tokens);
}

/// Whether one product writes a slice of grad_weight, so that no sums are needed.
bool one_weight_product(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  if (!writes_gradients(t)) return false;
  if (plan.kind == PlanKind::kTokenChunks) return plan.weight_block >= kept_tokens(r, plan);
  const bool all_fresh = fresh_tokens(r, plan) == r.tokens;
  const bool all_in_gradient = plan.stored_in_gradient == r.tokens;
  return (all_fresh || all_in_gradient) && plan.token_block >= r.tokens;
}

/// Scores that are computed slice by slice because they are not kept.
bool needs_slice(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  if (fresh_tokens(r, plan) > 0) return true;
  return !t.kernels.stores_16_bits() && kept_tokens(r, plan) < r.tokens &&
         plan.kind != PlanKind::kTokenChunks;
}

int64_t tiles(int64_t classes) { return ceil_div(classes, kStoredTile); }
int64_t token_tiles(int64_t tokens) { return ceil_div(tokens, kTokenTile); }

// ---- candidates ----

/// The sizes of everything that passes through at once, at one of kScales scales.
Plan blocks(const PlanRequest& r, const PlanTraits& t, PlanKind kind, int scale) {
  const bool fused = t.kernels.stores_16_bits();
  const int64_t padded = round_up(std::max<int64_t>(1, r.tokens), kTokenTile);
  const auto scaled = [&](int64_t preferred) {
    return std::min(padded, std::max(kTokenTile, preferred >> scale));
  };
  Plan plan;
  plan.kind = kind;
  plan.token_block = scaled(!fused                           ? kGenericTokenBlock
                            : kind == PlanKind::kVocabSlices ? kSliceTokenBlock
                                                             : kTokenBlock);
  if (r.chunk_size > 0)
    plan.token_block = std::min(plan.token_block, round_up(r.chunk_size, kTokenTile));
  const int64_t score_bytes = fused ? 2 : accumulation_size(r);
  const int64_t row =
      std::max({plan.token_block * score_bytes, r.features * int64_t{4}, int64_t{1}});
  const int64_t least = fused ? 8 * kStoredTile : kGenericRange;
  int64_t slice = std::clamp((kSliceBytes >> scale) / row, least, kMostSlice);
  if (scale >= 5) slice = fused ? kStoredTile * (kScales - scale) : kGenericRange;
  const int64_t step = fused ? kStoredTile : kGenericRange;
  plan.slice_vocab = std::min(slice / step * step, round_up(std::max<int64_t>(1, r.vocab), step));
  plan.input_slice = r.vocab;
  // In place, float products shrink to 16 bits within the tokens that are converted together.
  plan.input_block = plan.token_block;
  plan.weight_block = plan.token_block;
  return plan;
}

/// Completes a plan whose stored tokens are known.
void finish(const PlanRequest& r, const PlanTraits& t, Plan* plan) {
  if (!t.kernels.stores_16_bits()) return;
  const int64_t kept = round_up(std::max<int64_t>(1, kept_tokens(r, *plan)), kTokenTile);
  if (plan->kind == PlanKind::kTokenChunks) plan->weight_block = kept;
  if (writes_gradients(t)) plan->input_block = kept;
}

int64_t first_chunk(const PlanRequest& r, const PlanTraits& t) {
  if (!r.grad_weight || r.statistics_known) return 0;
  int64_t most = tokens_in_gradient_row(r, t);
  if (r.chunk_size > 0) most = std::min(most, r.chunk_size);
  return std::min(r.tokens, most);
}

/// Time in units of one product of 2 N D V.
double cost(const PlanRequest& r, const Plan& plan, int scale) {
  const double n = std::max<double>(1, static_cast<double>(r.tokens));
  const double kept = n - static_cast<double>(fresh_tokens(r, plan));
  double products = 1 + (r.grad_input ? 1 : 0) + (r.grad_weight ? 1 : 0);
  if (!r.statistics_known && plan.kind == PlanKind::kVocabSlices) products += (n - kept) / n;
  if (plan.separate_sweeps) products += (n - kept) / n;
  double passes = 0;  // read and write the sums of grad_weight
  if (plan.kind == PlanKind::kTokenChunks && plan.chunk_tokens > 0)
    passes = static_cast<double>(
        ceil_div(std::max<int64_t>(0, r.tokens - plan.stored_in_gradient), plan.chunk_tokens));
  const double pass = r.grad_weight ? 8 * kMultiplyAddsPerByte / n : 0;
  // Who fixes the size of chunks wants chunks.
  if (r.chunk_size > 0 && !r.statistics_known && plan.kind == PlanKind::kVocabSlices)
    products += 100;
  return products * (1 + kScalePenalty[scale]) + passes * pass;
}

/// The largest chunk of [least, most] tokens that fits the budget; 0: none does.
int64_t largest_chunk(const PlanRequest& r, const PlanTraits& t, int64_t budget, int64_t least,
                      int64_t most, const Plan& plan) {
  const auto fits = [&](int64_t chunk) {
    Plan trial = plan;
    trial.chunk_tokens = chunk;
    finish(r, t, &trial);
    return layout(r, t, trial).total <= budget;
  };
  if (most < least || !fits(least)) return 0;
  int64_t low = least, high = most;
  while (low < high) {
    const int64_t middle = std::min(high, round_up(low + (high - low + 1) / 2, kTokenTile));
    if (fits(middle)) {
      low = middle;
    } else {
      high = std::max(least, std::min(high - 1, (middle - 1) / kTokenTile * kTokenTile));
    }
  }
  return low;
}

/// Calls consider(plan, scale) for plans that may suit the request, whether or not they fit; chunks
/// are as large as the budget allows, or as small as can be.
template <class Consider>
void for_each_candidate(const PlanRequest& r, const PlanTraits& t, int64_t budget,
                        const Consider& consider) {
  const auto largest = [&](const Plan& plan, int64_t least, int64_t most) {
    return largest_chunk(r, t, budget, least, most, plan);
  };
  const bool gradient = r.grad_input || r.grad_weight || r.grad_bias;
  for (int scale = 0; scale < kScales; ++scale) {
    if (!gradient) {
      consider(blocks(r, t, PlanKind::kStatistics, scale), scale);
      continue;
    }
    const int64_t stored = first_chunk(r, t);
    const int64_t rest = r.tokens - stored;
    const int64_t most = rest <= 0 ? 0 : r.chunk_size > 0 ? std::min(r.chunk_size, rest) : rest;
    const int64_t least = r.chunk_size > 0 ? most : std::min(most, kTokenTile);
    if (!r.statistics_known) {
      Plan plan = blocks(r, t, PlanKind::kTokenChunks, scale);
      plan.stored_in_gradient = stored;
      if (!r.grad_weight || rest <= 0) {
        if (rest > 0) plan.chunk_tokens = std::max(least, largest(plan, least, most));
        finish(r, t, &plan);
        consider(plan, scale);
      } else {
        if (stored == 0 && most == rest) {  // a single chunk needs no sums across chunks
          Plan one = plan;
          one.chunk_tokens = most;
          finish(r, t, &one);
          consider(one, scale);
        }
        const bool native = r.accumulation == GradAccumulation::kNative;
        plan.accumulation = native ? Accumulation::kNative : Accumulation::kFloat32;
        plan.chunk_tokens = std::max(least, largest(plan, least, most));
        finish(r, t, &plan);
        consider(plan, scale);
      }
      if (r.accumulation == GradAccumulation::kNative) continue;
    }
    if (!r.grad_weight && !r.statistics_known) continue;
    Plan plan = blocks(r, t, PlanKind::kVocabSlices, scale);
    plan.stored_in_gradient = stored;
    finish(r, t, &plan);
    consider(plan, scale);
    if (!r.statistics_known && rest > 0 && r.chunk_size == 0) {
      Plan more = plan;
      more.stored_chunks = 1;
      more.chunk_tokens = largest(more, std::min(rest, kTokenTile), rest);
      finish(r, t, &more);
      if (more.chunk_tokens > 0) consider(more, scale);
    }
    if (r.grad_input && r.grad_weight) {
      Plan separate = blocks(r, t, PlanKind::kVocabSlices, scale);
      separate.separate_sweeps = true;
      separate.stored_in_gradient = stored;
      finish(r, t, &separate);
      consider(separate, scale);
    }
  }
}

/// What products take beside the workspace: see gemm.h.
int64_t product_bytes(const PlanRequest& r) {
  if (!r.gpu_upcasts || r.tokens == 0 || r.vocab == 0) return 0;
  int64_t most = upcast_bytes(r.vocab, r.features, r.tokens);
  if (r.grad_input) most = std::max(most, upcast_bytes(r.tokens, r.vocab, r.features));
  if (r.grad_weight) most = std::max(most, upcast_bytes(r.vocab, r.tokens, r.features));
  return most;
}

void count_work(const PlanRequest& r, const PlanTraits& t, Plan* plan) {
  const double product = 2.0 * r.tokens * static_cast<double>(r.features) * r.vocab;
  const int gradients = (r.grad_input ? 1 : 0) + (r.grad_weight ? 1 : 0);
  const double fresh =
      r.tokens == 0 ? 0.0
                    : static_cast<double>(fresh_tokens(r, *plan)) / static_cast<double>(r.tokens);
  double scores = r.statistics_known ? 1 : 1 + fresh;
  if (plan->separate_sweeps) scores += fresh;
  plan->flops = product * (scores + gradients);
  plan->floor_flops = product * ((r.statistics_known ? 0 : 1) + gradients);
  const int64_t elements = (r.grad_input ? r.tokens * r.features : 0) +
                           (r.grad_weight ? r.vocab * r.features : 0) + (r.grad_bias ? r.vocab : 0);
  plan->floor_bytes = elements * size_of(r.dtype);
  plan->num_slices = plan->slice_vocab == 0 ? 0 : ceil_div(r.vocab, plan->slice_vocab);
  const int64_t rest = std::max<int64_t>(0, r.tokens - plan->stored_in_gradient);
  const int64_t per_chunk =
      plan->kind == PlanKind::kTokenChunks ? plan->chunk_tokens : plan->token_block;
  plan->num_chunks =
      (plan->stored_in_gradient > 0 ? 1 : 0) + (per_chunk > 0 ? ceil_div(rest, per_chunk) : 0);
  plan->workspace_bytes = layout(r, t, *plan).total;
  plan->library_bytes = product_bytes(r);
}

std::string megabytes(int64_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "%lld bytes (%.1f MiB)", static_cast<long long>(bytes),
                static_cast<double>(bytes) / (1 << 20));
  return text;
}

}  // namespace

PlanTraits plan_traits(const Problem& p, const PlanRequest& request, const Selection& kernels) {
  PlanTraits traits;
  traits.kernels = kernels;
  traits.partials = 2 + (p.label_smoothing > 0 ? 1 : 0) + (wants_entropy(p) ? 1 : 0) +
                    (p.probabilities != nullptr ? 3 : 0);
  traits.argmax = wants_argmax(p);
  traits.skips = p.skip_mass > 0 && kernels.products != Family::kGeneric;
  traits.smoothing_apart = traits.skips && p.label_smoothing > 0;
  // The gradient of the bias is summed from those of the logits, with all their parts.
  if (traits.smoothing_apart && request.grad_bias) traits.skips = traits.smoothing_apart = false;
  return traits;
}

int64_t kept_score_bytes(const PlanRequest& r, const PlanTraits& t) {
  return t.kernels.stores_16_bits() ? 2 : accumulation_size(r);
}

int64_t tokens_in_gradient_row(const PlanRequest& r, const PlanTraits& t) {
  // None if a row is no whole number of scores: the rows of scores and of gradients must coincide.
  const int64_t bytes = r.features * size_of(r.dtype);
  return bytes % kept_score_bytes(r, t) == 0 ? bytes / kept_score_bytes(r, t) : 0;
}

int64_t classes_per_range(const PlanRequest& r, const PlanTraits& t, const Plan& plan, bool kept) {
  if (!t.kernels.stores_16_bits()) return kGenericRange;
  if (kept) return kStoredTile;
  // Two stored tiles are the largest tile of any family.
  constexpr int64_t kStep = 2 * kStoredTile;
  const int64_t rows = token_tiles(std::min(plan.token_block, std::max<int64_t>(1, r.tokens)));
  const int64_t ranges = std::max<int64_t>(1, ceil_div(kWantedBlocks, rows));
  return round_up(ceil_div(std::max<int64_t>(1, r.vocab), ranges), kStep);
}

Layout layout(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  const int64_t sum_bytes = accumulation_size(r);
  const bool fused = t.kernels.stores_16_bits();
  const int64_t kept = kept_tokens(r, plan);
  const int64_t block = round_up(std::min(plan.token_block, std::max<int64_t>(1, r.tokens)), kRow);

  Cursor cursor;
  Layout at;
  at.scalars = cursor.take(sizeof(CallScalars));
  at.token_arrays = cursor.take(kTokenArrays * 8 * r.tokens);
  at.bias = cursor.take(r.vocab * sum_bytes);
  at.class_weight = cursor.take(r.vocab * sum_bytes);
  at.bias_sum = cursor.take(r.vocab * sum_bytes);
  if (fused) at.kept_maxima = cursor.take(tiles(r.vocab) * round_up(kept, kRow) * 4);
  if (t.skips) at.tiles = cursor.take(tiles(r.vocab) * (token_tiles(kept) + 2));
  const int64_t chunk = std::min(plan.chunk_tokens, r.tokens - plan.stored_in_gradient);
  if (chunk > 0) at.scores = cursor.take(r.vocab * round_up(chunk, kRow) * kept_score_bytes(r, t));
  if (plan.accumulation == Accumulation::kFloat32 && r.dtype == DType::kBFloat16 && r.grad_weight)
    at.remainder = cursor.take(r.vocab * r.features * 2);
  if (needs_slice(r, t, plan)) {
    at.slice = cursor.take(plan.slice_vocab * block * (fused ? 2 : sum_bytes));
    if (t.skips) at.slice_tiles = cursor.take(tiles(plan.slice_vocab) * token_tiles(block));
  }

  if (t.smoothing_apart) at.row_sums = cursor.take(2 * r.features * 4);

  const int64_t steps = cursor.offset();
  if (!r.statistics_known) {
    const auto bytes = [&](bool is_kept) {
      const int64_t ranges = ceil_div(r.vocab, classes_per_range(r, t, plan, is_kept));
      const int64_t arrays = t.partials - (fused && is_kept ? 1 : 0);  // the maxima are kept
      return ranges * block * (arrays * sum_bytes + (t.argmax ? 4 : 0)) +
             (t.partials + 1) * kAlignment;
    };
    const bool some_kept = kept > 0, some_not = plan.kind != PlanKind::kTokenChunks &&
                                                kept < std::max<int64_t>(1, r.tokens);
    at.partials = cursor.take(
        std::max(some_kept ? bytes(true) : 0, some_not || !some_kept ? bytes(false) : 0));
  }

  cursor.rewind(steps);
  const int64_t sums = summed_tokens(r, t, plan);
  if (sums > 0) at.input_sum = cursor.take(sums * r.features * 4);
  if (plan.kind == PlanKind::kTokenChunks || plan.separate_sweeps) cursor.rewind(steps);
  if (r.grad_weight) {
    if (!one_weight_product(r, t, plan)) {
      at.weight_sum = cursor.take(plan.slice_vocab * r.features * sum_bytes);
    } else if (plan.stored_in_gradient > 0) {
      at.weight_copy = cursor.take(plan.slice_vocab * round_up(plan.stored_in_gradient, kRow) * 2);
    }
  }
  at.total = cursor.end();
  return at;
}

std::string make_plan(const PlanRequest& request, const PlanTraits& traits, Plan* plan) {
  const int64_t floor =
      ((request.grad_input ? request.tokens : 0) + (request.grad_weight ? request.vocab : 0)) *
      request.features * size_of(request.dtype);
  const int64_t beside = product_bytes(request);
  const int64_t budget = request.memory_budget < 0 ? std::max(kDefaultBudget, floor + floor / 4)
                                                   : request.memory_budget - beside;
  double best = std::numeric_limits<double>::infinity();
  int64_t least = INT64_MAX;
  for_each_candidate(request, traits, budget, [&](const Plan& candidate, int scale) {
    const int64_t bytes = layout(request, traits, candidate).total;
    const double time = cost(request, candidate, scale);
    if (bytes <= budget && time < best) {
      best = time;
      *plan = candidate;
    }
    // The smallest plan also serves where nothing fits and nobody set a limit.
    if (bytes < least) {
      least = bytes;
      if (request.memory_budget < 0 && best == std::numeric_limits<double>::infinity())
        *plan = candidate;
    }
  });
  if (best == std::numeric_limits<double>::infinity() && request.memory_budget >= 0) {
    return "memory_budget=" + megabytes(request.memory_budget) + " is too small for " +
           std::to_string(request.tokens) + " tokens, " + std::to_string(request.features) +
           " features and " + std::to_string(request.vocab) +
           " classes on a GPU: the least that works is " + megabytes(least + beside);
  }
  count_work(request, traits, plan);
  return "";
}

}  // namespace memeff::cuda
