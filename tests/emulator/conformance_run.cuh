// Runs one conformance case: on the GPU in nvcc's build, in the emulator otherwise.
#pragma once

#include "cuda/common/device.cuh"
#include "emulator/conformance.h"

#if defined(__CUDACC__)
#define MEMEFF_CASES(architecture) gpu_cases_##architecture
#else
#define MEMEFF_CASES(architecture) emulated_cases_##architecture
#endif

// Everything here is local to its file: the two builds are linked into one program.
namespace memeff::conformance {

static Status launch_kernel(const Case& c, uint32_t* in, uint32_t* out) {
  const auto kernel = c.kernel;
  const auto* input = in;
  const Status allowed = cuda::allow_shared_memory(kernel, static_cast<int>(c.shared_bytes));
  if (!allowed.ok()) return allowed;
  MEMEFF_LAUNCH(kernel, dim3(1), dim3(c.threads), c.shared_bytes, nullptr, input, out);
  return cuda::launch_status();
}

#if defined(__CUDACC__)

static Status status_of(cudaError_t error) {
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

// kManaged: in managed memory, which the C++ tests of the kernels use on a GPU.
template <bool kManaged = false>
static Status run_case(const Case& c, const uint32_t* in, uint32_t* out) {
  const std::size_t bytes = kWords * sizeof(uint32_t);
  void *device_in = nullptr, *device_out = nullptr;
  const auto allocate = [&](void** memory) {
    return kManaged ? cudaMallocManaged(memory, bytes) : cudaMalloc(memory, bytes);
  };
  Status status = status_of(allocate(&device_in));
  if (status.ok()) status = status_of(allocate(&device_out));
  if (status.ok()) status = status_of(cudaMemcpy(device_in, in, bytes, cudaMemcpyDefault));
  if (status.ok()) status = status_of(cudaMemcpy(device_out, out, bytes, cudaMemcpyDefault));
  if (status.ok())
    status = (c.launch != nullptr ? c.launch : launch_kernel)(c, static_cast<uint32_t*>(device_in),
                                                              static_cast<uint32_t*>(device_out));
  if (status.ok()) status = status_of(cudaDeviceSynchronize());
  if (status.ok()) status = status_of(cudaMemcpy(out, device_out, bytes, cudaMemcpyDefault));
  for (void* memory : {device_in, device_out}) cudaFree(memory);
  return status;
}

#else

template <bool kManaged = false>
static Status run_case(const Case& c, const uint32_t* in, uint32_t* out) {
  using emulator::GlobalBuffer;
  std::vector<uint32_t> input(in, in + kWords);
  const GlobalBuffer guard_in(input.data(), kWords * 4, "in", emulator::BufferAccess::kReadOnly);
  const GlobalBuffer guard_out(out, kWords * 4, "out");
  emulator::clear_reports();
  const Status status = (c.launch != nullptr ? c.launch : launch_kernel)(c, input.data(), out);
  if (!status.ok() || emulator::reports().empty()) return status;
  return {emulator::name_of(emulator::reports()[0].defect)};
}

#endif

}  // namespace memeff::conformance
