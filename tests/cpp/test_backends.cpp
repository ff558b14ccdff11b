// Whole calls through the driver, on plain memory, against a reference in double: every plan, dtype and
// option, on ragged shapes. The workspace has exactly the planned bytes, between guards, and is full of
// NaN at first; the results must not depend on the number of threads in a single bit.
#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/planning.h"
#include "cpu/cpu_backend.h"
#include "cpu/features.h"
#include "cpu/layout.h"
#include "cpu/tiling.h"
#include "driver/driver.h"
#include "memory.h"
#include "reference.h"
#include "standalone.h"

namespace {

using namespace memeff;
using test::GuardedBuffer;

struct Shape {
  int64_t tokens, features, vocab;
};

struct Options {
  const char* name;
  bool bias = false;
  double softcap = 0;
  double smoothing = 0;
  bool class_weight = false;
  bool probabilities = false;
  double z_loss = 0;
  bool statistics = false;
  int ignored = 0;  // every so-manieth token; 0: none, 1: all
  bool token_weight = false;
  Reduction reduction = Reduction::kMean;
  double logit_scale = 1;
  double num_items = 0;
  bool partial_gradients = false;  // also some gradients without the others
};

std::vector<Options> all_options() {
  std::vector<Options> list;
  const auto add = [&](const char* name, const std::function<void(Options&)>& change) {
    Options options;
    options.name = name;
    change(options);
    list.push_back(options);
  };
  add("plain", [](Options&) {});
  add("bias, ignored tokens", [](Options& o) {
    o.bias = o.partial_gradients = true;
    o.ignored = 5;
  });
  add("all tokens ignored", [](Options& o) { o.bias = true, o.ignored = 1; });
  add("softcap", [](Options& o) { o.softcap = 2, o.logit_scale = 1.5, o.bias = true; });
  add("smoothing", [](Options& o) { o.smoothing = 0.2, o.bias = true, o.ignored = 3; });
  add("softcap, smoothing", [](Options& o) { o.softcap = 2, o.smoothing = 0.1; });
  add("class weights", [](Options& o) { o.class_weight = true, o.ignored = 4; });
  add("z-loss, sum", [](Options& o) { o.z_loss = 0.1, o.reduction = Reduction::kSum; });
  add("statistics", [](Options& o) { o.statistics = true, o.ignored = 3, o.bias = true; });
  add("probabilities", [](Options& o) { o.probabilities = true; });
  add("everything, index targets", [](Options& o) {
    o.bias = o.class_weight = o.token_weight = o.statistics = true;
    o.softcap = 3, o.smoothing = 0.1, o.z_loss = 0.05, o.ignored = 6, o.logit_scale = 0.8;
    o.num_items = 17;
  });
  add("everything but softcap", [](Options& o) {
    o.bias = o.class_weight = o.token_weight = o.statistics = true;
    o.smoothing = 0.1, o.z_loss = 0.05, o.ignored = 6, o.logit_scale = 0.8;
  });
  add("everything, probabilities", [](Options& o) {
    o.bias = o.class_weight = o.token_weight = o.statistics = o.probabilities = true;
    o.softcap = 3, o.smoothing = 0.1, o.z_loss = 0.05, o.reduction = Reduction::kSum;
  });
  return list;
}

/// How far results may be from the reference, relative to the largest element.
struct Tolerance {
  double statistics, gradient;
};

Tolerance tolerance_of(DType dtype, bool bf16_kernels) {
  if (dtype == DType::kFloat64) return {1e-12, 1e-12};
  if (dtype == DType::kFloat32) return {2e-5, 2e-5};
  if (dtype == DType::kFloat16) return {2e-5, 2e-3};
  return {2e-5, bf16_kernels ? 1e-2 : 5e-3};  // one rounding: 2^-9 of the element
}

/// Memory of one problem, inputs filled.
class Case {
 public:
  Case(const Shape& shape, DType dtype, const Options& options)
      : input_(shape.tokens * (shape.features + 3) * size_of(dtype)),
        weight_(shape.vocab * (shape.features + 5) * size_of(dtype)),
        bias_(shape.vocab * size_of(dtype)),
        probabilities_(shape.tokens * shape.vocab * 4),
        target_(shape.tokens * 8),
        class_weight_(shape.vocab * 8),
        token_weight_(shape.tokens * 8),
        grad_loss_(shape.tokens * 8) {
    Problem& p = problem;
    p.tokens = shape.tokens, p.features = shape.features, p.vocab = shape.vocab;
    p.dtype = dtype, p.reduction = options.reduction, p.label_smoothing = options.smoothing;
    p.softcap = options.softcap, p.logit_scale = options.logit_scale, p.z_loss = options.z_loss;
    p.num_items = options.num_items > 0 ? &options.num_items : nullptr,
    p.statistics = options.statistics;
    p.input = input_.as<void>(), p.input_stride = shape.features + 3;
    p.weight = weight_.as<void>(), p.weight_stride = shape.features + 5;
    fill_rows(&input_, p.tokens, p.input_stride, 1.5);
    fill_rows(&weight_, p.vocab, p.weight_stride, 1.5 / std::sqrt(p.features));
    if (options.bias) {
      for (int64_t v = 0; v < p.vocab; ++v)
        store(dtype, bias_.as<void>(), v, random_.uniform(-1, 1));
      p.bias = bias_.as<void>();
    }
    if (options.probabilities) {
      fill_probabilities();
    } else {
      for (int64_t n = 0; n < p.tokens; ++n) {
        const bool ignored = options.ignored > 0 && n % options.ignored == 0;
        target_.as<int64_t>()[n] = ignored ? p.ignore_index : random_.below(p.vocab);
      }
      p.target = target_.as<int64_t>();
    }
    fill_doubles(&class_weight_, p.vocab, 0.5, 1.5);
    fill_doubles(&token_weight_, p.tokens, 0.5, 1.5);
    fill_doubles(&grad_loss_, p.tokens, -1, 1);
    if (options.class_weight) p.class_weight = class_weight_.as<double>();
    if (options.token_weight) p.token_weight = token_weight_.as<double>();
  }

