#include "cuda/plan.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "core/planning.h"
#include "core/rank_numbers.h"
#include "cuda/gemm.h"
#include "cuda/layout.h"
#include "cuda/plan_cost.h"
#include "cuda/plan_sizes.h"
#include "cuda/work_list.h"

namespace memeff::cuda {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

// Preferred sizes; each scale of blocks() halves them, each width halves slice bytes.
constexpr int64_t kTokenBlock = 2048;  // of statistics: partial ones of 16 MiB at V = 128K
constexpr int64_t kSmallScoreBlock = 1280;
constexpr int64_t kSliceTokenBlock = 8192;  // of vocab slices: few slices, large products
constexpr int64_t kSliceBytes = 64 * kMiB;  // of a slice's gradients, or of its sums
constexpr int64_t kMostSlice = 16384;
constexpr int kScales = 7, kWidths = 7;
// Rounding errors of compact sums add up: 256 terms still leave the error of a gradient within 6 % of
// that of its final rounding.
constexpr int64_t kMostCompactTerms = 256;

// The fewest tokens whose hidden states are copied at a time, and the fewest classes of a part of
// grad_input's sums.
constexpr int64_t kCopiedTokens = 512, kClassesOfPart = 512;

// Without a budget the workspace stays below this or a quarter more than the gradients themselves, and
// is the smallest that costs no more than this much time; below kSmallWorkspace nobody minds.
constexpr int64_t kDefaultBudget = 512 * kMiB;
constexpr double kMostSlowdown = 1.03;
constexpr int64_t kSmallWorkspace = 64 * kMiB;

// ---- candidates ----

/// The sizes of everything that passes through at once: tokens by the scale, classes by the width.
Plan blocks(const GpuPlanRequest& r, const PlanTraits& t, PlanKind kind, int scale, int width) {
  const bool fused = t.kernels.scores.fused();
  const int64_t padded = round_up(std::max<int64_t>(1, r.tokens), kTokenTile);
  const auto scaled = [&](int64_t preferred) {
    return std::min(padded, std::max(kTokenTile, preferred >> scale));
  };
  Plan plan;
  plan.kind = kind;
  plan.token_block = scaled(kind == PlanKind::kVocabSlices ? kSliceTokenBlock : kTokenBlock);
  if (r.chunk_size > 0)
    plan.token_block = std::min(plan.token_block, round_up(r.chunk_size, kTokenTile));
  const int64_t score_bytes = fused ? 2 : accumulation_size(r);
  const int64_t row =
      std::max({plan.token_block * score_bytes, r.features * int64_t{4}, int64_t{1}});
  const int64_t step = fused ? kStoredTile : kGenericRange;
  const int64_t slice = width + 1 == kWidths ? step : (kSliceBytes >> width) / row;
  plan.slice_vocab = std::min(std::clamp(slice, step, kMostSlice) / step * step,
                              round_up(std::max<int64_t>(1, r.vocab), step));
  plan.input_slice = r.vocab;
  plan.score_block = std::min(plan.token_block, kTokenBlock);
  plan.input_sweep_block = plan.token_block;
  plan.input_sweep_slice = plan.slice_vocab;
  // In place, float products shrink to 16 bits within the tokens that are converted together.
  plan.input_block = plan.token_block;
  // 16-bit gradients do not move, so these blocks are free: sums about as large as grad_weight's.
  if (t.keeps_16_bits)
    plan.input_block = std::min(plan.token_block, std::max(kTokenTile, plan.slice_vocab));
  plan.weight_block = plan.token_block;
  return plan;
}

/// Completes a plan whose stored tokens are known.
void finish(const GpuPlanRequest& r, const PlanTraits& t, Plan* plan) {
  const bool chunks = plan->kind == PlanKind::kTokenChunks;
  const int64_t kept = kept_tokens(r, *plan);
  if (t.keeps_16_bits) {
    const int64_t padded = round_up(std::max<int64_t>(1, kept), kTokenTile);
    if (chunks) plan->weight_block = padded;
    if (writes_input(r, t)) plan->input_block = padded;
  }
  if (!t.copies_input) return;
  // Those of a chunk if several slices of classes need them, else of one product.
  const bool all_kept = chunks && plan->slice_vocab < r.vocab;
  plan->copied_tokens = all_kept ? kept
                        : chunks ? std::min(plan->weight_block, kept)
                                 : std::min(plan->token_block, r.tokens);
}

/// The plan with a sweep of its own for grad_input: its blocks are those of the other sweep with
/// tokens and classes exchanged, so that both have sums of about the same size, and large products.
Plan in_separate_sweeps(const GpuPlanRequest& r, const PlanTraits& t, const Plan& plan) {
  Plan separate = plan;
  separate.separate_sweeps = true;
  const int64_t step = t.kernels.scores.fused() ? kStoredTile : kGenericRange;
  const int64_t tokens = std::min(plan.token_block, std::max<int64_t>(1, fresh_tokens(r, plan)));
  separate.input_sweep_block =
      std::min(plan.slice_vocab, round_up(std::max<int64_t>(1, r.tokens), kTokenTile));
  separate.input_sweep_slice =
      std::min(std::max(step, tokens / step * step), round_up(std::max<int64_t>(1, r.vocab), step));
  return separate;
}

/// The largest chunk of [least, most] tokens that fits the budget; 0: none does.
int64_t largest_chunk(const GpuPlanRequest& r, const PlanTraits& t, int64_t budget, int64_t least,
                      int64_t most, const Plan& plan) {
  return largest_fitting(least, most, kTokenTile, [&](int64_t chunk) {
    Plan trial = plan;
    trial.chunk_tokens = chunk;
    finish(r, t, &trial);
    return layout(r, t, trial).total <= budget;
  });
}

/// Plans that may suit a request, whether or not they fit; chunks are as large as the budget allows,
/// or as small as can be.
class Candidates {
 public:
  using Visit = std::function<void(const Plan&)>;
  Candidates(const GpuPlanRequest& r, const PlanTraits& t, int64_t budget, const Visit& visit)
      : r_(r), t_(t), budget_(budget), visit_(visit) {
    stored_ = first_chunk(r, kept_score_bytes(r, t));
    rest_ = r.tokens - stored_;
    most_ = rest_ <= 0 ? 0 : r.chunk_size > 0 ? std::min(r.chunk_size, rest_) : rest_;
    least_ = r.chunk_size > 0 ? most_ : std::min(most_, kTokenTile);
    compact_ = r.accumulation == GradAccumulation::kAuto && is_16_bit(r.dtype);
  }

