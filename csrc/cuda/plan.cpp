#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "core/tiling.h"
#include "cuda/gemm.h"
#include "cuda/launch.h"
#include "cuda/plan_sizes.h"

namespace memeff::cuda {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// Preferred sizes; each scale of blocks() halves them, each width takes a quarter of slice bytes.
constexpr int64_t kTokenBlock = 2048;  // of fused scores: partial statistics of 16 MiB at V = 128K
constexpr int64_t kSliceTokenBlock = 8192;  // of vocab slices: few slices, large products
constexpr int64_t kGenericTokenBlock = 1024;
constexpr int64_t kSliceBytes = 64 * kMiB;  // of a slice's gradients, or of its sums
constexpr int64_t kMostSlice = 16384;
constexpr int kScales = 7, kWidths = 4;

// What predicted_cost assumes of a GPU: an H100's or H200's size. Others have about as many tiles in
// flight, or fewer: 216 smaller ones on an A100, 80 on a T4.
constexpr int64_t kTileRows = 128, kTileColumns = 256;  // of a product's result
// Multiply-adds that a GPU with tensor cores does while it moves one byte: about 80 on H100 and H200,
// 75 on A100, 100 on T4; and while it starts a kernel and waits for its last tiles, about 4 us.
constexpr double kMultiplyAddsPerByte = 80;
constexpr double kMultiplyAddsPerLaunch = 1.4e9;
// Sums that are added to again and again stay in the L2 cache up to about this size.
constexpr int64_t kCachedBytes = 24 * kMiB;

// Without a budget the workspace stays below this or a quarter more than the gradients themselves.
constexpr int64_t kDefaultBudget = 512 * kMiB;

// ---- candidates ----

/// The sizes of everything that passes through at once: tokens by the scale, classes by the width.
Plan blocks(const PlanRequest& r, const PlanTraits& t, PlanKind kind, int scale, int width) {
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
  const int64_t step = fused ? kStoredTile : kGenericRange;
  const int64_t slice = width + 1 == kWidths ? step : (kSliceBytes >> 2 * width) / row;
  plan.slice_vocab = std::min(std::clamp(slice, step, kMostSlice) / step * step,
                              round_up(std::max<int64_t>(1, r.vocab), step));
  plan.input_slice = r.vocab;
  plan.score_block = std::min(plan.token_block, kTokenBlock);
  // In place, float products shrink to 16 bits within the tokens that are converted together.
  plan.input_block = plan.token_block;
  // 16-bit gradients do not move, so these blocks are free: sums about as large as grad_weight's.
  if (fused) plan.input_block = std::min(plan.token_block, std::max(kTokenTile, plan.slice_vocab));
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

/// The plan with a sweep of its own for grad_input: its blocks are those of the other sweep with
/// tokens and classes exchanged, so that both have sums of about the same size, and large products.
Plan in_separate_sweeps(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  Plan separate = plan;
  separate.separate_sweeps = true;
  const int64_t step = t.kernels.stores_16_bits() ? kStoredTile : kGenericRange;
  const int64_t tokens = std::min(plan.token_block, std::max<int64_t>(1, fresh_tokens(r, plan)));
  separate.input_sweep_block =
      std::min(plan.slice_vocab, round_up(std::max<int64_t>(1, r.tokens), kTokenTile));
  separate.input_sweep_slice =
      std::min(std::max(step, tokens / step * step), round_up(std::max<int64_t>(1, r.vocab), step));
  return separate;
}

/// Multiply-adds in the time of a product [rows, columns] whose sums are over `depth`, launched in
/// parts, and each part `pieces` times. Tiles at the edges and the last tiles in flight count in full.
double product_cost(int64_t rows, int64_t row_part, int64_t columns, int64_t column_part,
                    int64_t depth, int64_t pieces = 1) {
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
      const int64_t whole = round_up(tiles, kTilesInFlight) * kTileRows * kTileColumns;
      cost += static_cast<double>(vertical * horizontal) *
              (static_cast<double>(whole) * static_cast<double>(depth) +
               static_cast<double>(pieces) * kMultiplyAddsPerLaunch);
    });
  });
  return cost;
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

