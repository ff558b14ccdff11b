// Properties of plans over a grid of requests, and of the workspace layout.
#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/planning.h"
#include "cpu/bf16_kernels.h"
#include "cpu/layout.h"
#include "cpu/tiling.h"

namespace {

using namespace memeff;

std::string name_of(const CpuPlanRequest& r) {
  return test::describe("N=", r.tokens, " D=", r.features, " V=", r.vocab, " dtype ",
                        static_cast<int>(r.dtype), r.bf16_kernels ? " kernels" : "", " gradients ",
                        r.grad_input, r.grad_weight, r.grad_bias, " known ", r.statistics_known,
                        " accumulation ", static_cast<int>(r.accumulation), " threads ", r.threads,
                        " chunk_size ", r.chunk_size, " budget ", r.memory_budget);
}

/// Memory that is in use during some of the steps.
struct Region {
  const char* name;
  int64_t begin;
  int64_t bytes;
  unsigned steps;
};
enum Step : unsigned { kScores = 1, kInput = 2, kWeight = 4, kAlways = 7 };

/// Everything that a plan keeps in the workspace, by what the backends read and write there.
std::vector<Region> regions_of(const CpuPlanRequest& r, const Plan& plan) {
  const CpuLayout at = layout_workspace(r, plan);
  const int64_t sum_bytes = size_of(accumulation_dtype(r.dtype));
  const int64_t tiles = ceil_div(r.vocab, kTileVocab);
  const bool chunks = plan.kind == PlanKind::kTokenChunks;
  const bool slices = plan.kind == PlanKind::kVocabSlices;
  const int64_t slice = std::min(plan.slice_vocab, r.vocab);
  // Token chunks: one step after the other. Slices: in turns, except sweeps of their own.
  const auto steps = [&](Step step) -> unsigned {
    if (chunks) return step;
    if (plan.separate_sweeps && step != kScores) return step;
    return kAlways;
  };
  std::vector<Region> regions;
  const auto add = [&](const char* name, int64_t begin, int64_t bytes, unsigned when) {
    if (bytes > 0) regions.push_back({name, begin, bytes, when});
  };
  // Twelve numbers of 8 bytes per token, and three per target (cpu/tokens.cpp).
  add("token arrays", at.token_arrays, (12 + 3 * std::max<int64_t>(1, r.targets)) * 8 * r.tokens,
      kAlways);
  add("class weights", at.class_weight, r.vocab * sum_bytes, kAlways);
  add("sums of the bias gradient", at.bias_sum, r.vocab * 8, kAlways);
  if (r.bf16_kernels) {
    // A tile of scores and its weight rows; sums of a task of grad_weight and its rows of gradients.
    const int64_t tile = kTileVocab * (kTileStride * 4 + copy_stride(kInnerBlock) * 2);
    const int64_t task = kTaskRows * (sum_stride(kTaskColumns) * 4 +
                                      copy_stride(std::min(plan.weight_block, r.tokens)) * 2);
    const int64_t needed = std::max(tile, r.grad_weight ? task : 0);
    CHECK(thread_scratch_bytes(r, plan) >= needed);
    add("thread scratch", at.thread_scratch,
        (r.threads - 1) * thread_scratch_bytes(r, plan) + needed, kAlways);
  }
  const bool stores = plan.chunk_tokens > 0 && (chunks || plan.stored_chunks > 0) &&
                      plan.stored_in_gradient < r.tokens;
  const int64_t in_gradient = round_up(plan.stored_in_gradient, kPanel);
  const int64_t in_workspace = stores ? round_up(plan.chunk_tokens, kPanel) : 0;
  if (r.bf16_kernels) {
    const int64_t kept = chunks ? std::max(in_gradient, in_workspace) : in_gradient + in_workspace;
    add("kept maxima", at.kept_maxima, tiles * kept * sum_bytes, kAlways);
  }
  add("scores", at.scores, r.vocab * in_workspace * score_bytes(r), kAlways);
  const bool several_chunks = plan.accumulation == Accumulation::kFloat32;
  if (several_chunks && r.dtype == DType::kBFloat16 && r.grad_weight) {
    add("remainder", at.remainder, r.vocab * r.features * 2, kAlways);
  }
  if (plan.accumulation == Accumulation::kCompact) {
    add("exponents", at.exponents, r.vocab * ceil_div(r.features, kCompactBlock), kAlways);
  }
  const bool discards = plan.kind == PlanKind::kStatistics && !r.bf16_kernels;
  if (slices || discards) {
    add("score slice", at.score_slice, slice * plan.token_block * score_bytes(r), kAlways);
  }
  const bool upcasts = !r.bf16_kernels && is_16_bit(r.dtype);
  const auto input_bytes = [&](int64_t tokens) {
    if (r.bf16_kernels) return round_up(tokens, kPanel) * round_up(r.features, 2) * 2;
    return tokens * r.features * sum_bytes;
  };
  const int64_t upcast = upcasts ? slice * r.features * sum_bytes : 0;
  const int64_t padded_features = round_up(r.features, kPanel);
  add("score input", at.score_step.input_block, input_bytes(plan.token_block), steps(kScores));
  add("score weight", at.score_step.weight_block, upcast, steps(kScores));
  add("partials", at.score_step.partials, r.partials * tiles * plan.token_block * sum_bytes,
      steps(kScores));
  if (r.grad_input) {
    if (is_16_bit(r.dtype)) {
      const int64_t kept = plan.stored_in_gradient + plan.stored_chunks * plan.chunk_tokens;
      const bool all = slices && r.grad_weight && !plan.separate_sweeps;
      const int64_t tokens = all ? std::max(r.tokens - kept, std::min(kept, plan.token_block))
                                 : std::min(plan.token_block, r.tokens);
      add("input sum", at.input_step.sum, tokens * sum_stride(r.features) * sum_bytes,
          steps(kInput));
    }
    const int64_t packed_weight = round_up(slice, 2) * padded_features * 2;
    add("input weight", at.input_step.weight_block, r.bf16_kernels ? packed_weight : upcast,
        steps(kInput));
    if (r.bf16_kernels) {
      add("input gradient", at.input_step.gradient_block,
          round_up(slice, 2) * round_up(std::min(plan.token_block, r.tokens), kMicroRows) * 2,
          steps(kInput));
    }
  }
  if (r.grad_weight) {
    const int64_t tokens = std::min(plan.weight_block, round_up(r.tokens, kPanel));
    const int64_t packed = round_up(tokens, 2) * padded_features * 2;
    add("weight input", at.weight_step.input_block, r.bf16_kernels ? packed : input_bytes(tokens),
        steps(kWeight));
    const bool in_cache = r.bf16_kernels && chunks &&
                          plan.weight_block >= std::max(plan.stored_in_gradient, plan.chunk_tokens);
    if (!in_cache) {
      add("weight sum", at.weight_step.sum, slice * sum_stride(r.features) * sum_bytes,
          steps(kWeight));
    }
  }
  return regions;
}

void check_layout(const CpuPlanRequest& r, const Plan& plan) {
  const std::vector<Region> regions = regions_of(r, plan);
  const int64_t total = layout_workspace(r, plan).total;
  CHECK_EQ(plan.workspace_bytes, total);
  for (size_t i = 0; i < regions.size(); ++i) {
    const Region& a = regions[i];
    if (a.begin % 64 != 0 || a.begin < 0 || a.begin + a.bytes > total) {
      test::fail(__FILE__, __LINE__,
                 test::describe(a.name, " at ", a.begin, ", ", a.bytes, " bytes of ", total));
    }
    for (size_t j = 0; j < i; ++j) {
      const Region& b = regions[j];
      const bool together = (a.steps & b.steps) != 0;
      if (together && a.begin < b.begin + b.bytes && b.begin < a.begin + a.bytes) {
        test::fail(__FILE__, __LINE__, test::describe(a.name, " overlaps ", b.name));
      }
    }
  }
}

void check_plan(const CpuPlanRequest& r, const Plan& plan) {
  if (r.memory_budget >= 0) CHECK(plan.workspace_bytes + plan.library_bytes <= r.memory_budget);
  CHECK_EQ(plan.library_bytes > 0, r.blas);
  CHECK(plan.workspace_bytes > 0 || r.tokens + r.vocab == 0);
  CHECK(plan.stored_in_gradient <= std::min(r.tokens, tokens_in_gradient_row(r, score_bytes(r))));
  CHECK(plan.stored_in_gradient == 0 || r.grad_weight);
  CHECK(plan.flops >= plan.floor_flops);
  // Products: scores, twice where they are made again, three times by two sweeps; gradients.
  const int64_t kept = plan.stored_in_gradient + plan.stored_chunks * plan.chunk_tokens;
  const int64_t fresh = plan.kind != PlanKind::kVocabSlices ? 0
                        : r.statistics_known                ? r.tokens
                                                            : std::max<int64_t>(0, r.tokens - kept);
  const double products =
      static_cast<double>(r.tokens) *
          ((r.statistics_known ? 0 : 1) + (r.grad_input ? 1 : 0) + (r.grad_weight ? 1 : 0)) +
      static_cast<double>(fresh) * (plan.separate_sweeps ? 2 : 1);
  CHECK_NEAR(plan.flops, 2 * products * static_cast<double>(r.features * r.vocab),
             1e-9 * plan.flops);
  CHECK(plan.token_block > 0 && plan.token_block % kPanel == 0);
  CHECK(plan.slice_vocab > 0 && plan.slice_vocab % kTileVocab == 0);
  const int64_t gradients = (r.grad_input ? r.tokens * r.features : 0) +
                            (r.grad_weight ? r.vocab * r.features : 0) +
                            (r.grad_bias ? r.vocab : 0);
  CHECK_EQ(plan.floor_bytes, gradients * size_of(r.dtype));
  CHECK(plan.kind != PlanKind::kStatistics || gradients == 0 ||
        !(r.grad_input || r.grad_weight || r.grad_bias));
  if (plan.kind == PlanKind::kTokenChunks) {
    CHECK(plan.stored_in_gradient == r.tokens || plan.chunk_tokens > 0);
    const bool several = r.grad_weight && plan.num_chunks > 1;
    CHECK(several || plan.accumulation == Accumulation::kExact);
    CHECK(!several || plan.accumulation != Accumulation::kExact);
    if (several) CHECK(r.dtype != DType::kFloat16);  // no sums to round once
    if (r.accumulation == GradAccumulation::kFloat32)
      CHECK(plan.accumulation == Accumulation::kFloat32 || !several);
    if (plan.accumulation == Accumulation::kCompact) {
      CHECK(r.dtype == DType::kBFloat16 && (r.memory_budget >= 0 || r.blas));
      CHECK(r.accumulation == GradAccumulation::kAuto);
      CHECK(plan.num_chunks <= 257);  // rounding errors add up
    }
  }
  if (r.chunk_size > 0) {
    // Torch's products want some tokens at a time.
    const int64_t size = r.blas ? std::max<int64_t>(r.chunk_size, 8) : r.chunk_size;
    CHECK(plan.stored_in_gradient <= size);
    CHECK(plan.token_block <= round_up(size, kPanel));
    if (plan.kind == PlanKind::kTokenChunks) CHECK(plan.chunk_tokens <= size);
  }
  check_layout(r, plan);
}

/// The least budget that the planner names when it refuses one byte.
int64_t named_budget(CpuPlanRequest r) {
  Plan plan;
  r.memory_budget = 1;
  const std::string error = make_plan(r, &plan);
  const size_t at = error.rfind("minimum is ");
  CHECK(at != std::string::npos);
  CHECK(error.find("memory_budget=1 bytes") != std::string::npos);
  return at == std::string::npos ? -1 : std::stoll(error.substr(at + 11));
}

void test_request(const CpuPlanRequest& request) {
  CpuPlanRequest r = request;
  test::context() = name_of(r);
  Plan free_plan;
  CHECK_EQ(make_plan(r, &free_plan), "");
  check_plan(r, free_plan);

  const int64_t least = named_budget(r);
  r.memory_budget = least - 1;
  test::context() = name_of(r);
  Plan plan;
  CHECK(!make_plan(r, &plan).empty());
  // By kind of plan: which kind a budget gets is a matter of memory traffic too, not of FLOPs alone.
  std::map<std::pair<PlanKind, bool>, double> least_flops;
  const int64_t most = std::max(least + 4096, 2 * free_plan.workspace_bytes);
  const int steps = 24;
  for (int i = 0; i <= steps; ++i) {
    r.memory_budget =
        least + static_cast<int64_t>(static_cast<double>(most - least) * i * i / (steps * steps));
    test::context() = name_of(r);
    const std::string error = make_plan(r, &plan);
    CHECK_EQ(error, "");
    if (!error.empty()) continue;
    check_plan(r, plan);
    // More memory may go to larger slices instead of stored scores: slightly more arithmetic, fewer passes.
    const auto at = least_flops.insert({{plan.kind, plan.separate_sweeps}, plan.flops}).first;
    CHECK(plan.flops <= 1.1 * at->second);
    at->second = std::min(at->second, plan.flops);
  }
}

struct Kind {
  DType dtype;
  bool bf16_kernels;
};

void test_grid() {
  const Kind kinds[] = {{DType::kBFloat16, true},
                        {DType::kBFloat16, false},
                        {DType::kFloat16, false},
                        {DType::kFloat32, false},
                        {DType::kFloat64, false}};
  const int64_t sizes[][3] = {{1, 1, 1},           {33, 7, 225},         {700, 64, 1000},
                              {4096, 1024, 32000}, {8192, 4096, 128256}, {100000, 2304, 256000},
                              {20, 33, 500000},    {5000, 3, 449},       {64, 32, 256},
                              {300, 16, 1000}};
  for (const Kind& kind : kinds) {
    for (const auto& size : sizes) {
      for (int gradients = 0; gradients < 8; ++gradients) {
        for (const bool known : {false, true}) {
          CpuPlanRequest r;
          r.tokens = size[0], r.features = size[1], r.vocab = size[2];
          r.dtype = kind.dtype, r.bf16_kernels = kind.bf16_kernels;
          r.blas = !kind.bf16_kernels;
          r.grad_input = (gradients & 1) != 0, r.grad_weight = (gradients & 2) != 0;
          r.grad_bias = (gradients & 4) != 0;
          r.statistics_known = known && gradients != 0;
          r.threads = 1 + gradients, r.partials = 2 + gradients % 4;
          r.targets = gradients == 7 ? 6 : gradients % 3;
          test_request(r);
          for (const int64_t chunk_size : {1, 100, 1024}) {
            r.chunk_size = chunk_size;
            r.accumulation =
                chunk_size == 100 ? GradAccumulation::kAuto : GradAccumulation::kFloat32;
            test_request(r);
          }
        }
      }
    }
  }
}

/// Sizes whose products do not fit 32 bits, and scores that do not fit 2^31 elements.
void test_large() {
  CpuPlanRequest r;
  r.tokens = int64_t{3} << 30, r.features = 8192, r.vocab = int64_t{1} << 22;
  r.dtype = DType::kBFloat16, r.bf16_kernels = true;
  r.grad_input = r.grad_weight = r.grad_bias = true;
  test_request(r);
  Plan plan;
  CHECK_EQ(make_plan(r, &plan), "");
  CHECK_EQ(plan.floor_bytes, (r.tokens * r.features + r.vocab * r.features + r.vocab) * 2);
  CHECK(plan.flops >=
        6.0 * static_cast<double>(r.tokens) * static_cast<double>(r.features * r.vocab));
}

/// A bf16 gradient's sums over chunks: in fp32 where that leaves room for chunks of a decent size, else
/// compact, and not at all where chunks would be tiny or too many.
void test_compact_sums() {
  CpuPlanRequest r;
  r.tokens = 4096, r.features = 1024, r.vocab = 32768;
  r.dtype = DType::kBFloat16, r.bf16_kernels = true, r.threads = 2;
  r.grad_input = r.grad_weight = true;
  const auto check = [&](int64_t mebibytes, PlanKind kind, Accumulation accumulation) {
    r.memory_budget = mebibytes << 20;
    test::context() = name_of(r);
    Plan plan;
    CHECK_EQ(make_plan(r, &plan), "");
    check_plan(r, plan);
    CHECK(plan.kind == kind);
    CHECK(plan.accumulation == accumulation);
    return plan;
  };
  check(128, PlanKind::kTokenChunks, Accumulation::kFloat32);
  // fp32 sums would leave room for nine chunks only, rather than four.
  check(96, PlanKind::kTokenChunks, Accumulation::kCompact);
  const Plan plan = check(32, PlanKind::kTokenChunks, Accumulation::kCompact);
  CHECK(plan.chunk_tokens >= 256);
  CHECK_EQ(plan.flops, plan.floor_flops);
  check(10, PlanKind::kVocabSlices, Accumulation::kExact);
  r.accumulation = GradAccumulation::kFloat32;
  check(32, PlanKind::kVocabSlices, Accumulation::kExact);
  r.accumulation = GradAccumulation::kAuto;
  r.tokens = 1 << 19;  // more than 256 chunks would fit
  check(130, PlanKind::kVocabSlices, Accumulation::kExact);
}

/// Without a budget, where a BLAS computes the products: a quarter of the logits in the dtype of the inputs, more
/// where that would cost more than 10 % of the time, less where it costs less than 3 %.
void test_default_of_a_blas() {
  const auto plan_of = [](int64_t tokens, int64_t features, int64_t vocab, DType dtype,
                          GradAccumulation accumulation = GradAccumulation::kAuto) {
    CpuPlanRequest r;
    r.tokens = tokens, r.features = features, r.vocab = vocab, r.dtype = dtype;
    r.accumulation = accumulation;
    r.blas = true, r.threads = 2, r.grad_input = r.grad_weight = true;
    test::context() = name_of(r);
    Plan plan;
    CHECK_EQ(make_plan(r, &plan), "");
    check_plan(r, plan);
    CHECK_EQ(plan.flops, plan.floor_flops);
    return plan;
  };
  const auto bytes = [](const Plan& plan) { return plan.workspace_bytes + plan.library_bytes; };
  const auto quarter = [](int64_t tokens, int64_t vocab, DType dtype) {
    return tokens * vocab * size_of(dtype) / 4;
  };
  // Less than a quarter.
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    const Plan plan = plan_of(8192, 1024, 32768, dtype);
    const bool compact = dtype == DType::kBFloat16;
    CHECK(plan.accumulation == (compact ? Accumulation::kCompact : Accumulation::kFloat32));
    CHECK(bytes(plan) < quarter(8192, 32768, dtype) * 3 / 4);
  }
  // A quarter, in more time than the largest chunks would take.
  Plan plan = plan_of(1024, 64, 65536, DType::kFloat32);
  CHECK(bytes(plan) <= quarter(1024, 65536, DType::kFloat32));
  CHECK(plan.num_chunks >= 4);
  plan = plan_of(2048, 2048, 128256, DType::kBFloat16);
  CHECK(plan.accumulation == Accumulation::kCompact);
  CHECK(bytes(plan) <= quarter(2048, 128256, DType::kBFloat16));
  // More than a quarter: with few tokens chunks would become too small.
  plan = plan_of(2048, 512, 32768, DType::kBFloat16);
  CHECK(bytes(plan) > quarter(2048, 32768, DType::kBFloat16));
  CHECK(plan.chunk_tokens >= 192);
  // Little memory in any case; what the caller wants.
  CHECK(plan_of(300, 32, 5000, DType::kBFloat16).accumulation == Accumulation::kFloat32);
  plan = plan_of(2048, 2048, 128256, DType::kBFloat16, GradAccumulation::kFloat32);
  CHECK(plan.accumulation == Accumulation::kFloat32);
}

/// No tokens at all, or none of the inner dimension.
void test_empty() {
  for (const int64_t features : {0, 5}) {
    CpuPlanRequest r;
    r.tokens = features == 0 ? 10 : 0, r.features = features, r.vocab = 300;
    r.grad_input = r.grad_weight = r.grad_bias = true;
    test::context() = name_of(r);
    Plan plan;
    CHECK_EQ(make_plan(r, &plan), "");
    check_plan(r, plan);
  }
}

/// Rows of scores kept in grad_weight must start where its own rows do.
void test_tokens_in_gradient_row() {
  CpuPlanRequest r;
  r.dtype = DType::kBFloat16;
  for (const int64_t features : {1, 2, 3, 64, 65}) {
    r.features = features;
    r.bf16_kernels = true;
    CHECK_EQ(tokens_in_gradient_row(r, score_bytes(r)), features);
    r.bf16_kernels = false;  // fp32 scores
    CHECK_EQ(tokens_in_gradient_row(r, score_bytes(r)), features % 2 == 0 ? features / 2 : 0);
  }
}

}  // namespace

int main() {
  test_grid();
  test_large();
  test_compact_sums();
  test_default_of_a_blas();
  test_empty();
  test_tokens_in_gradient_row();
  return test::result();
}