  const double* grad_loss() const { return grad_loss_.as<double>(); }
  bool intact() const { return input_.intact() && weight_.intact() && target_.intact(); }

  Problem problem;

 private:
  void fill_rows(GuardedBuffer* rows, int64_t count, int64_t stride, double spread) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < problem.features; ++d) {
        store(problem.dtype, rows->as<void>(), i * stride + d, random_.uniform(-spread, spread));
      }
    }
  }

  void fill_doubles(GuardedBuffer* values, int64_t count, double low, double high) {
    for (int64_t i = 0; i < count; ++i) values->as<double>()[i] = random_.uniform(low, high);
  }

  /// Class-major, so that both strides are used; rows of a token sum to 1.
  void fill_probabilities() {
    Problem& p = problem;
    p.probabilities = probabilities_.as<void>();
    p.probabilities_token_stride = 1, p.probabilities_class_stride = p.tokens;
    for (int64_t n = 0; n < p.tokens; ++n) {
      for (int64_t v = 0; v < p.vocab; ++v) {
        probabilities_.as<float>()[v * p.tokens + n] =
            static_cast<float>(random_.uniform(0, 2) / static_cast<double>(p.vocab));
      }
    }
  }

  test::Random random_{42};
  GuardedBuffer input_, weight_, bias_, probabilities_, target_, class_weight_, token_weight_,
      grad_loss_;
};

struct Wanted {
  bool input = true, weight = true, bias = true;
};

/// Memory that one run writes.
struct Outputs {
  Outputs(const Problem& p, const Wanted& wanted)
      : loss(p.tokens * 8 + 8),
        lse(p.tokens * 8),
        statistics(4 * p.tokens * 8),
        argmax(p.tokens * 8),
        grad_input(wanted.input ? p.tokens * p.features * size_of(p.dtype) : 0),
        grad_weight(wanted.weight ? p.vocab * p.features * size_of(p.dtype) : 0),
        grad_bias(wanted.bias ? p.vocab * size_of(p.dtype) : 0) {}

  void connect(Problem* p, const Wanted& wanted) {
    p->loss = loss.as<void>();
    p->lse = lse.as<double>();
    p->statistics_out = p->statistics ? statistics.as<void>() : nullptr;
    p->argmax = p->statistics ? argmax.as<int64_t>() : nullptr;
    p->grad_input = wanted.input ? grad_input.as<void>() : nullptr;
    p->grad_weight = wanted.weight ? grad_weight.as<void>() : nullptr;
    p->grad_bias = wanted.bias && p->bias != nullptr ? grad_bias.as<void>() : nullptr;
  }

