// Runs one conformance case: on the GPU in nvcc's build, in the emulator otherwise.
#pragma once

#include <cstdio>

#include "cuda/common/device.cuh"
#include "emulator/conformance.h"

#if defined(__CUDACC__)
#define MEMEFF_CASES(architecture) gpu_cases_##architecture
#else
#define MEMEFF_CASES(architecture) emulated_cases_##architecture
#endif

// Everything here is local to its file: the two builds are linked into one program.
namespace memeff::conformance {

static bool launch_kernel(const Case& c, uint32_t* in, uint32_t* out) {
  const auto kernel = c.kernel;
  const auto* input = in;
#if defined(__CUDACC__)
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(c.shared_bytes)) != cudaSuccess)
    return false;
#endif
  MEMEFF_LAUNCH(kernel, dim3(1), dim3(c.threads), c.shared_bytes, nullptr, input, out);
  return cuda::launch_status().ok();
}

#if defined(__CUDACC__)

static bool run_case(const Case& c, const uint32_t* in, uint32_t* out) {
  const std::size_t bytes = kWords * sizeof(uint32_t);
  uint32_t *device_in = nullptr, *device_out = nullptr;
  cudaError_t error = cudaMalloc(&device_in, bytes);
  if (error == cudaSuccess) error = cudaMalloc(&device_out, bytes);
  if (error == cudaSuccess) error = cudaMemcpy(device_in, in, bytes, cudaMemcpyHostToDevice);
  if (error == cudaSuccess) error = cudaMemcpy(device_out, out, bytes, cudaMemcpyHostToDevice);
  bool launched = false;
  if (error == cudaSuccess)
    launched = (c.launch != nullptr ? c.launch : launch_kernel)(c, device_in, device_out);
  if (error == cudaSuccess) error = cudaMemcpy(out, device_out, bytes, cudaMemcpyDeviceToHost);
  cudaFree(device_in);
  cudaFree(device_out);
  if (error != cudaSuccess) std::printf("    %s\n", cudaGetErrorString(error));
  return launched && error == cudaSuccess;
}

#else

static bool run_case(const Case& c, const uint32_t* in, uint32_t* out) {
  using emulator::GlobalBuffer;
  std::vector<uint32_t> input(in, in + kWords);
  const GlobalBuffer guard_in(input.data(), kWords * 4, "in", emulator::BufferAccess::kReadOnly);
  const GlobalBuffer guard_out(out, kWords * 4, "out");
  emulator::clear_reports();
  if (!(c.launch != nullptr ? c.launch : launch_kernel)(c, input.data(), out)) return false;
  return emulator::reports().empty();
}

#endif

}  // namespace memeff::conformance