  void visit_all() const {
    const bool may_multiply_scores = t_.kernels.products.reads_scores && !r_.grad_bias;
    for (int scale = 0; scale < kScales; ++scale)
      for (int width = 0; width < kWidths; ++width)
        for (int from_scores = 0; from_scores <= (may_multiply_scores ? 1 : 0); ++from_scores)
          visit_size(scale, width, from_scores == 1);
  }

 private:
  void visit_size(int scale, int width, bool from_scores) const {
    const auto base = [&](PlanKind kind) {
      Plan plan = blocks(r_, t_, kind, scale, width);
      plan.products_from_scores = from_scores;
      if (kind != PlanKind::kStatistics) plan.stored_in_gradient = stored_;
      return plan;
    };
    if (!wants_gradient(r_)) return consider(base(PlanKind::kStatistics));
    if (!r_.statistics_known) token_chunks(base(PlanKind::kTokenChunks));
    if (!r_.statistics_known && !r_.grad_weight) return;
    Plan plan = base(PlanKind::kVocabSlices);
    vocab_slices(plan);
    if (stored_ > 0 && t_.keeps_16_bits && r_.memory_budget >= 0) {
      // Nothing in grad_weight's memory: in small budgets the maxima of these scores take most of it.
      Plan keeps_none = plan;
      keeps_none.stored_in_gradient = 0;
      vocab_slices(keeps_none);
    }
    // Partial statistics of fewer tokens at a time leave more room for scores.
    if (r_.statistics_known || plan.score_block <= kSmallScoreBlock) return;
    plan.score_block = kSmallScoreBlock;
    vocab_slices(plan);
  }

