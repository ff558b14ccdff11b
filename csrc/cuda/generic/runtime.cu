// The CUDA runtime as host code sees it (cuda/runtime.h).
#include "cuda/runtime.h"

#include <cstring>

#include "cuda/common/device.cuh"

namespace memeff::cuda {

#if defined(__CUDACC__)

Gpu current_gpu() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return {};
  return {major * 10 + minor};
}

Status fill_zeros(void* data, int64_t bytes, void* stream) {
  cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return launch_status();
}

#else

Gpu current_gpu() { return {90}; }

Status fill_zeros(void* data, int64_t bytes, void*) {
  std::memset(data, 0, static_cast<size_t>(bytes));
  return {};
}

#endif

}  // namespace memeff::cuda
