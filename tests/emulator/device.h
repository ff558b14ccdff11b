// The CUDA language for a host compiler: qualifiers, built-in variables, synchronisation, warp
// functions, atomics and the intrinsics that kernels use. Included by cuda/common/device.cuh, and
// by nothing else, when the compiler is not nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/device_api.h"
#include "emulator/device_api_sm90.h"
#include "emulator/emulator.h"

// Inlined always, so that the return address seen by the emulator lies in the kernel itself.
#define MEMEFF_DEVICE inline __attribute__((always_inline))

#define MEMEFF_SHARED_ARRAY(type, name, count)                                              \
  type(&name)[count] = *reinterpret_cast<type(*)[count]>(::memeff::emulator::static_shared( \
      sizeof(type) * (count), alignof(type), __PRETTY_FUNCTION__, #name))
#define MEMEFF_DYNAMIC_SHARED(name) unsigned char* const name = ::memeff::emulator::dynamic_shared()

// A host compiler splits vector accesses, so their alignment has to be checked apart.
#define MEMEFF_CHECK_ALIGNED(pointer, bytes) ::memeff::emulator::check_alignment(pointer, bytes)

// Launches are complete on return; on another stream than Config::stream they are reported.
#define MEMEFF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  MEMEFF_LAUNCH_CLUSTERS(1, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define MEMEFF_LAUNCH_CLUSTERS(cluster, kernel, grid, block, shared_bytes, stream, ...) \
  MEMEFF_LAUNCH_OVERLAPPED(false, cluster, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define MEMEFF_LAUNCH_OVERLAPPED(overlaps, cluster, kernel, grid, block, shared_bytes, stream, \
                                 ...)                                                          \
  ::memeff::emulator::launch(#kernel, (cluster), (overlaps), (grid), (block), (shared_bytes),  \
                             (stream), [=] { (kernel)(__VA_ARGS__); })

// A plain __shared__ variable would be invisible to the checks.
#undef __shared__
#define __shared__ MEMEFF_use_SHARED_ARRAY_or_DYNAMIC_SHARED
#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

#define threadIdx (::memeff::emulator::thread_index())
#define blockIdx (::memeff::emulator::block_index())
#define blockDim (::memeff::emulator::block_dim())
#define gridDim (::memeff::emulator::grid_dim())

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// Fast approximations on a GPU, exact here. Macros, because libm declares functions of these names.
#define __expf(x) (::std::exp(static_cast<float>(x)))
#define __logf(x) (::std::log(static_cast<float>(x)))
#define __fdividef(x, y) (static_cast<float>(x) / static_cast<float>(y))

MEMEFF_DEVICE void __syncthreads() { ::memeff::emulator::syncthreads(); }
MEMEFF_DEVICE void __syncwarp(unsigned mask = ~0u) { ::memeff::emulator::syncwarp(mask); }
MEMEFF_DEVICE void __threadfence() {}  // memory is sequentially consistent here
MEMEFF_DEVICE void __threadfence_block() {}

namespace memeff::emulator {

template <class T>
struct NotDeducedType {
  using type = T;
};
template <class T>
using NotDeduced =
    typename NotDeducedType<T>::type;  // the argument converts, as in CUDA's overloads

template <class T>
MEMEFF_DEVICE T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  copy_unchecked(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width);
  copy_unchecked(&value, &bits, sizeof(T));
  return value;
}

// Fibers switch at barriers only, so read, compute, write is atomic.
template <class T, class Update>
MEMEFF_DEVICE T atomic_update(T* address, Update update) {
  touch_atomically(address, sizeof(T));
  T old;
  copy_unchecked(&old, address, sizeof(T));
  const T updated = update(old);
  copy_unchecked(address, &updated, sizeof(T));
  return old;
}

}  // namespace memeff::emulator

template <class T>
MEMEFF_DEVICE T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  using namespace ::memeff::emulator;
  return shuffle_value(Shuffle::kIndex, mask, value, lane, width);
}
template <class T>
MEMEFF_DEVICE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace ::memeff::emulator;
  return shuffle_value(Shuffle::kUp, mask, value, static_cast<int>(delta), width);
}
template <class T>
MEMEFF_DEVICE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace ::memeff::emulator;
  return shuffle_value(Shuffle::kDown, mask, value, static_cast<int>(delta), width);
}
template <class T>
MEMEFF_DEVICE T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  using namespace ::memeff::emulator;
  return shuffle_value(Shuffle::kXor, mask, value, lane_mask, width);
}

MEMEFF_DEVICE unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::memeff::emulator::ballot(mask, predicate != 0);
}
MEMEFF_DEVICE int __any_sync(unsigned mask, int predicate) {
  return ::memeff::emulator::ballot(mask, predicate != 0) != 0;
}
MEMEFF_DEVICE int __all_sync(unsigned mask, int predicate) {
  return ::memeff::emulator::ballot(mask, predicate == 0) == 0;  // nobody says no
}
template <class T>
MEMEFF_DEVICE unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  ::memeff::emulator::copy_unchecked(&bits, &value, sizeof(T));
  return ::memeff::emulator::match_any(mask, bits);
}

template <class T>
MEMEFF_DEVICE T atomicAdd(T* address, ::memeff::emulator::NotDeduced<T> value) {
  return ::memeff::emulator::atomic_update(address,
                                           [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
MEMEFF_DEVICE T atomicMax(T* address, ::memeff::emulator::NotDeduced<T> value) {
  return ::memeff::emulator::atomic_update(address, [&](T old) { return std::max(old, value); });
}
template <class T>
MEMEFF_DEVICE T atomicMin(T* address, ::memeff::emulator::NotDeduced<T> value) {
  return ::memeff::emulator::atomic_update(address, [&](T old) { return std::min(old, value); });
}
template <class T>
MEMEFF_DEVICE T atomicExch(T* address, ::memeff::emulator::NotDeduced<T> value) {
  return ::memeff::emulator::atomic_update(address, [&](T) { return value; });
}
template <class T>
MEMEFF_DEVICE T atomicCAS(T* address, ::memeff::emulator::NotDeduced<T> expected,
                          ::memeff::emulator::NotDeduced<T> value) {
  return ::memeff::emulator::atomic_update(address,
                                           [&](T old) { return old == expected ? value : old; });
}

// Cache hints change speed only.
template <class T>
MEMEFF_DEVICE T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
MEMEFF_DEVICE T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
MEMEFF_DEVICE void __stcs(T* pointer, ::memeff::emulator::NotDeduced<T> value) {
  *pointer = value;
}

MEMEFF_DEVICE std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  ::memeff::emulator::copy_unchecked(&bits, &value, sizeof bits);
  return bits;
}
MEMEFF_DEVICE float __uint_as_float(std::uint32_t bits) {
  float value;
  ::memeff::emulator::copy_unchecked(&value, &bits, sizeof value);
  return value;
}
MEMEFF_DEVICE int __popc(unsigned bits) { return __builtin_popcount(bits); }
MEMEFF_DEVICE int __ffs(int bits) { return __builtin_ffs(bits); }
