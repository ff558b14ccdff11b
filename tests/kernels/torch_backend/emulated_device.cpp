// The GPU of the emulator as a device of the operators: the library memeff_emulated has the operators
// of memeff, takes CPU tensors, and runs the real CUDA kernels on them. Every tensor is registered with
// the emulator at its exact size, every part of the workspace, too; results and workspace start as NaN.
// Work on another stream than the call's is reported.
//
// Python module _memeff_emulated: configure(), refuse_launch(), take_reports(), counters().
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <cstring>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "bindings/autograd.h"
#include "bindings/call.h"
#include "bindings/cuda_device.h"
#include "bindings/ops.h"
#include "bindings/schema.h"
#include "cuda/generic_kernels.h"
#include "cuda/layout.h"
#include "emulator/emulator.h"

namespace memeff {
namespace {

using emulator::BufferAccess;
using emulator::GlobalBuffer;

constexpr int kPoison = 0xff;  // NaN in every floating type

/// What stands for the current stream.
void* current_stream() {
  static char stream;
  emulator::config().stream = &stream;
  return &stream;
}

/// The device buffers of one call.
class Buffers {
 public:
  void input(const void* data, int64_t bytes, const char* name, int granule) {
    if (data != nullptr && bytes > 0)
      registered_.emplace_back(data, static_cast<size_t>(bytes), name, BufferAccess::kReadOnly,
                               granule);
  }
  void output(void* data, int64_t bytes, const char* name, int granule, bool poisoned = true) {
    if (data == nullptr || bytes <= 0) return;
    if (poisoned) std::memset(data, kPoison, static_cast<size_t>(bytes));
    registered_.emplace_back(data, static_cast<size_t>(bytes), name, BufferAccess::kReadWrite,
                             granule);
  }

 private:
  std::list<GlobalBuffer> registered_;
};

class EmulatedDevice : public CudaLikeDevice {
 public:
  static const Device& get() {
    static const EmulatedDevice device;
    return device;
  }

  bool values_are_at_hand() const override { return false; }

  std::string run(const Problem& p, const PlanRequest& request,
                  const at::Tensor& like) const override {
    const int size = static_cast<int>(size_of(p.dtype));
    const int sum_size = static_cast<int>(size_of(accumulation_dtype(p.dtype)));
    const bool per_token = p.reduction == Reduction::kNone;
    const auto rows = [&](int64_t count, int64_t stride) {
      return count == 0 ? 0 : ((count - 1) * stride + p.features) * size;
    };
    Buffers buffers;
    buffers.input(p.input, rows(p.tokens, p.input_stride), "input", size);
    buffers.input(p.weight, rows(p.vocab, p.weight_stride), "linear_weight", size);
    buffers.input(p.bias, p.vocab * size, "linear_bias", size);
    buffers.input(p.target, p.tokens * 8, "target", 8);
    const int q_size = static_cast<int>(size_of(p.probabilities_dtype));
    if (p.tokens > 0 && p.vocab > 0)
      buffers.input(p.probabilities,
                    ((p.tokens - 1) * p.probabilities_token_stride +
                     (p.vocab - 1) * p.probabilities_class_stride + 1) *
                        q_size,
                    "target", q_size);
    buffers.input(p.class_weight, p.vocab * 8, "weight", 8);
    buffers.input(p.token_weight, p.tokens * 8, "token_weight", 8);
    buffers.input(p.num_items, 8, "num_items", 8);
    buffers.input(p.grad_loss, (per_token ? p.tokens : 1) * 8, "grad_loss", 8);
    if (request.statistics_known) {
      buffers.input(p.lse, p.tokens * 8, "lse", 8);
    } else {
      buffers.output(p.lse, p.tokens * 8, "lse", 8);
      buffers.output(p.loss, (per_token ? p.tokens : 1) * sum_size, "loss", sum_size);
    }
    if (p.token_statistics != nullptr) {
      const TokenStatistics& s = *p.token_statistics;
      buffers.input(s.inverse_temperature, p.tokens * 8, "inverse_temperature", 8);
      buffers.output(s.logprob, p.tokens * sum_size, "logprob", sum_size);
      buffers.output(s.entropy, p.tokens * 8, "entropy", 8);
      buffers.output(s.logit_sum, p.tokens * sum_size, "logit_sum", sum_size);
      if (s.known_entropy != s.entropy) buffers.input(s.known_entropy, p.tokens * 8, "entropy", 8);
      buffers.output(s.max_logit, p.tokens * sum_size, "max_logit", sum_size);
      buffers.output(s.argmax, p.tokens * 8, "argmax", 8);
      buffers.input(s.grad_logprob, p.tokens * 8, "grad_logprob", 8);
      buffers.input(s.grad_lse, p.tokens * 8, "grad_lse", 8);
      buffers.input(s.grad_entropy, p.tokens * 8, "grad_entropy", 8);
      buffers.input(s.grad_logit_sum, p.tokens * 8, "grad_logit_sum", 8);
    }
    buffers.output(p.statistics_out, 4 * p.tokens * sum_size, "statistics", sum_size);
    buffers.output(p.argmax, p.tokens * 8, "argmax", 8);
    buffers.output(p.grad_input, p.tokens * p.features * size, "grad_input", size);
    buffers.output(p.grad_weight, p.vocab * p.features * size, "grad_weight", 2, p.tokens > 0);
    buffers.output(p.grad_bias, p.vocab * size, "grad_bias", size);
    return run_on_stream(p, request, like, current_stream());
  }