/// Calls visit(plan) for plans that may suit the request, whether or not they fit; chunks are as
/// large as the budget allows, or as small as can be.
template <class Visit>
void for_each_candidate(const PlanRequest& r, const PlanTraits& t, int64_t budget,
                        const Visit& visit) {
  const auto consider = [&](const Plan& plan) {
    visit(plan);
    if (!t.kernels.stores_16_bits() || summed_beside_scores(r, t, plan) == 0) return;
    Plan smaller = plan;
    smaller.input_block = std::max(kTokenTile, plan.input_block / 2);
    visit(smaller);
  };
  const auto largest = [&](const Plan& plan, int64_t least, int64_t most) {
    return largest_chunk(r, t, budget, least, most, plan);
  };
  const bool gradient = r.grad_input || r.grad_weight || r.grad_bias;
  for (int size = 0; size < kScales * kWidths; ++size) {
    const int scale = size / kWidths, width = size % kWidths;
    if (!gradient) {
      consider(blocks(r, t, PlanKind::kStatistics, scale, width));
      continue;
    }
    const int64_t stored = first_chunk(r, t);
    const int64_t rest = r.tokens - stored;
    const int64_t most = rest <= 0 ? 0 : r.chunk_size > 0 ? std::min(r.chunk_size, rest) : rest;
    const int64_t least = r.chunk_size > 0 ? most : std::min(most, kTokenTile);
    if (!r.statistics_known) {
      Plan plan = blocks(r, t, PlanKind::kTokenChunks, scale, width);
      plan.stored_in_gradient = stored;
      if (!r.grad_weight || rest <= 0) {
        if (rest > 0) plan.chunk_tokens = std::max(least, largest(plan, least, most));
        finish(r, t, &plan);
        consider(plan);
      } else {
        if (stored == 0 && most == rest) {  // a single chunk needs no sums across chunks
          Plan one = plan;
          one.chunk_tokens = most;
          finish(r, t, &one);
          consider(one);
        }
        const bool native = r.accumulation == GradAccumulation::kNative;
        plan.accumulation = native ? Accumulation::kNative : Accumulation::kFloat32;
        plan.chunk_tokens = std::max(least, largest(plan, least, most));
        finish(r, t, &plan);
        consider(plan);
      }
      if (r.accumulation == GradAccumulation::kNative) continue;
    }
    if (!r.grad_weight && !r.statistics_known) continue;
    Plan plan = blocks(r, t, PlanKind::kVocabSlices, scale, width);
    plan.stored_in_gradient = stored;
    finish(r, t, &plan);
    consider(plan);
    if (!r.statistics_known && rest > 0 && r.chunk_size == 0) {
      Plan more = plan;
      more.stored_chunks = 1;
      more.chunk_tokens = largest(more, std::min(rest, kTokenTile), rest);
      finish(r, t, &more);
      if (more.chunk_tokens > 0) consider(more);
      // A few less, so that the others make whole rounds of tiles.
      more.chunk_tokens = rest - round_up(rest - more.chunk_tokens, 8 * kTokenTile);
      finish(r, t, &more);
      if (more.chunk_tokens > 0) consider(more);
    }
    if (r.grad_input && r.grad_weight) consider(in_separate_sweeps(r, t, plan));
  }
}

}  // namespace

