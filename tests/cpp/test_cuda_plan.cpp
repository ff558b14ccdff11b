// Properties of the plans for a GPU. (That the parts of the workspace do not overlap is shown by the
// emulated tests, which run the kernels in workspaces of exactly these sizes, filled with NaN.)
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/planning.h"
#include "cuda/gemm.h"
#include "cuda/layout.h"
#include "cuda/plan.h"
#include "cuda/plan_cost.h"
#include "cuda/plan_sizes.h"
#include "cuda/work_list.h"

namespace {

using namespace memeff;
using cuda::GpuPlanRequest;
using cuda::PlanTraits;
using cuda::Selection;

constexpr int64_t kMiB = int64_t{1} << 20;

struct Case {
  GpuPlanRequest request;
  PlanTraits traits;
};

std::string name_of(const Case& c) {
  const GpuPlanRequest& r = c.request;
  return test::describe("N=", r.tokens, " D=", r.features, " V=", r.vocab, " dtype ",
                        static_cast<int>(r.dtype), " ", cuda::name_of(c.traits.kernels),
                        " gradients ", r.grad_input, r.grad_weight, r.grad_bias, " known ",
                        r.statistics_known, " accumulation ", static_cast<int>(r.accumulation),
                        " chunk_size ", r.chunk_size, " skips ", c.traits.skips, " upcasts ",
                        r.upcasts, " budget ", r.memory_budget);
}

Selection kernels(const char* names) {
  Selection selection;
  CHECK(parse_kernels(names, &selection));
  return selection;
}

Case make_case(int64_t tokens, int64_t features, int64_t vocab, const Selection& selection,
               DType dtype = DType::kBFloat16) {
  Case c;
  c.request.tokens = tokens, c.request.features = features, c.request.vocab = vocab;
  c.request.dtype = dtype, c.request.grad_input = c.request.grad_weight = true;
  c.traits.kernels = selection;
  c.traits.keeps_16_bits = is_16_bit(dtype);
  c.traits.copies_input = !selection.products.fused();
  return c;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const char* const selections[] = {"generic,generic", "sm80,generic", "sm90,sm90", "sm90,sm90rs"};
  const int64_t shapes[][3] = {{0, 64, 100},          {1, 1, 1},
                               {7, 33, 1001},         {130, 64, 5000},
                               {4096, 64, 300},       {4096, 4096, 128256},
                               {16384, 2048, 248320}, {1 << 20, 512, 32000}};
  for (const char* const name : selections)
    for (const auto& shape : shapes)
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
        for (int wanted = 0; wanted < 8; ++wanted)
          for (int known = 0; known < 2; ++known)
            for (const bool special : {false, true}) {
              const Selection selection = kernels(name);
              if (dtype == DType::kFloat32 && selection.scores.fused()) continue;
              const bool skips = special && selection.products.fused();
              const bool upcasts =
                  special && !selection.scores.fused() && dtype == DType::kBFloat16;
              if (special && !skips && !upcasts) continue;
              if (known == 1 && wanted == 0) continue;
              Case c = make_case(shape[0], shape[1], shape[2], selection, dtype);
              c.request.grad_input = (wanted & 1) != 0, c.request.grad_weight = (wanted & 2) != 0;
              c.request.grad_bias = (wanted & 4) != 0, c.request.statistics_known = known == 1;
              c.request.upcasts = upcasts;
              c.traits.skips = skips, c.traits.partials = 2 + wanted % 3;
              if (!c.request.grad_weight) c.traits.copies_input = false;
              cases.push_back(c);
              if (selection.scores.fused() || !is_16_bit(dtype)) continue;
              c.traits.keeps_16_bits = false;
              cases.push_back(c);
            }
  return cases;
}

cuda::Plan plan_of(const Case& c) {
  cuda::Plan plan;
  CHECK_EQ(make_plan(c.request, c.traits, &plan), "");
  return plan;
}

void check_plan(const Case& c, const cuda::Plan& plan) {
  const GpuPlanRequest& r = c.request;
  CHECK_EQ(layout(r, c.traits, plan).total, plan.workspace_bytes);
  if (r.memory_budget >= 0) CHECK(plan.workspace_bytes + plan.library_bytes <= r.memory_budget);
  CHECK_EQ(plan.library_bytes > 0, r.upcasts && r.tokens > 0);
  if (r.upcasts && r.tokens > 0) {
    // Pieces of both operands of each product, whichever is the largest.
    using cuda::upcast_bytes;
    CHECK(plan.library_bytes >= upcast_bytes(r.vocab, r.features, r.tokens));
    if (r.grad_input) CHECK(plan.library_bytes >= upcast_bytes(r.tokens, r.vocab, r.features));
    if (r.grad_weight) CHECK(plan.library_bytes >= upcast_bytes(r.vocab, r.tokens, r.features));
  }
  CHECK(plan.token_block > 0 && plan.slice_vocab > 0 && plan.input_block > 0);
  // Tiles of kept scores are counted from the start of a chunk and of a slice.
  for (const int64_t block :
       {plan.token_block, plan.score_block, plan.input_block, plan.input_sweep_block})
    CHECK_EQ(block % cuda::kTokenTile, 0);
  for (const int64_t slice : {plan.slice_vocab, plan.input_sweep_slice})
    CHECK_EQ(slice % cuda::kStoredTile, 0);
  CHECK(plan.slice_vocab <= 16384);  // make_work_list is one block
  CHECK(plan.stored_in_gradient <= tokens_in_gradient_row(r, kept_score_bytes(r, c.traits)));
  const bool gradient = r.grad_input || r.grad_weight || r.grad_bias;
  CHECK_EQ(gradient, plan.kind != PlanKind::kStatistics);
  if (r.statistics_known) CHECK(plan.kind == PlanKind::kVocabSlices);
  if (plan.kind == PlanKind::kTokenChunks) CHECK_EQ(plan.flops, plan.floor_flops);
  CHECK(plan.flops >= plan.floor_flops);
  const int products = 1 + (r.grad_input ? 1 : 0) + (r.grad_weight ? 1 : 0);
  CHECK(plan.flops <= (products + 2) * 2.0 * r.tokens * r.features * r.vocab);
  const bool compact = plan.accumulation == Accumulation::kCompact || plan.compact_input_sums;
  if (compact) CHECK(is_16_bit(r.dtype) && r.accumulation == GradAccumulation::kAuto);
  // Compact sums round one term after the other, so there are few of these.
  if (plan.accumulation == Accumulation::kCompact && plan.kind == PlanKind::kTokenChunks)
    CHECK(r.grad_weight && plan.num_chunks <= 257);
  if (r.dtype == DType::kFloat16) CHECK(plan.accumulation != Accumulation::kFloat32);
  if (plan.accumulation == Accumulation::kCompact && plan.kind == PlanKind::kVocabSlices) {
    // All scores leave a slice of the gradient before the first sums are written there.
    CHECK(plan.token_block >= plan.stored_in_gradient);
    CHECK(r.tokens <= 256 * plan.token_block);
    CHECK(c.traits.kernels.products.fused() && !c.traits.smoothing_apart);
  }
  if (plan.compact_input_sums)
    CHECK(r.grad_input && r.grad_weight && plan.kind == PlanKind::kVocabSlices &&
          plan.num_slices > 1 && plan.num_slices <= 256 && !plan.separate_sweeps);
  CHECK(plan.input_parts >= 1);
  if (plan.input_parts > 1)
    CHECK(r.grad_input && plan.kind == PlanKind::kTokenChunks && !c.traits.skips &&
          c.traits.kernels.products.architecture->overlaps_launches);
  if (plan.products_from_scores) CHECK(c.traits.kernels.products.reads_scores && !r.grad_bias);
  if (!c.traits.keeps_16_bits) {
    // Float products shrink in place within the tokens that are converted together.
    CHECK_EQ(plan.input_block, plan.token_block);
    CHECK_EQ(plan.weight_block, plan.token_block);
  }
}

void more_memory_never_hurts(Case c) {
  double cost = 1e300;
  for (int64_t budget = kMiB; budget <= int64_t{8} << 30; budget *= 4) {
    c.request.memory_budget = budget;
    test::context() = name_of(c);
    cuda::Plan plan;
    const std::string problem = make_plan(c.request, c.traits, &plan);
    if (!problem.empty()) {
      CHECK_EQ(cost, 1e300);  // what fitted a smaller budget still fits
      CHECK(problem.find("memory_budget=") == 0);
      continue;
    }
    check_plan(c, plan);
    // Chunks are as large as the budget allows, which may fit tiles a little worse.
    CHECK(predicted_cost(c.request, c.traits, plan) <= cost * 1.02);
    cost = predicted_cost(c.request, c.traits, plan);
  }
}

void names_the_least_budget_that_works(Case c) {
  c.request.memory_budget = 1;
  test::context() = name_of(c);
  cuda::Plan plan;
  const std::string problem = make_plan(c.request, c.traits, &plan);
  const std::string before = "the minimum is ";
  const size_t at = problem.find(before);
  CHECK(at != std::string::npos);
  if (at == std::string::npos) return;
  const int64_t least = std::stoll(problem.substr(at + before.size()));
  c.request.memory_budget = least - 1;
  CHECK(!make_plan(c.request, c.traits, &plan).empty());
  // From there upward slices are the smallest, and sums have the most terms.
  for (const int64_t percent :
       {100, 105, 110, 115, 120, 130, 140, 160, 180, 200, 250, 300, 400, 600}) {
    c.request.memory_budget = least / 100 * percent + least % 100;
    test::context() = name_of(c);
    CHECK_EQ(make_plan(c.request, c.traits, &plan), "");
    check_plan(c, plan);
  }
}

// The memory that design goals ask for, at the FLOPs that they allow, in products that are large
// enough for a GPU: what tiles in flight stay empty, launches and memory traffic add is limited.
void keeps_the_promises_for_large_heads() {
  const struct {
    int64_t tokens, budget;
    const char* kernels;
    double ndv, predicted_ndv;
  } goals[] = {
      {4096, 32, "sm90,sm90", 6, 6.65},        {8192, 512, "sm90,sm90", 6, 6.65},
      {8192, 512, "sm90,sm90rs", 6, 6.5},      {8192, 256, "sm90,sm90", 6, 6.85},
      {8192, 96, "sm90,sm90", 7, 7.8},         {8192, 32, "sm90,sm90", 7, 8.45},
      {8192, 32, "sm90,sm90rs", 7, 8.45},      {16384, 32, "sm90,sm90", 7.5, 9.1},
      {8192, 512, "sm90,generic", 6, 7.6},     {8192, 32, "sm90,generic", 10, 14.8},
      {4096, 64, "generic,generic", 6, 7.8},   {8192, 512, "generic,generic", 6, 8.0},
      {8192, 256, "generic,generic", 7, 8.9},  {8192, 32, "generic,generic", 8, 14.1},
      {16384, 32, "generic,generic", 9, 15.8},
  };
  for (const auto& goal : goals) {
    Case c = make_case(goal.tokens, 4096, 128256, kernels(goal.kernels));
    c.request.memory_budget = goal.budget * kMiB;
    test::context() = name_of(c);
    const cuda::Plan plan = plan_of(c);
    check_plan(c, plan);
    const double ndv = static_cast<double>(goal.tokens) * 4096.0 * 128256.0;
    CHECK(plan.flops <= goal.ndv * 1.001 * ndv);
    CHECK(plan.predicted_flops <= goal.predicted_ndv * ndv);
    CHECK(plan.predicted_flops >= plan.flops);
  }
}

// Kept scores are gradients before the sweeps over slices begin, if these are for both gradients.
void maxima_make_room_for_the_sweeps() {
  Case c = make_case(8192, 4096, 128256, kernels("sm90,sm90"));
  c.request.memory_budget = 32 * kMiB;
  test::context() = name_of(c);
  const cuda::Plan plan = plan_of(c);
  CHECK(plan.stored_in_gradient > 0 && plan.kind == PlanKind::kVocabSlices);
  CHECK(plan.accumulation == Accumulation::kCompact);
  const cuda::Layout with_input = layout(c.request, c.traits, plan);
  CHECK(with_input.weight_copy < with_input.kept_maxima);
  // They stay where the sweep itself turns scores into gradients, and where products read scores.
  Case without_input = c, from_scores = c;
  without_input.request.grad_input = false;
  from_scores.traits.kernels = kernels("sm90,sm90rs");
  cuda::Plan multiplies_scores = plan;
  multiplies_scores.products_from_scores = true;
  const int64_t maxima = int64_t{4} * (128256 / 128) * plan.stored_in_gradient;
  for (const auto& [other, its_plan] :
       {std::pair{without_input, plan}, std::pair{from_scores, multiplies_scores}}) {
    test::context() = name_of(other);
    const cuda::Layout at = layout(other.request, other.traits, its_plan);
    for (const int64_t offset : {at.slice, at.weight_copy, at.partials})
      CHECK(offset == 0 || offset >= at.kept_maxima + maxima);
  }
}

// Until something is measured, the handwritten products where they are predicted to win.
void chooses_products_by_the_memory() {
  Problem problem;
  problem.dtype = DType::kBFloat16;
  problem.tokens = 8192, problem.features = 4096, problem.vocab = 128256;
  const auto choose = [&](int64_t budget, const Selection& selection) {
    cuda::CallPlan call;
    call.request = make_case(8192, 4096, 128256, selection).request;
    call.request.memory_budget = budget < 0 ? -1 : budget * kMiB;
    CHECK_EQ(choose_plan(problem, selection, &call), "");
    const Selection& chosen = call.traits.kernels;
    CHECK(chosen.scores == selection.scores);
    CHECK(chosen.products == (chosen.predicted ? selection.scores : selection.products));
    // What a plan says of its bytes is said for the kernels that it was made for.
    CHECK_EQ(layout(call.request, call.traits, call.plan).total, call.plan.workspace_bytes);
    return chosen.predicted;
  };
  const Selection by_rule = kernels("sm90,generic");
  CHECK(choose(32, by_rule));
  CHECK(!choose(-1, by_rule));
  Selection forced = by_rule, measured = by_rule;
  forced.forced = true;
  const cuda::MeasuredChoice row;
  measured.measured = &row;
  CHECK(choose(32, measured) && !choose(-1, measured));
  for (const Selection& given : {forced, kernels("generic,generic"), kernels("sm90,sm90")})
    CHECK(!choose(32, given));
}

// bf16 before sm_80, in a small budget: 16 MiB are for the copies in fp32, 16 for the maxima of the scores in
// grad_weight's memory.
void upcasts_in_small_pieces() {
  CHECK(cuda::upcasts(DType::kBFloat16, {75}) && !cuda::upcasts(DType::kBFloat16, {80}));
  CHECK(!cuda::upcasts(DType::kFloat16, {75}));
  constexpr int64_t kHuge = int64_t{1} << 40;
  CHECK_EQ(cuda::upcast_bytes(kHuge, kHuge, kHuge), 16 * kMiB);
  CHECK_EQ(cuda::upcast_bytes(3, 5, 7), 2 * 512);
  Case c = make_case(4096, 4096, 128256, kernels("generic,generic"));
  c.request.upcasts = true;
  c.request.memory_budget = 36 * kMiB;
  test::context() = name_of(c);
  const cuda::Plan plan = plan_of(c);
  check_plan(c, plan);
  CHECK_EQ(plan.library_bytes, 16 * kMiB);
}

// Scores in 16 bits say too little of class probabilities and of the slope of a soft cap; handwritten
// kernels have no others.
void keeps_scores_in_16_bits() {
  const auto keeps = [](const Problem& problem, const char* names) {
    return cuda::plan_traits(problem, {}, kernels(names)).keeps_16_bits;
  };
  Problem problem;
  problem.dtype = DType::kBFloat16, problem.features = 64;
  CHECK(keeps(problem, "generic,generic") && keeps(problem, "sm90,generic"));
  problem.softcap = 30.0;
  CHECK(!keeps(problem, "generic,generic") && keeps(problem, "sm90,generic"));
  problem.softcap = 0.0, problem.probabilities = &problem;
  CHECK(!keeps(problem, "generic,generic"));
  problem.probabilities = nullptr, problem.dtype = DType::kFloat32;
  CHECK(!keeps(problem, "generic,generic"));
}

// In a budget that the maxima of kept scores would fill all scores are computed again, in larger products.
void keeps_nothing_where_there_is_no_room() {
  Case c = make_case(16384, 4096, 131072, kernels("generic,generic"));
  c.request.memory_budget = 32 * kMiB;
  test::context() = name_of(c);
  const cuda::Plan plan = plan_of(c);
  check_plan(c, plan);
  CHECK_EQ(plan.stored_in_gradient, 0);
  CHECK(plan.predicted_flops < 20 * (16384.0 * 4096.0 * 131072.0));  // 26.3 with 4096 tokens kept
  c.request.memory_budget = 64 * kMiB;
  test::context() = name_of(c);
  CHECK_EQ(plan_of(c).stored_in_gradient, 4096);
}

// Where grad_input has fewer tiles than the GPU multiprocessors, its sums over classes are divided.
void divides_the_long_sums_of_few_tiles() {
  const auto parts = [](int64_t tokens, int64_t features, int64_t vocab, const char* names) {
    const Case c = make_case(tokens, features, vocab, kernels(names));
    test::context() = name_of(c);
    const cuda::Plan plan = plan_of(c);
    check_plan(c, plan);
    return plan.input_parts;
  };
  for (const char* const names : {"sm90,sm90", "sm90x2,sm90x2"}) {
    CHECK_EQ(parts(512, 768, 50304, names), 11);   // 12 tiles of 132
    CHECK_EQ(parts(512, 4096, 128256, names), 2);  // 64 tiles
    CHECK(parts(40, 48, 2100, names) > 1);         // as an emulated test has it
    CHECK_EQ(parts(1024, 4096, 128256, names), 1);
    CHECK_EQ(parts(512, 768, 300, names), 1);
  }
  // cuBLAS divides them by itself; launches of sm80 do not overlap.
  for (const char* const names : {"generic,generic", "sm90,generic", "sm80,sm80"})
    CHECK_EQ(parts(512, 768, 50304, names), 1);
  const Case c = make_case(512, 768, 50304, kernels("sm90,sm90"));
  const cuda::Plan plan = plan_of(c);
  cuda::Plan whole = plan;
  whole.input_parts = 1;
  test::context() = name_of(c);
  const double saved = predicted_cost(c.request, c.traits, whole) - plan.predicted_flops / 2;
  const double tile = 128.0 * 256.0 * 132.0 * 50304.0;  // what one tile keeps the GPU waiting for
  CHECK(saved > 0.8 * tile && saved < tile);
}

// Without a budget: the smallest workspace that costs little time.
void is_lean_by_default() {
  for (const char* const names : {"generic,generic", "sm90,sm90"})
    for (const int64_t tokens : {4096, 8192, 16384}) {
      Case c = make_case(tokens, 4096, 128256, kernels(names));
      test::context() = name_of(c);
      const Plan lean = plan_of(c);
      c.request.memory_budget = (tokens + 128256) * 4096 * 2 / 4 * 5;  // what it may take
      const Plan fast = plan_of(c);
      CHECK(lean.predicted_flops <= 1.031 * fast.predicted_flops);
      CHECK(lean.workspace_bytes <= fast.workspace_bytes);
      if (lean.workspace_bytes <= 64 * kMiB) continue;  // small enough
      c.request.memory_budget = lean.workspace_bytes / 2;
      CHECK(plan_of(c).predicted_flops > 1.02 * fast.predicted_flops);
    }
}

// An explicit chunk_size makes slices a last resort; what these are predicted to take stays the same.
void predicted_flops_are_flops() {
  for (const int64_t chunk_size : {0, 1024}) {
    Case c = make_case(8192, 4096, 128256, kernels("sm90,sm90"));
    c.request.memory_budget = 40 * kMiB;  // no room for chunks
    c.request.chunk_size = chunk_size;
    test::context() = name_of(c);
    const cuda::Plan plan = plan_of(c);
    CHECK(plan.kind == PlanKind::kVocabSlices);
    CHECK_EQ(plan.predicted_flops, 2 * predicted_cost(c.request, c.traits, plan));
    CHECK(plan.predicted_flops >= plan.flops && plan.predicted_flops <= 1.6 * plan.floor_flops);
  }
}

void obeys_the_caller() {
  Case c = make_case(10000, 512, 32000, kernels("sm80,generic"));
  c.request.chunk_size = 300;
  test::context() = name_of(c);
  const cuda::Plan plan = plan_of(c);
  CHECK(plan.kind == PlanKind::kTokenChunks);
  CHECK_EQ(plan.chunk_tokens, 300);
  CHECK_EQ(plan.stored_in_gradient, 300);
  c.request.chunk_size = 0;
  // Many chunks: compact sums unless fp32 sums are asked for.
  c.traits.kernels = kernels("sm80,sm80");
  c.traits.copies_input = false;
  c.request.memory_budget = 40 * kMiB;
  c.request.accumulation = GradAccumulation::kAuto;
  test::context() = name_of(c);
  const cuda::Plan compact = plan_of(c);
  check_plan(c, compact);
  CHECK(compact.accumulation == Accumulation::kCompact);
  c.request.accumulation = GradAccumulation::kFloat32;
  test::context() = name_of(c);
  CHECK(plan_of(c).accumulation != Accumulation::kCompact && !plan_of(c).compact_input_sums);
}

}  // namespace

int main() {
  for (const Case& c : all_cases()) {
    test::context() = name_of(c);
    check_plan(c, plan_of(c));
    if (c.request.tokens > 0) names_the_least_budget_that_works(c);
    more_memory_never_hurts(c);
  }
  keeps_the_promises_for_large_heads();
  maxima_make_room_for_the_sweeps();
  chooses_products_by_the_memory();
  upcasts_in_small_pieces();
  keeps_scores_in_16_bits();
  keeps_nothing_where_there_is_no_room();
  divides_the_long_sums_of_few_tiles();
  is_lean_by_default();
  predicted_flops_are_flops();
  obeys_the_caller();
  return test::result();
}