  bool intact() const {
    return loss.intact() && lse.intact() && statistics.intact() && argmax.intact() &&
           grad_input.intact() && grad_weight.intact() && grad_bias.intact();
  }

  bool operator==(const Outputs& o) const {
    return loss == o.loss && lse == o.lse && statistics == o.statistics && argmax == o.argmax &&
           grad_input == o.grad_input && grad_weight == o.grad_weight && grad_bias == o.grad_bias;
  }

  GuardedBuffer loss, lse, statistics, argmax, grad_input, grad_weight, grad_bias;
};

CpuPlanRequest request_of(const Problem& p, bool bf16_kernels, bool statistics_known) {
  CpuPlanRequest request;
  request.tokens = p.tokens, request.features = p.features, request.vocab = p.vocab;
  request.dtype = p.dtype;
  request.grad_input = p.grad_input != nullptr;
  request.grad_weight = p.grad_weight != nullptr;
  request.grad_bias = p.grad_bias != nullptr;
  request.statistics_known = statistics_known;
  complete_request(p, &request);
  CHECK(!bf16_kernels || request.bf16_kernels);
  request.bf16_kernels = bf16_kernels;
  request.threads = 1;
  return request;
}

void execute(const Problem& problem, CpuPlanRequest request, const Plan& plan, int threads) {
  set_max_threads(threads);
  request.threads = threads;
  std::vector<Area> areas;
  const int64_t bytes = layout_workspace(request, plan, &areas).total;
  const bool planned = plan.workspace_bytes > 0;  // by make_plan(), for one thread
  if (planned && threads == 1) CHECK_EQ(plan.workspace_bytes, bytes);
  GuardedBuffer workspace(bytes);
  const CpuContext context{&problem, &request, &plan, workspace.as<char>()};
  run(problem, plan, request.statistics_known, *make_cpu_backend(context));
  CHECK(workspace.intact());
  // Nothing is written between the parts of the workspace.
  int64_t end = 0;
  areas.push_back({bytes, bytes});
  for (const Area& area : united(areas)) {
    CHECK(std::all_of(workspace.as<uint8_t>() + end, workspace.as<uint8_t>() + area.begin,
                      [](uint8_t byte) { return byte == 0xff; }));
    end = area.end;
  }
}

struct NamedPlan {
  std::string name;
  Plan plan;
};

/// A plan with the smallest blocks there are, so that small problems have many of them.
Plan small_plan(PlanKind kind, int64_t stored_in_gradient, int64_t chunk_tokens,
                Accumulation accumulation) {
  Plan plan;
  plan.kind = kind;
  plan.accumulation = accumulation;
  plan.stored_in_gradient = stored_in_gradient;
  plan.chunk_tokens = chunk_tokens;
  plan.token_block = plan.score_block = plan.weight_block = kPanel;
  plan.input_block = plan.input_sweep_block = kPanel;
  plan.slice_vocab = plan.input_slice = plan.input_sweep_slice = kTileVocab;
  return plan;
}