  void token_chunks(Plan plan) const {
    if (!r_.grad_weight || rest_ <= 0) {
      if (rest_ > 0) plan.chunk_tokens = largest_chunk_of(plan);
      consider(plan);
      // A power of two of tiles: in parts, their sums fill the GPU where others leave some of it idle.
      int64_t whole = kTokenTile;
      while (2 * whole <= plan.chunk_tokens) whole *= 2;
      const bool smaller = r_.chunk_size == 0 && whole < plan.chunk_tokens;
      plan.chunk_tokens = whole;
      if (smaller) consider(plan);
      return;
    }
    if (stored_ == 0 && most_ == rest_) {  // a single chunk needs no sums across chunks
      Plan one = plan;
      one.chunk_tokens = most_;
      consider(one);
    }
    plan.accumulation = Accumulation::kFloat32;
    if (has_float32_sums(r_.dtype)) several_chunks(plan);
    if (!compact_) return;
    plan.accumulation = Accumulation::kCompact;
    several_chunks(plan);
  }

  void several_chunks(Plan plan) const {
    plan.chunk_tokens = largest_chunk_of(plan);
    const int64_t chunks = ceil_div(rest_, plan.chunk_tokens);
    if (plan.accumulation == Accumulation::kCompact && chunks > kMostCompactTerms) return;
    consider(plan);
    if (r_.chunk_size > 0) return;
    // As many chunks, of about the same size.
    plan.chunk_tokens = std::min(plan.chunk_tokens, round_up(ceil_div(rest_, chunks), kTokenTile));
    consider(plan);
  }

  void vocab_slices(Plan plan) const {
    slices_with_more_scores(plan);
    if (!r_.grad_input || !r_.grad_weight) return;
    consider(in_separate_sweeps(r_, t_, plan));
    if (!compact_ || fresh_tokens(r_, plan) == 0) return;
    const int64_t terms = ceil_div(r_.vocab, plan.slice_vocab);
    plan.compact_input_sums = terms > 1 && terms <= kMostCompactTerms && r_.ranks == 0;
    if (plan.compact_input_sums) slices_with_more_scores(plan);
    // Parts of a slice of grad_weight that add up in its own memory. All scores that lie there must
    // be moved out at once.
    const int64_t parts = 2 + ceil_div(r_.tokens, plan.token_block);
    if (!writes_gradients(t_) || plan.token_block < plan.stored_in_gradient ||
        parts > kMostCompactTerms)
      return;
    plan.accumulation = Accumulation::kCompact;
    slices_with_more_scores(plan);
  }

  /// And with the scores of more tokens kept than those in the gradient.
  void slices_with_more_scores(Plan plan) const {
    consider(plan);
    if (r_.statistics_known || rest_ <= 0 || r_.chunk_size > 0) return;
    if (plan.stored_in_gradient < stored_) return;  // there is no room
    plan.stored_chunks = 1;
    plan.chunk_tokens = largest_chunk(r_, t_, budget_, std::min(rest_, kTokenTile), rest_, plan);
    if (plan.chunk_tokens > 0) consider(plan);
    // A few less, so that the others make whole rounds of tiles.
    plan.chunk_tokens = rest_ - round_up(rest_ - plan.chunk_tokens, 8 * kTokenTile);
    if (plan.chunk_tokens > 0) consider(plan);
  }

  /// The same with copies of the hidden states of more tokens, or of fewer than take part in a product of
  /// cuBLAS, which then becomes several.
  void copy_otherwise(Plan plan) const {
    const int64_t usual = plan.copied_tokens;
    if (plan.kind == PlanKind::kVocabSlices && usual < r_.tokens) {
      plan.copied_tokens = r_.tokens;
      visit_(plan);
    }
    if (t_.kernels.products.fused() || usual <= kCopiedTokens) return;
    plan.copied_tokens = kCopiedTokens;
    visit_(plan);
  }

  int64_t largest_chunk_of(const Plan& plan) const {
    return std::max(least_, largest_chunk(r_, t_, budget_, least_, most_, plan));
  }

