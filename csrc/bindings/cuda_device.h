// A GPU as a device of the operators: real (cuda_device.cpp) or emulated (tests/kernels/torch_backend).
#pragma once

#include <ATen/ops/empty.h>

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
    const at::Tensor workspace =
        at::empty({call.plan.workspace_bytes}, like.options().dtype(at::kByte));
    const cuda::CudaContext context{&problem, &call,
                                    static_cast<char*>(workspace.mutable_data_ptr()), stream};
    use_workspace(workspace, call, [&] {
      memeff::run(problem, call.plan, request.statistics_known, *cuda::make_cuda_backend(context));
    });
    return objection;
  }

  /// Calls `run`, which works in the workspace. For devices that want to know of their memory.
  virtual void use_workspace(const at::Tensor&, const cuda::CallPlan&,
                             const std::function<void()>& run) const {
    run();
  }
};

}  // namespace memeff