/// What the planner chooses, without a budget and with little, and plans that it has for large problems.
std::vector<NamedPlan> plans_for(const CpuPlanRequest& request) {
  std::vector<NamedPlan> plans;
  const auto planned = [&](int64_t budget, int64_t chunk_size) {
    CpuPlanRequest asked = request;
    asked.memory_budget = budget;
    asked.chunk_size = chunk_size;
    Plan plan;
    if (make_plan(asked, &plan).empty()) {
      plans.push_back({test::describe("budget ", budget, " chunk ", chunk_size), plan});
    }
    return plan.workspace_bytes;
  };
  const int64_t most = planned(-1, 0);
  for (const int percent : {40, 80}) planned(most * percent / 100, 0);
  planned(-1, 20);

  const bool both = request.grad_input && request.grad_weight;
  const bool gradient = request.grad_input || request.grad_weight || request.grad_bias;
  const int64_t in_row = request.grad_weight && !request.statistics_known
                             ? tokens_in_gradient_row(request, score_bytes(request))
                             : 0;
  const int64_t stored = std::min<int64_t>({20, in_row, request.tokens});
  if (!gradient) {
    plans.push_back({"statistics", small_plan(PlanKind::kStatistics, 0, 0, Accumulation::kExact)});
    return plans;
  }
  const int64_t all = round_up(request.tokens, kPanel);
  Plan slices = small_plan(PlanKind::kVocabSlices, 0, 0, Accumulation::kExact);
  plans.push_back({"vocab slices", slices});
  if (both) {
    slices.separate_sweeps = true;
    plans.push_back({"separate sweeps", slices});
  }
  if (request.statistics_known) return plans;
  const auto chunks = [&](const char* name, int64_t in_gradient, int64_t size,
                          Accumulation accumulation) {
    Plan plan = small_plan(PlanKind::kTokenChunks, in_gradient, size, accumulation);
    plans.push_back({name, plan});
    plan.weight_block = round_up(std::max(in_gradient, size), kPanel);
    plans.push_back({test::describe(name, ", one product"), plan});
  };
  chunks("one chunk", 0, all, Accumulation::kExact);
  if (has_float32_sums(request.dtype))
    chunks("fp32 sums of chunks", stored, kPanel, Accumulation::kFloat32);
  if (request.dtype == DType::kBFloat16) {
    chunks("compact sums of chunks", stored, kPanel, Accumulation::kCompact);
  }
  slices = small_plan(PlanKind::kVocabSlices, stored, 0, Accumulation::kExact);
  plans.push_back({"vocab slices, some stored in the gradient", slices});
  slices.stored_chunks = 1;
  slices.chunk_tokens = kPanel;
  plans.push_back({"vocab slices, a stored chunk", slices});
  return plans;
}

void check_array(const char* name, DType dtype, const GuardedBuffer& actual, int64_t offset,
                 const std::vector<double>& expected, double relative) {
  double largest = 1e-2;  // differences of numbers of this size may well cancel
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  const std::string outer = test::context();
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = load(dtype, actual.as<void>(), offset + static_cast<int64_t>(i));
    if (test::near(value, expected[i], relative * largest)) continue;
    test::context() = test::describe(outer, " ", name, "[", i, "]");
    CHECK_NEAR(value, expected[i], relative * largest);
    break;  // one element says enough
  }
  test::context() = outer;
}

void check_statistics(const Problem& p, const Outputs& out, const test::Reference& expected,
                      double relative) {
  const DType dtype = accumulation_dtype(p.dtype);
  const bool per_token = p.reduction == Reduction::kNone;
  check_array("loss", dtype, out.loss, 0,
              per_token ? expected.token_loss : std::vector<double>{expected.loss}, relative);
  check_array("lse", DType::kFloat64, out.lse, 0, expected.lse, relative);
  if (!p.statistics) return;
  check_array("statistics: loss", dtype, out.statistics, 0, expected.token_loss, relative);
  check_array("target logit", dtype, out.statistics, p.tokens, expected.target_logit, relative);
  check_array("entropy", dtype, out.statistics, 2 * p.tokens, expected.entropy, relative);
  check_array("max logit", dtype, out.statistics, 3 * p.tokens, expected.maximum, relative);
  for (size_t n = 0; n < expected.argmax.size(); ++n) {
    CHECK_EQ(out.argmax.as<int64_t>()[n], expected.argmax[n]);
  }
}

void check_gradients(const Problem& p, const Outputs& out, const test::Reference& expected,
                     double relative) {
  // A token's gradient is small where its softmax is certain: relative to that of all tokens.
  if (p.grad_input != nullptr)
    check_array("grad_input", p.dtype, out.grad_input, 0, expected.grad_input, relative);
  if (p.grad_weight != nullptr) {
    check_array("grad_weight", p.dtype, out.grad_weight, 0, expected.grad_weight, relative);
  }
  if (p.grad_bias != nullptr)
    check_array("grad_bias", p.dtype, out.grad_bias, 0, expected.grad_bias, relative);
}