  /// The same with grad_input in parts.
  void divide_input_sums(Plan plan) const {
    const bool can = r_.grad_input && plan.kind == PlanKind::kTokenChunks && writes_input(r_, t_) &&
                     !t_.skips && t_.kernels.products.architecture->overlaps_launches;
    if (!can) return;
    const int64_t rows = std::min(plan.input_block, kept_tokens(r_, plan));
    const int64_t tiles = ceil_div(rows, kTileRows) * ceil_div(r_.features, kTileColumns);
    const int64_t most =
        std::min(r_.multiprocessors / std::max<int64_t>(1, tiles), r_.vocab / kClassesOfPart);
    for (plan.input_parts = most; plan.input_parts > 1; plan.input_parts /= 2) visit_(plan);
  }

  void consider(Plan plan) const {
    finish(r_, t_, &plan);
    visit_(plan);
    divide_input_sums(plan);
    if (t_.copies_input) copy_otherwise(plan);
    if (!t_.keeps_16_bits || summed_while_kept(r_, t_, plan) == 0) return;
    plan.input_block = round_up(plan.input_block / 2, kTokenTile);
    visit_(plan);
  }

  const GpuPlanRequest& r_;
  const PlanTraits& t_;
  const int64_t budget_;
  const Visit& visit_;
  int64_t stored_, rest_;  // tokens whose scores lie in the gradient, all others
  int64_t least_, most_;   // tokens of a chunk of these
  bool compact_;           // the caller leaves to us how gradients add up
};

/// What products take in addition to the workspace: see gemm.h.
int64_t product_bytes(const GpuPlanRequest& r) {
  if (!r.upcasts || r.tokens == 0 || r.vocab == 0) return 0;
  int64_t most = upcast_bytes(r.vocab, r.features, r.tokens);
  if (r.grad_input) most = std::max(most, upcast_bytes(r.tokens, r.vocab, r.features));
  if (r.grad_weight) most = std::max(most, upcast_bytes(r.vocab, r.tokens, r.features));
  return most;
}

/// What plans are ranked by: the FLOPs that they are predicted to take the time of. An explicit
/// chunk_size wants chunks, which slices come before only where these are far faster.
double rank(const PlanRequest& r, const Plan& plan) {
  const bool unwanted =
      r.chunk_size > 0 && !r.statistics_known && plan.kind == PlanKind::kVocabSlices;
  return plan.predicted_flops + (unwanted ? 100 * product_flops(r) : 0);
}

/// What a search has found: the fastest of the plans that fit a budget, and the smallest of all.
struct Found {
  Plan fastest, smallest;
  double rank = std::numeric_limits<double>::infinity();  // of the fastest
  bool fits() const { return rank < std::numeric_limits<double>::infinity(); }
};

Found search(const GpuPlanRequest& request, const PlanTraits& traits, int64_t budget) {
  Found found;
  found.smallest.workspace_bytes = INT64_MAX;
  Candidates(request, traits, budget, [&](Plan candidate) {
    candidate.workspace_bytes = layout(request, traits, candidate).total;
    candidate.predicted_flops = 2 * predicted_cost(request, traits, candidate);
    const double its_rank = rank(request, candidate);
    if (candidate.workspace_bytes <= budget && its_rank < found.rank) {
      found.rank = its_rank;
      found.fastest = candidate;
    }
    if (candidate.workspace_bytes < found.smallest.workspace_bytes) found.smallest = candidate;
  }).visit_all();
  return found;
}

}  // namespace

