// The emulator as device code sees it. The bodies in cuda/ptx/*.cuh and the CUDA language in
// emulator/device.h are thin wrappers over these functions. None of them takes a source location:
// they look at their return address, which lies in the kernel because the wrappers are inlined.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace memeff::emulator {

// ---- built-in variables; by value, so that reading them never looks like a memory access ----
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_dim();
__attribute__((const)) dim3 grid_dim();

// ---- shared memory ----
unsigned char* dynamic_shared();
void* static_shared(std::size_t bytes, std::size_t alignment, const char* function,
                    const char* name);
std::uint32_t shared_address(const void* pointer);  // in the 32-bit shared window

void check_alignment(const void* pointer, std::size_t bytes);

// ---- barriers and warp collectives ----
void syncthreads();
void bar_sync(int barrier, int threads);
void bar_arrive(int barrier, int threads);
void syncwarp(unsigned mask);

enum class Shuffle { kIndex, kUp, kDown, kXor };
std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t value, int operand, int width);
unsigned ballot(unsigned mask, bool predicate);
unsigned match_any(unsigned mask, std::uint64_t value);

// ---- atomics: announces the access; fibers do not preempt, so the caller's update is atomic ----
void touch_atomically(void* pointer, std::size_t bytes);
void copy_unchecked(void* destination, const void* source, std::size_t bytes);

// ---- Ampere: asynchronous copies, matrix loads, matrix products ----
void cp_async(std::uint32_t destination, const void* source, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups_still_in_flight);
void ldmatrix(std::uint32_t* registers, int matrices, std::uint32_t row_address, bool transposed);
void stmatrix(std::uint32_t row_address, const std::uint32_t* registers, int matrices,
              bool transposed);

std::uint32_t min_of_halves(std::uint32_t a, std::uint32_t b);  // two fp16 numbers each

enum class MmaType { kBf16, kFp16 };
// D[16,8] += A[16,k] B[k,8], one warp; k is 8 or 16.
void mma_m16n8(MmaType type, int k, float* d, const std::uint32_t* a, const std::uint32_t* b);

}  // namespace memeff::emulator
