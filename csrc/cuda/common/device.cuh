// What every kernel includes first: CUDA itself under nvcc, the emulator of tests/emulator under
// any other compiler. The macros stand for the few constructs that the two cannot spell alike.
//
//   MEMEFF_DEVICE                     a device function, inlined
//   MEMEFF_SHARED_ARRAY(T, name, n)   T name[n] in static shared memory
//   MEMEFF_DYNAMIC_SHARED(name)       unsigned char* name: the launch's dynamic shared memory
//   MEMEFF_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//   MEMEFF_LAUNCH_CLUSTERS(size, kernel, ...)   the same in clusters of `size` blocks along x
//   MEMEFF_LAUNCH_OVERLAPPED(overlaps, size, kernel, ...)   if `overlaps`, may start before the one before
//                                     has ended, once all its blocks called launch_dependents; some
//                                     block must then wait_for_grid before it ends
//   MEMEFF_CHECK_ALIGNED(p, bytes)    nothing on a GPU, where a misaligned access traps by itself
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define MEMEFF_DEVICE __device__ __forceinline__
#define MEMEFF_SHARED_ARRAY(type, name, count) __shared__ type name[count]
// 1024: what the widest swizzle of the tensor memory accelerator asks of a tile
#define MEMEFF_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define MEMEFF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MEMEFF_LAUNCH_CLUSTERS(size, kernel, grid, block, shared_bytes, stream, ...) \
  MEMEFF_LAUNCH_OVERLAPPED(false, size, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define MEMEFF_LAUNCH_OVERLAPPED(overlaps, size, kernel, grid, block, shared_bytes, stream, ...) \
  ::memeff::cuda::launch_clusters((overlaps), (size), (kernel), (grid), (block), (shared_bytes), \
                                  (stream), __VA_ARGS__)

#define MEMEFF_CHECK_ALIGNED(pointer, bytes) ((void)0)

#else

#include "emulator/device.h"

#endif

#include "cuda/status.h"

namespace memeff::cuda {

// Whether the launches so far in this thread were accepted. Clears the error, so that it is not
// blamed on the next caller. (static: a program may link the emulated build as well.)
static inline Status launch_status() {
#if defined(__CUDACC__)
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  return {};
#else
  return {emulator::take_launch_error()};
#endif
}

// Lets `kernel` use more dynamic shared memory than the 48 KiB that every GPU grants.
template <class Kernel>
static inline Status allow_shared_memory(Kernel kernel, int bytes) {
#if defined(__CUDACC__)
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
#else
  (void)kernel, (void)bytes;
#endif
  return {};
}

#if defined(__CUDACC__)

// A launch in clusters, for as long as it is in scope.
class ClusterLaunch {
 public:
  ClusterLaunch(int size, dim3 grid, dim3 block, int shared_bytes, void* stream,
                bool overlaps = false) {
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    attributes_[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[1].val.programmaticStreamSerializationAllowed = 1;
    config_.gridDim = grid;
    config_.blockDim = block;
    config_.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config_.stream = static_cast<cudaStream_t>(stream);
    config_.attrs = attributes_;
    config_.numAttrs = overlaps ? 2 : 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchAttribute attributes_[2]{};
  cudaLaunchConfig_t config_{};
};

// MEMEFF_LAUNCH_OVERLAPPED. What goes wrong, launch_status reports.
template <class... Parameters, class... Arguments>
static inline void launch_clusters(bool overlaps, int size, void (*kernel)(Parameters...),
                                   dim3 grid, dim3 block, int shared_bytes, void* stream,
                                   const Arguments&... arguments) {
  const ClusterLaunch launch(size, grid, block, shared_bytes, stream, overlaps);
  (void)cudaLaunchKernelEx(launch.config(), kernel, arguments...);
}

#endif

}  // namespace memeff::cuda
