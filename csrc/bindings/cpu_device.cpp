// The CPU as a device of the operators, and their registration for CPU tensors.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <string>

#include "bindings/call.h"
#include "bindings/device.h"
#include "bindings/ops.h"
#include "cpu/cpu_backend.h"
#include "cpu/number.h"
#include "driver/driver.h"

namespace memeff {
namespace {

/// Workspace of one call, straight from the system and back to it. Through malloc it would come from the
/// heap once a call or two have raised glibc's threshold, and the heap, cut up by other allocations, would
/// keep more than memory_budget. That does not matter for small ones, and the system's pages would take
/// longer than such a call.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    if (is_small()) {
      data_ = ::operator new(bytes_, kAlignment);
      return;
    }
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(data_ != MAP_FAILED, "no memory for a workspace of ", bytes, " bytes");
  }
  ~Workspace() {
    if (is_small())
      ::operator delete(data_, kAlignment);
    else
      munmap(data_, bytes_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  bool is_small() const { return bytes_ <= size_t{128} << 10; }
  const size_t bytes_;
  void* data_ = nullptr;
};

void scale_elements(const at::Tensor& from, double scale, const at::Tensor& to) {
  dispatch(dtype_of(from, "gradient"), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* source = static_cast<const T*>(from.const_data_ptr());
    T* target = static_cast<T*>(to.mutable_data_ptr());
    const auto factor = static_cast<Arithmetic>(scale);
    at::parallel_for(0, from.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        store(target + i, static_cast<Arithmetic>(to_arithmetic(source[i]) * factor));
      }
    });
  });
}

class CpuDevice : public Device {
 public:
  static const Device& get() {
    static const CpuDevice device;
    return device;
  }

  bool values_are_at_hand() const override { return true; }

  std::string plan(const Problem& problem, const PlanRequest& request, Plan* plan) const override {
    CpuCallPlan call;
    const std::string objection = plan_call(problem, request, &call);
    *plan = call.plan;
    return objection;
  }

  std::string run(const Problem& problem, const PlanRequest& request,
                  const at::Tensor&) const override {
    CpuCallPlan call;
    std::string objection = plan_call(problem, request, &call);
    if (!objection.empty()) return objection;
    const Workspace workspace(call.plan.workspace_bytes);
    const CpuContext context{&problem, &call.request, &call.plan, workspace.data()};
    memeff::run(problem, call.plan, request.statistics_known, *make_cpu_backend(context));
    return objection;
  }

  DeviceFacts facts(const Problem& problem) const override {
    CpuPlanRequest request;
    const std::string objection = complete_request(problem, &request);
    TORCH_CHECK_VALUE(objection.empty(), objection);
    return {request.threads, kernels_of(request)};
  }

  void scale(const at::Tensor& from, const at::Tensor& scale, const at::Tensor& to) const override {
    const double factor = scale.item().toDouble();
    if (factor != 1.0 || !from.is_same(to)) scale_elements(from, factor, to);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(memeff, CPU, m) { implement_operators<CpuDevice>(m); }

}  // namespace memeff