/// Runs a problem by every plan: against the reference, and again with more threads.
void run_plans(const Problem& problem, const test::Reference& expected, const Wanted& wanted,
               bool bf16_kernels, bool statistics_known, bool vary_threads) {
  const std::string outer = test::context();
  Outputs first(problem, wanted);
  Problem p = problem;
  first.connect(&p, wanted);
  const CpuPlanRequest request = request_of(p, bf16_kernels, statistics_known);
  for (const NamedPlan& named : plans_for(request)) {
    for (int threads = 1; threads <= (vary_threads ? 4 : 1); ++threads) {
      test::context() = test::describe(outer, ", plan: ", named.name, ", ", threads, " threads");
      Outputs out(problem, wanted);
      out.connect(&p, wanted);
      if (statistics_known) {
        std::copy(expected.lse.begin(), expected.lse.end(), out.lse.as<double>());
      }
      execute(p, request, named.plan, threads);
      CHECK(out.intact());
      if (threads > 1) {
        CHECK(out == first);
        continue;
      }
      const Tolerance tolerance = tolerance_of(p.dtype, bf16_kernels);
      if (!statistics_known) check_statistics(p, out, expected, tolerance.statistics);
      check_gradients(p, out, expected, tolerance.gradient);
      first = out;
    }
  }
  test::context() = outer;
}

void test_case(const Shape& shape, DType dtype, bool bf16_kernels, const Options& options,
               bool vary_threads) {
  Case fixture(shape, dtype, options);
  CpuPlanRequest machine;
  complete_request(fixture.problem, &machine);
  if (bf16_kernels && !machine.bf16_kernels) return;
  const char* const names[] = {"bf16", "fp16", "fp32", "fp64"};
  const std::string name = test::describe(
      names[static_cast<int>(dtype)], bf16_kernels ? " kernels" : "", ", N=", shape.tokens,
      " D=", shape.features, " V=", shape.vocab, ", ", options.name);
  std::vector<Wanted> parts = {{true, true, true}};
  if (options.partial_gradients) {
    parts.insert(
        parts.end(),
        {{true, false, false}, {false, true, false}, {false, false, true}, {true, false, true}});
  }
  Problem& p = fixture.problem;
  const auto test_all = [&](const char* what, const std::vector<Wanted>& wanted_list,
                            bool statistics_known) {
    const test::Reference expected = test::ReferenceRun(p).run();
    for (const Wanted& wanted : wanted_list) {
      test::context() =
          test::describe(name, ", ", what, " ", wanted.input, wanted.weight, wanted.bias);
      run_plans(p, expected, wanted, bf16_kernels, statistics_known, vary_threads);
    }
  };
  // fp16 leaves its gradients to the backward op.
  if (dtype != DType::kFloat16) test_all("forward", parts, false);
  test_all("forward without gradients", {{false, false, false}}, false);
  p.reduction = Reduction::kNone;
  test_all("losses of tokens", {{false, false, false}}, false);
  p.statistics = false;
  p.grad_loss = fixture.grad_loss();
  test_all("backward of tokens", parts, true);
  p.reduction = options.reduction;
  test_all("backward", {{true, true, true}}, true);
  CHECK(fixture.intact());
}

}  // namespace

int main() {
  const Shape usual = {70, 17, 270};
  const Shape others[] = {{1, 1, 1}, {45, 7, 230}, {75, 130, 460}};
  const std::vector<Options> options = all_options();
  std::vector<const char*> bf16_kernels = {"bf16_portable"};
  if (cpu_features().avx512_bf16) {
    bf16_kernels.push_back("avx512_bf16");
  } else {
    std::cout << "portable bf16 kernels only: this processor has no AVX512-BF16" << std::endl;
  }
  const auto test_all = [&](const Shape& shape, const std::vector<DType>& blas_dtypes,
                            const Options& some, bool vary_threads) {
    for (const DType dtype : blas_dtypes) test_case(shape, dtype, false, some, vary_threads);
    for (const char* kernels : bf16_kernels) {
      setenv("MEMEFF_CPU_KERNELS", kernels, 1);
      test_case(shape, DType::kBFloat16, true, some, vary_threads);
    }
    unsetenv("MEMEFF_CPU_KERNELS");
  };
  for (size_t i = 0; i < options.size(); ++i) {
    const bool vary_threads = i % 6 == 4;  // smoothing, everything
    for (const Shape& shape : {usual, others[i % 3]}) {
      test_all(shape, {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16},
               options[i], vary_threads);
    }
  }
  // Several blocks of features: of a task, of the inner dimension, of compact sums. And few classes, each
  // of which has a large part of the label smoothing.
  const Options& smoothing = options[4];
  test_all({70, 1100, 460}, {DType::kBFloat16}, smoothing, false);
  test_all({40, 33, 3}, {DType::kFloat32}, smoothing, false);
  return test::result();
}