  void scale(const at::Tensor& from, const at::Tensor& scale, const at::Tensor& to) const override {
    const at::Tensor factor = scale.to(at::kDouble);
    const int size = static_cast<int>(from.element_size());
    Buffers buffers;
    buffers.input(factor.const_data_ptr(), 8, "scale", 8);
    if (!from.is_same(to))
      buffers.input(from.const_data_ptr(), static_cast<int64_t>(from.nbytes()), "gradient", size);
    buffers.output(to.mutable_data_ptr(), static_cast<int64_t>(to.nbytes()), "scaled gradient",
                   size, !from.is_same(to));
    const Status status = cuda::scale_gradient(from.const_data_ptr(), to.mutable_data_ptr(),
                                               dtype_of(from, "gradient"), from.numel(),
                                               factor.const_data_ptr<double>(), current_stream());
    TORCH_CHECK(status.ok(), status.message);
  }

 protected:
  /// The parts of the workspace are buffers of their own: nothing lies between them.
  void use_workspace(const at::Tensor& workspace, const cuda::CallPlan& call,
                     const std::function<void()>& run) const override {
    auto* const data = static_cast<char*>(workspace.mutable_data_ptr());
    std::memset(data, kPoison, workspace.nbytes());
    std::vector<Area> areas;
    cuda::layout(call.request, call.traits, call.plan, &areas);
    Buffers buffers;
    for (const Area& area : united(areas)) {
      const std::string name = "workspace from byte " + std::to_string(area.begin);
      buffers.output(data + area.begin, area.end - area.begin, name.c_str(), 1);  // marks are bytes
    }
    run();
  }
};

void configure(bool late_delivery, const std::string& schedule, uint64_t seed) {
  emulator::Config& config = emulator::config();
  config.late_delivery = late_delivery;
  config.schedule = schedule == "in_order"   ? emulator::Schedule::kInOrder
                    : schedule == "reversed" ? emulator::Schedule::kReversed
                                             : emulator::Schedule::kRandom;
  config.seed = seed;
  config.printed_reports = 0;
}

void refuse_launch(int launches_before) {
  emulator::config().launches_before_refusal = launches_before;
}

std::vector<std::string> take_reports() {
  std::vector<std::string> texts;
  for (const emulator::Report& report : emulator::reports())
    texts.push_back(std::string(emulator::name_of(report.defect)) + ": " + report.message + " at " +
                    report.file + ":" + std::to_string(report.line));
  emulator::clear_reports();
  return texts;
}

std::map<std::string, uint64_t> counters() {
  const emulator::Counters& c = emulator::counters();
  return {{"launches", c.launches},
          {"ldmatrix", c.ldmatrix},
          {"mma", c.mma},
          {"wgmma", c.wgmma},
          {"tma", c.tma}};
}

}  // namespace

TORCH_LIBRARY(memeff_emulated, m) { define_operators(m); }
TORCH_LIBRARY_IMPL(memeff_emulated, Autograd, m) { implement_autograd(m); }
TORCH_LIBRARY_IMPL(memeff_emulated, CPU, m) { implement_operators<EmulatedDevice>(m); }

}  // namespace memeff

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The CUDA kernels of memeff in the emulator, as operators for CPU tensors.";
  module.def("configure", &memeff::configure,
             "schedule: 'in_order', 'reversed' or 'random' (by seed); when copies arrive.",
             pybind11::arg("late_delivery"), pybind11::arg("schedule"), pybind11::arg("seed"));
  module.def("refuse_launch", &memeff::refuse_launch,
             "The launch after so many is not accepted; negative: all are.",
             pybind11::arg("launches_before"));
  module.def("take_reports", &memeff::take_reports, "What the emulator has reported since last.");
  module.def("counters", &memeff::counters, "Instructions executed so far, by name.");
}
