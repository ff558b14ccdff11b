// A GPU as a device of the operators: real (cuda_device.cpp) or emulated (tests/kernels/torch_backend).
#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <functional>
#include <string>

#include "bindings/device.h"
#include "cuda/cuda_backend.h"
#include "cuda/gemm.h"
#include "cuda/plan.h"
#include "cuda/runtime.h"
#include "cuda/select.h"
#include "driver/driver.h"

namespace memeff {

/// What both have in common: selection, plan, workspace from torch's allocator, the driver.
class CudaLikeDevice : public Device {
 public:
  std::string plan(const Problem& problem, const PlanRequest& request, Plan* plan) const override {
    cuda::CallPlan call;
    const std::string objection = cuda::plan_call(problem, request, cuda::current_gpu(), &call);
    *plan = call.plan;
    return objection;
  }

  DeviceFacts facts(const Problem& problem) const override {
    return {0, cuda::describe_choice(problem, cuda::current_gpu(), cuda::forced_kernels())};
  }

 protected:
  std::string run_on_stream(const Problem& problem, const PlanRequest& request,
                            const at::Tensor& like, void* stream) const {
    cuda::CallPlan call;
    std::string objection = cuda::plan_call(problem, request, cuda::current_gpu(), &call);
    if (!objection.empty()) return objection;
    try {
      run_with_plan(problem, request, call, like, stream);
    } catch (c10::Error& error) {  // of torch's products, or of its allocator
      error.add_context("memeff: with " + cuda::in_words(call.traits.kernels) +
                        " and a workspace of " + std::to_string(call.plan.workspace_bytes) +
                        " bytes, which memory_budget bounds");
      throw;
    }
    return objection;
  }

  /// The workspace is of the current stream, as all that works in it: the allocator may give it to the
  /// stream's next call before this one has run. No other stream gets to see it but that of a process
  /// group, for which the stream waits before the run ends, whether or not with an exception (driver.cpp).
  void run_with_plan(const Problem& problem, const PlanRequest& request, const cuda::CallPlan& call,
                     const at::Tensor& like, void* stream) const {
    const at::Tensor workspace =
        at::empty({call.plan.workspace_bytes}, like.options().dtype(at::kByte));
    const cuda::CudaContext context{&problem, &call,
                                    static_cast<char*>(workspace.mutable_data_ptr()), stream};
    use_workspace(workspace, call, [&] {
      memeff::run(problem, call.plan, request.statistics_known, *cuda::make_cuda_backend(context));
    });
  }

  /// Calls `run`, which works in the workspace. For devices that want to know of their memory.
  virtual void use_workspace(const at::Tensor&, const cuda::CallPlan&,
                             const std::function<void()>& run) const {
    run();
  }
};

}  // namespace memeff
