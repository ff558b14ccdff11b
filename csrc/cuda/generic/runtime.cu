// The CUDA runtime as host code sees it (cuda/runtime.h).
#include "cuda/runtime.h"

#include <cstring>
#include <map>
#include <mutex>

#include "cuda/common/device.cuh"

namespace memeff::cuda {

#if defined(__CUDACC__)

const Gpu& current_gpu() {
  // Asked for in every call; the runtime takes its time over the properties.
  static std::mutex mutex;
  static std::map<int, Gpu> known;  // by device
  static const Gpu none;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return none;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return none;
  return known[device] = {properties.major * 10 + properties.minor, properties.name,
                          properties.multiProcessorCount};
}

Status fill_zeros(void* data, int64_t bytes, void* stream) {
  cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return launch_status();
}

#else

const Gpu& current_gpu() {
  static const Gpu emulated{90, "emulated"};
  return emulated;
}

Status fill_zeros(void* data, int64_t bytes, void* stream) {
  emulator::check_stream(stream, "a memset");
  std::memset(data, 0, static_cast<size_t>(bytes));
  return {};
}

#endif

}  // namespace memeff::cuda