double predicted_cost(const PlanRequest& r, const PlanTraits& t, const Plan& plan) {
  const int64_t n = r.tokens, d = r.features, v = r.vocab;
  const int64_t fresh = fresh_tokens(r, plan), kept = n - fresh;
  const bool chunks = plan.kind == PlanKind::kTokenChunks;
  int64_t bytes = 0;
  double cost = r.statistics_known ? 0 : product_cost(n, score_block(plan), v, v, d);

  int64_t block = plan.token_block, slice = plan.slice_vocab;
  if (plan.kind != PlanKind::kStatistics) {
    if (t.kernels.products != Family::kSm90rs)  // scores become gradients
      bytes += kept * v * (t.kernels.stores_16_bits() ? 4 : 8);
    cost += product_cost(fresh, block, v, slice, d);
  }
  if (r.grad_weight) {
    const int64_t rest = n - plan.stored_in_gradient;
    const auto parts = [](int64_t tokens, int64_t part) {
      return ceil_div(tokens, std::max<int64_t>(1, part));
    };
    const int64_t passes =
        chunks && rest > 0 ? (rest < n ? 1 : 0) + parts(rest, plan.chunk_tokens) : 1;
    const int64_t products = chunks ? passes * parts(kept_tokens(r, plan), plan.weight_block)
                                    : parts(kept, block) + parts(fresh, block);
    cost += product_cost(v, slice, d, d, n, products);
    // The gradient, and sums where there are more of them than the cache holds.
    const bool direct = one_weight_product(r, t, plan);
    bytes += v * d * (direct ? 8 * passes - 6 : 16 * passes - 6);
    if (!direct && slice * d * 4 > kCachedBytes) bytes += v * d * 8 * (products - passes);
    if (direct) bytes += plan.stored_in_gradient * v * 4;  // moved out of the gradient
  }
  if (plan.separate_sweeps) {
    block = plan.input_sweep_block, slice = plan.input_sweep_slice;
    cost += product_cost(fresh, block, v, slice, d);
  }
  if (r.grad_input) {
    const int64_t slices = slice > 0 ? ceil_div(v, slice) : 0;
    cost +=
        product_cost(kept, plan.input_block, d, d, v) + product_cost(fresh, block, d, d, v, slices);
    if (summed_tokens(r, t, plan) * d * 4 > kCachedBytes) bytes += 8 * slices * fresh * d;
  }
  // Who fixes the size of chunks wants chunks.
  if (r.chunk_size > 0 && !r.statistics_known && plan.kind == PlanKind::kVocabSlices)
    cost += 100.0 * static_cast<double>(n) * static_cast<double>(d) * static_cast<double>(v);
  return cost + static_cast<double>(bytes) * kMultiplyAddsPerByte;
}

namespace {

/// What products take beside the workspace: see gemm.h.
int64_t product_bytes(const PlanRequest& r) {
  if (!r.gpu_upcasts || r.tokens == 0 || r.vocab == 0) return 0;
  int64_t most = upcast_bytes(r.vocab, r.features, r.tokens);
  if (r.grad_input) most = std::max(most, upcast_bytes(r.tokens, r.vocab, r.features));
  if (r.grad_weight) most = std::max(most, upcast_bytes(r.vocab, r.tokens, r.features));
  return most;
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

std::string make_plan(const PlanRequest& request, const PlanTraits& traits, Plan* plan) {
  const int64_t floor =
      ((request.grad_input ? request.tokens : 0) + (request.grad_weight ? request.vocab : 0)) *
      request.features * size_of(request.dtype);
  const int64_t beside = product_bytes(request);
  const int64_t budget = request.memory_budget < 0 ? std::max(kDefaultBudget, floor + floor / 4)
                                                   : request.memory_budget - beside;
  double best = std::numeric_limits<double>::infinity();
  int64_t least = INT64_MAX;
  for_each_candidate(request, traits, budget, [&](const Plan& candidate) {
    const int64_t bytes = layout(request, traits, candidate).total;
    const double time = predicted_cost(request, traits, candidate);
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
  count_work(request, fresh_tokens(request, *plan), plan);
  plan->workspace_bytes = layout(request, traits, *plan).total;
  plan->predicted_flops = 2 * predicted_cost(request, traits, *plan);
  plan->library_bytes = beside;
  return "";
}

}  // namespace memeff::cuda