PlanTraits plan_traits(const Problem& p, const PlanRequest& request, const Selection& kernels) {
  PlanTraits traits;
  traits.kernels = kernels;
  // exp(z - m) does not give the slope of a saturated soft cap. Handwritten kernels keep nothing else.
  traits.keeps_16_bits = suits_fused_kernels(p) && (kernels.scores.fused() || p.softcap == 0);
  traits.partials = 2 + (wants_logit_sum(p) ? 1 : 0) + (wants_entropy(p) ? 1 : 0) +
                    (p.probabilities != nullptr ? 3 : 0);
  traits.argmax = wants_argmax(p);
  if (p.shard != nullptr) {
    traits.shared_numbers = rank_numbers(p, request.statistics_known).count;
    traits.rounds_sums = p.shard->reduce_in_bfloat16 && p.dtype != DType::kFloat64;
  }
  traits.skips = skips_tiles(p) && kernels.products.fused();
  traits.smoothing_apart = traits.skips && p.label_smoothing > 0;
  // The gradient of the bias is summed from those of the logits, with all their parts.
  if (traits.smoothing_apart && request.grad_bias) traits.skips = traits.smoothing_apart = false;
  // With class probabilities no token is left out. cuBLAS takes a matrix as it is; fp16 rows are scaled.
  const bool own = kernels.products.fused();
  traits.copies_input =
      request.grad_weight && (p.dtype == DType::kFloat16 || (p.probabilities == nullptr && !own));
  return traits;
}

std::string make_plan(const GpuPlanRequest& request, const PlanTraits& traits, Plan* plan) {
  const int64_t floor =
      ((request.grad_input ? request.tokens : 0) + (request.grad_weight ? request.vocab : 0)) *
      request.features * size_of(request.dtype);
  const int64_t library = product_bytes(request);
  const bool limited = request.memory_budget >= 0;
  const int64_t budget =
      limited ? request.memory_budget - library : std::max(kDefaultBudget, floor + floor / 4);
  Found found = search(request, traits, budget);
  if (limited && !found.fits()) {
    *plan = found.smallest;
    plan->library_bytes = library;
    return budget_error(request, " on a GPU", *plan);
  }
  *plan = found.fits() ? found.fastest : found.smallest;
  const double most = found.rank * kMostSlowdown;
  while (!limited && found.fits() && plan->workspace_bytes > kSmallWorkspace) {
    found = search(request, traits, plan->workspace_bytes / 4 * 3);
    if (!found.fits() || found.rank > most) break;
    *plan = found.fastest;
  }
  count_work(request, fresh_tokens(request, *plan), plan);
  plan->library_bytes = library;
  return "";
}

std::string choose_plan(const Problem& problem, const Selection& kernels, CallPlan* call) {
  const GpuPlanRequest& request = call->request;
  call->traits = plan_traits(problem, request, kernels);
  const std::string objection = make_plan(request, call->traits, &call->plan);
  // What was measured was measured without a budget.
  const bool settled = kernels.forced || (kernels.measured != nullptr && request.memory_budget < 0);
  if (settled || !kernels.scores.fused() || kernels.products.fused()) return objection;
  Selection own_kernels = kernels;
  own_kernels.products = kernels.scores;
  own_kernels.predicted = true;
  CallPlan own{request, plan_traits(problem, request, own_kernels), {}};
  if (!make_plan(request, own.traits, &own.plan).empty()) return objection;
  const int products = (request.grad_input ? 1 : 0) + (request.grad_weight ? 1 : 0);
  const double speed = kernels.scores.architecture->relative_speed(kernels.capability);
  own.plan.predicted_flops += products * product_flops(request) * (1 / speed - 1);
  if (objection.empty() && rank(request, own.plan) >= rank(request, call->plan)) return objection;
  *call = own;
  return "";
}

std::string plan_call(const Problem& problem, const PlanRequest& request, const Gpu& gpu,
                      CallPlan* call) {
  std::string error;
  Problem planned = problem;
  planned.vocab = request.vocab;  // ranks that share a vocabulary choose alike: the largest shard's
  const Selection kernels =
      select_kernels(planned, gpu, forced_kernels(), measured_choices(), &error);
  if (!error.empty()) return error;
  call->request = GpuPlanRequest{request, upcasts(problem.dtype, gpu), multiprocessors_of(gpu)};
  error = choose_plan(problem, kernels, call);
  call->plan.kernels = name_of(call->traits.kernels);
  call->plan.kernels_reason = reason_of(call->traits.kernels);
  if (!error.empty()) error += ", with " + in_words(call->traits.kernels);
  return error;
}

}  // namespace memeff::cuda
