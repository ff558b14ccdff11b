// CUDA GPUs as a device of the operators, and their registration for CUDA tensors. Without CUDA
// headers: torch's own interface to devices and streams is enough, and is there in its CPU build too.
#include "bindings/cuda_device.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "bindings/call.h"
#include "bindings/ops.h"
#include "cuda/generic_kernels.h"

namespace memeff {
namespace {

class CudaDevice : public CudaLikeDevice {
 public:
  static const Device& get() {
    static const CudaDevice device;
    return device;
  }

  bool values_are_at_hand() const override { return false; }

  std::string run(const Problem& problem, const PlanRequest& request,
                  const at::Tensor& like) const override {
    return run_on_stream(problem, request, like, stream_of(like));
  }

  void scale(const at::Tensor& from, const at::Tensor& scale, const at::Tensor& to) const override {
    const at::Tensor factor = scale.to(at::kDouble);
    const Status status = cuda::scale_gradient(from.const_data_ptr(), to.mutable_data_ptr(),
                                               dtype_of(from, "gradient"), from.numel(),
                                               factor.const_data_ptr<double>(), stream_of(from));
    TORCH_CHECK(status.ok(), status.message);
  }

 private:
  static void* stream_of(const at::Tensor& tensor) {
    return c10::impl::VirtualGuardImpl(at::kCUDA).getStream(tensor.device()).native_handle();
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(memeff, CUDA, m) { implement_operators<CudaDevice>(m); }

}  // namespace memeff
