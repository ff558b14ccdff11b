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
  std::string make_plan(const Problem& problem, PlanRequest* request, Plan* plan) const override {
    std::string error;
    cuda::Selection kernels = select(problem, &error);
    if (!error.empty()) return error;
    request->gpu_upcasts = cuda::upcasts(problem.dtype, cuda::current_gpu());
    request->multiprocessors = cuda::multiprocessors_of(cuda::current_gpu());
    return cuda::choose_plan(problem, *request, &kernels, plan);
  }

 protected:
  void run_on_stream(const Problem& problem, const PlanRequest& request, const Plan& plan,
                     const at::Tensor& like, void* stream) const {
    const at::Tensor workspace = at::empty({plan.workspace_bytes}, like.options().dtype(at::kByte));
    std::string error;
    const cuda::CudaContext context{&problem,
                                    &request,
                                    &plan,
                                    cuda::kernels_of_plan(select(problem, &error), plan),
                                    static_cast<char*>(workspace.mutable_data_ptr()),
                                    stream};
    use_workspace(workspace, [&] {
      memeff::run(problem, plan, request.statistics_known, *cuda::make_cuda_backend(context));
    });
  }

  /// Calls `run`, which works in the workspace. For devices that want to know of their memory.
  virtual void use_workspace(const at::Tensor&, const std::function<void()>& run) const { run(); }

 private:
  static cuda::Selection select(const Problem& problem, std::string* error) {
    return cuda::select_kernels(problem, cuda::current_gpu(), cuda::forced_kernels(),
                                cuda::measured_choices(), error);
  }
};

}  // namespace memeff
