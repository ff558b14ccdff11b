// PTX of sm_75 and sm_80: the only file that contains any for these architectures. Every primitive
// has two bodies side by side: the instruction for nvcc, and the emulator's model of it for the
// host.
//
// Shared-memory operands are 32-bit addresses in the shared window (shared_address).
//
// Fragments of mma.m16n8k*, with group = lane / 4 and pair = 2 (lane % 4); "i" counts 32-bit
// registers of two 16-bit elements, low half first:
//   A[16,k] register i   row group + 8 (i % 2), columns pair + 8 (i / 2) and the next
//   B[k,8]  register i   rows pair + 8 i and the next, column group
//   D[16,8] float i      row group + 8 (i / 2), column pair + i % 2
#pragma once

#include "cuda/common/device.cuh"

namespace memeff::ptx {

MEMEFF_DEVICE uint32_t shared_address(const void* pointer) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return emulator::shared_address(pointer);
#endif
}

// ---- arithmetic ----

// 2^x with a relative error of 2^-22; results below 2^-126 become 0. What __expf uses, without the
// five instructions with which it keeps subnormal results.
MEMEFF_DEVICE float exp2_approximate(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

// The larger of two numbers; of a number and a NaN a NaN. sm_80.
MEMEFF_DEVICE float max_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  if (a != a || b != b) return __uint_as_float(0x7fffffff);
  return a > b ? a : b;
#endif
}

// The smaller of two fp16 numbers, twice; of a NaN and a number the number. sm_80.
MEMEFF_DEVICE uint32_t min_of_halves(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t result;
  asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return emulator::min_of_halves(a, b);
#endif
}

// ---- cp.async (sm_80): global to shared memory without passing through registers ----

// Copies the first source_bytes (0 to 16) of 16 bytes and fills the rest with zeros. Both addresses
// are multiples of 16. Goes past L1: tiles are read from shared memory afterwards.
MEMEFF_DEVICE void cp_async_16(uint32_t destination, const void* source, int source_bytes = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(source_bytes)
               : "memory");
#else
  emulator::cp_async(destination, source, 16, source_bytes);
#endif
}

// Closes the group of copies that this thread issued since the last commit.
MEMEFF_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Waits until at most kPending of this thread's groups are in flight. Other threads see the data
// after a barrier.
template <int kPending>
MEMEFF_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::cp_async_wait(kPending);
#endif
}

// ---- ldmatrix (sm_75): 8x8 matrices of 16-bit elements from shared memory, whole warp ----
//
// Lane 8 j + i passes the address of row i of matrix j, a multiple of 16. Register j then holds row
// lane / 4, columns 2 (lane % 4) and the next of matrix j; _trans swaps rows and columns.

MEMEFF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
#else
  emulator::ldmatrix(r, 4, row_address, false);
#endif
}

MEMEFF_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
#else
  emulator::ldmatrix(r, 4, row_address, true);
#endif
}

// ---- mma.sync: D += A B with fp32 accumulation, whole warp ----

MEMEFF_DEVICE void mma_m16n8k16_fp16(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8(emulator::MmaType::kFp16, 16, d, a, b);
#endif
}

MEMEFF_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8(emulator::MmaType::kBf16, 16, d, a, b);
#endif
}

// ---- named barriers: synchronise a part of the block ----

// `threads` counts those who wait and those who only arrive; a multiple of 32. Barrier 0 belongs to
// __syncthreads.
MEMEFF_DEVICE void bar_sync(int barrier, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
  emulator::bar_sync(barrier, threads);
#endif
}

MEMEFF_DEVICE void bar_arrive(int barrier, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
  emulator::bar_arrive(barrier, threads);
#endif
}

}  // namespace memeff::ptx
