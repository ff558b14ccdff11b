// The Python module memeff._C: what the build is and what the planner would do. Loading it
// registers the operators (schema.cpp, *_device.cpp), which is how tensors reach the kernels.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/vocab_parallel.h"
#include "core/plan.h"
#include "core/planning.h"
#include "core/problem.h"
#include "cpu/cpu_backend.h"
#include "cpu/features.h"
#include "cuda/plan.h"
#include "cuda/select.h"
#include "driver/collectives.h"

namespace py = pybind11;

namespace memeff {
namespace {

// memeff/_library.py looks for this text in the file when the file does not load; "used" keeps it
// whole there, though the code needs its end only.
[[gnu::used]] constexpr char kTorchStamp[] = "memeff was built with torch=" MEMEFF_TORCH_VERSION;
constexpr size_t kTorchStampPrefix = sizeof("memeff was built with torch=") - 1;

/// The GPUs of the table of measured choices, "NVIDIA H100 80GB HBM3, NVIDIA H200", or None.
py::object measured_gpus() {
  py::list names;
  for (const cuda::MeasuredChoice& row : cuda::committed_choices())
    if (!names.contains(row.gpu)) names.append(row.gpu);
  if (names.empty()) return py::none();
  return py::str(", ").attr("join")(names);
}

py::dict build_info() {
  py::dict info;
  info["torch"] = kTorchStamp + kTorchStampPrefix;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["flags"] = MEMEFF_CXX_FLAGS;
  info["cpu_capability"] = cpu_capability();
#ifdef MEMEFF_WITH_CUDA
  info["cuda"] = MEMEFF_WITH_CUDA;  // the toolkit's version
  info["cuda_archs"] = MEMEFF_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  info["cuda_measured"] = measured_gpus();
  return info;
}

DType parse_dtype(const std::string& name) {
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  throw py::value_error("dtype='" + name +
                        "': expected 'bfloat16', 'float16', 'float32' or 'float64'");
}

const char* name_of(PlanKind kind) {
  switch (kind) {
    case PlanKind::kStatistics: return "statistics";
    case PlanKind::kTokenChunks: return "token_chunks";
    case PlanKind::kVocabSlices: return "vocab_slices";
  }
  return "";
}

const char* name_of(Accumulation accumulation) {
  switch (accumulation) {
    case Accumulation::kExact: return "exact";
    case Accumulation::kFloat32: return "float32";
    case Accumulation::kCompact: return "compact";
  }
  return "";
}

/// A row of what memeff-tune has found: GPU, capability, dtype, tokens, features, classes, whether tiles
/// are skipped, kernels.
using TunedRow =
    std::tuple<std::string, int, std::string, int64_t, int64_t, int64_t, bool, std::string>;

void add_tuned(const std::vector<TunedRow>& rows,
               const std::vector<std::pair<std::string, std::string>>& banned) {
  cuda::MeasuredChoices choices{{}, banned};
  for (const auto& [gpu, capability, dtype, tokens, features, vocab, skips, kernels] : rows) {
    choices.rows.push_back({gpu, capability, parse_dtype(dtype), tokens, features, vocab, skips,
                            kernels, /*here=*/true});
  }
  cuda::add_tuned(choices);
}

/// Plans a call, as the operators of a backend do.
using Planner = std::function<std::string(const Problem&, const PlanRequest&, Plan*)>;

/// The plan of a whole call, forward and backward. Where backward is an operator of its own
/// (per-token losses, float16), shape and chunks are its plan's, bytes those of the larger and FLOPs the
/// sum of the two; token statistics are forward's alone.
Plan plan_call(const Planner& planner, Problem problem, PlanRequest request) {
  if (!wants_gradient(request) || gradient_in_forward(problem.reduction, request.dtype)) {
    Plan plan;
    const std::string objection = planner(problem, request, &plan);
    if (!objection.empty()) throw py::value_error(objection);
    return plan;
  }

  Objections objections;
  Plan forward, plan;
  PlanRequest forward_request = request;
  forward_request.grad_input = forward_request.grad_weight = forward_request.grad_bias = false;
  objections.add(planner(problem, forward_request, &forward), forward);
  request.statistics_known = true;
  problem.statistics = false;
  objections.add(planner(problem, request, &plan), plan);
  if (!objections.worst().empty()) throw py::value_error(objections.worst());
  const int64_t forward_bytes = forward.workspace_bytes + forward.library_bytes;
  if (forward_bytes > plan.workspace_bytes + plan.library_bytes) {
    plan.workspace_bytes = forward.workspace_bytes;
    plan.library_bytes = forward.library_bytes;
  }
  plan.flops += forward.flops;
  plan.floor_flops += forward.floor_flops;
  plan.predicted_flops += forward.predicted_flops;
  return plan;
}

/// An option of a call, as memeff/_options.py has it.
c10::IValue to_ivalue(const py::handle& value) {
  if (value.is_none()) return {};
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>();
  if (py::isinstance<py::int_>(value)) return value.cast<int64_t>();
  if (py::isinstance<py::float_>(value)) return value.cast<double>();
  if (py::isinstance<py::str>(value)) return value.cast<std::string>();
  // A torch.dtype, of which the operators take two.
  return py::str(value).cast<std::string>() == "torch.float64" ? at::kDouble : at::kFloat;
}

py::dict plan(int64_t tokens, int64_t features, int64_t vocab, const std::string& dtype,
              const std::string& backend, bool probabilities, int64_t ranks, int capability,
              const std::string& gpu, int multiprocessors, const py::dict& options) {
  Arguments arguments;
  for (const auto& [name, value] : options) {
    set_argument(&arguments, name.cast<std::string>(), to_ivalue(value));
  }
  // No data: only what decides about kernels and partial sums.
  Problem problem;
  static_cast<ProblemOptions&>(problem) = arguments;
  problem.tokens = tokens;
  problem.features = problem.input_stride = problem.weight_stride = features;
  problem.vocab = vocab;
  problem.dtype = parse_dtype(dtype);
  if (probabilities) problem.probabilities = &problem;  // any address
  VocabShard shard;
  shard.ranks = ranks;
  if (ranks > 0) problem.shard = &shard;

  PlanRequest request = plan_request(problem, arguments);
  request.ranks = ranks;

  int64_t shared_numbers = 0;  // of a token, in all operators of the call
  Collectives collectives;
  const auto count = [&](const Problem& planned, const PlanRequest& asked, const Plan& plan,
                         int64_t numbers) {
    if (ranks == 0) return;
    shared_numbers += numbers;
    const Collectives more = count_collectives(planned, asked, plan, numbers);
    collectives.all_gathers += more.all_gathers;
    collectives.all_reduces += more.all_reduces;
  };
  Planner planner;
  if (backend == "cpu") {
    planner = [&](const Problem& planned, const PlanRequest& asked, Plan* plan) {
      CpuCallPlan call;
      std::string objection = plan_call(planned, asked, &call);
      *plan = call.plan;
      if (objection.empty()) count(planned, asked, *plan, call.request.shared_numbers);
      return objection;
    };
  } else if (backend == "cuda") {
    planner = [&count, gpu = cuda::Gpu{capability, gpu, multiprocessors}](
                  const Problem& planned, const PlanRequest& asked, Plan* plan) {
      cuda::CallPlan call;
      std::string objection = cuda::plan_call(planned, asked, gpu, &call);
      *plan = call.plan;
      if (objection.empty()) count(planned, asked, *plan, call.traits.shared_numbers);
      return objection;
    };
  } else {
    throw py::value_error("backend='" + backend + "': expected 'cpu' or 'cuda'");
  }

  const Plan chosen = plan_call(planner, problem, request);
  py::dict result;
  result["kind"] = name_of(chosen.kind);
  result["kernels"] = chosen.kernels;
  result["kernels_reason"] = chosen.kernels_reason;
  result["tokens_per_chunk"] = chosen.chunk_tokens > 0 ? chosen.chunk_tokens : chosen.token_block;
  result["num_chunks"] = chosen.num_chunks;
  result["vocab_per_slice"] = chosen.slice_vocab;
  result["num_slices"] = chosen.num_slices;
  result["stored_in_gradient"] = chosen.stored_in_gradient;
  result["stored_in_workspace"] =
      chosen.kind == PlanKind::kVocabSlices ? chosen.stored_chunks * chosen.chunk_tokens : 0;
  result["accumulation"] = name_of(chosen.accumulation);
  result["input_accumulation"] = chosen.compact_input_sums ? "compact" : "float32";
  result["workspace_bytes"] = chosen.workspace_bytes;
  result["library_bytes"] = chosen.library_bytes;
  result["floor_bytes"] = chosen.floor_bytes;
  result["flops"] = chosen.flops;
  result["floor_flops"] = chosen.floor_flops;
  result["predicted_flops"] = chosen.predicted_flops;
  result["all_gathers"] = collectives.all_gathers;
  result["all_reduces"] = collectives.all_reduces;
  result["gathered_bytes"] = tokens * shared_numbers * static_cast<int64_t>(sizeof(double));
  return result;
}

}  // namespace
}  // namespace memeff

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Build information and planner of memeff; loading it registers its operators.";
  module.def("add_tuned", &memeff::add_tuned,
             "Makes known what memeff-tune has found on this machine.", py::arg("rows"),
             py::arg("banned"));
  module.def(
      "agree",
      [](const std::string& group, const std::string& facts, int64_t classes, int64_t budget) {
        return memeff::RankCall(group).agree(facts, classes, budget);
      },
      "Compares what ranks that share a vocabulary are about to compute. Returns the most "
      "classes of a rank and the smallest budget.",
      py::arg("group"), py::arg("facts"), py::arg("classes"), py::arg("memory_budget"),
      py::call_guard<py::gil_scoped_release>());
  module.def("build_info", &memeff::build_info,
             "What the extension was compiled with, and what it uses on this processor.");
  module.def(
      "report_failure",
      [](const std::string& group, const std::string& message) {
        memeff::RankCall(group).report_failure(message);
      },
      "In place of a call on a vocabulary that ranks share, by a rank that has found an error.",
      py::arg("group"), py::arg("message"), py::call_guard<py::gil_scoped_release>());
  module.def("plan", &memeff::plan,
             "The plan of a call, see memeff.plan. Raises ValueError when no plan fits the budget.",
             py::arg("tokens"), py::arg("features"), py::arg("vocab"), py::arg("dtype"),
             py::arg("backend"), py::arg("probabilities"), py::arg("ranks"), py::arg("capability"),
             py::arg("gpu"), py::arg("multiprocessors"), py::arg("options"));
}
