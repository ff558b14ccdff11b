// PTX of sm_90, each instruction with the emulator's model of it; see sm80.cuh for the
// conventions. Everything but stmatrix, mbarrier and TMA exists on sm_90a only: kernels guard their
// bodies with __CUDA_ARCH_FEAT_SM90_ALL.
#pragma once

#if defined(MEMEFF_MBARRIER_TRIES)
#include <cstdio>
#endif
#include <type_traits>

#include "cuda/common/tensor_map.cuh"
#include "cuda/ptx/sm80.cuh"

namespace memeff::ptx {

// ---- stmatrix: the inverse of ldmatrix ----

MEMEFF_DEVICE void stmatrix_x4(uint32_t row_address, const uint32_t (&r)[4]) {
#if defined(__CUDACC__)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  emulator::stmatrix(row_address, r, 4, false);
#endif
}

MEMEFF_DEVICE void stmatrix_x4_trans(uint32_t row_address, const uint32_t (&r)[4]) {
#if defined(__CUDACC__)
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row_address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#else
  emulator::stmatrix(row_address, r, 4, true);
#endif
}

// ---- clusters: blocks that run at the same time and reach each other's shared memory ----

MEMEFF_DEVICE uint32_t cluster_rank() {  // of this block in its cluster
#if defined(__CUDACC__)
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return emulator::cluster_rank();
#endif
}

// Whole warps; every thread of the cluster that has not exited. What a thread did before it arrived
// is visible to the others after they have waited.
MEMEFF_DEVICE void cluster_arrive() {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  emulator::cluster_arrive();
#endif
}
MEMEFF_DEVICE void cluster_wait() {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emulator::cluster_wait();
#endif
}

// What lies at `address` in block `rank` of the cluster, as an address for the instructions below
// that end in _cluster. The block must not exit before it is used.
MEMEFF_DEVICE uint32_t map_shared(uint32_t address, uint32_t rank) {
#if defined(__CUDACC__)
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
#else
  return emulator::map_shared(address, rank);
#endif
}

// ---- overlapping launches ----

// From here on the stream's next grid may start, if it was launched to overlap this one.
MEMEFF_DEVICE void launch_dependents() {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#else
  emulator::launch_dependents();
#endif
}
// Waits until the grid that this one overlaps has ended.
MEMEFF_DEVICE void wait_for_grid() {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#else
  emulator::wait_for_grid();
#endif
}

// ---- mbarrier: a barrier in shared memory that counts arrivals and bytes ----
//
// A phase ends when `count` arrivals and all expected bytes have come; phases alternate between
// parity 0 (the first) and 1. Waiting for a parity returns once the phase of that parity has ended;
// on a fresh mbarrier a wait for parity 1 returns at once.

MEMEFF_DEVICE void mbarrier_init(uint32_t mbarrier, int count) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
#else
  emulator::mbarrier_init(mbarrier, count);
#endif
}

// Makes this thread's mbarrier_init visible to TMA; other threads see it after a barrier, those of
// other blocks after one of the cluster.
MEMEFF_DEVICE void fence_mbarrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::fence_mbarrier_init();
#endif
}

MEMEFF_DEVICE void mbarrier_arrive(uint32_t mbarrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  emulator::mbarrier_arrive(mbarrier);
#endif
}

// In another block of the cluster. Orders the thread's plain accesses for threads of its own block
// only, which is enough to hand over what TMA and wgmma access: for the other block, ptxas would
// put a MEMBAR of the whole GPU before each arrival and an invalidation of L1 after each wait.
MEMEFF_DEVICE void mbarrier_arrive_cluster(uint32_t mapped_mbarrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped_mbarrier) : "memory");
#else
  emulator::mbarrier_arrive_cluster(mapped_mbarrier);
#endif
}

// Announces bytes that TMA will deliver in this phase, and arrives.
MEMEFF_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_expect_tx(mbarrier, bytes, true);
#endif
}

// A build with -DMEMEFF_MBARRIER_TRIES=n traps where n tries in turn have failed, and says who waits for
// what: a hang becomes a diagnosis. In the emulator such a wait is a deadlock, reported with the same
// facts.
MEMEFF_DEVICE void mbarrier_wait(uint32_t mbarrier, int parity) {
#if defined(__CUDACC__) && defined(MEMEFF_MBARRIER_TRIES)
  for (int tries = 0; tries < MEMEFF_MBARRIER_TRIES; ++tries) {
    uint32_t is_over;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(is_over)
        : "r"(mbarrier), "r"(parity)
        : "memory");
    if (is_over != 0) return;
  }
  // The number is right where mbarriers lie at a multiple of 1024 bytes, as in the ring of sm90/pipeline.cuh.
  printf("memeff: block %u,%u,%u thread %u: mbarrier %u, wait for parity %d: no end\n", blockIdx.x,
         blockIdx.y, blockIdx.z, threadIdx.x, mbarrier % 1024 / 8, parity);
  __trap();
#elif defined(__CUDACC__)
  // try_wait sleeps for a while by itself; the label must be unique in every inlined copy.
  asm volatile(
      "{\n.reg .pred p;\n"
      "wait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra.uni wait_%=;\n}" ::"r"(mbarrier),
      "r"(parity)
      : "memory");
#else
  emulator::mbarrier_wait(mbarrier, parity);
#endif
}

// Orders this thread's plain accesses of shared memory, and those it has synchronised with, before
// later accesses by TMA and wgmma.
MEMEFF_DEVICE void fence_proxy_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::fence_proxy_async();
#endif
}

// ---- TMA: tiles between global and shared memory, one thread issues ----
//
// `column` and `row` are where the map's box starts in the tensor; what lies outside reads as zero
// and is not written. The map is a __grid_constant__ kernel argument.

// Completes on `mbarrier`, with the bytes of the whole box.
MEMEFF_DEVICE void tma_load_2d(uint32_t destination, const TensorMap* map, int column, int row,
                               uint32_t mbarrier) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(mbarrier), "r"(column), "r"(row)
      : "memory");
#else
  emulator::tma_load_2d(destination, map, column, row, mbarrier);
#endif
}

// The same to each block of the cluster whose bit of `blocks` is set, from one read of the tensor:
// to `destination` and on `mbarrier` in that block's own shared memory.
MEMEFF_DEVICE void tma_load_2d_multicast(uint32_t destination, const TensorMap* map, int column,
                                         int row, uint32_t mbarrier, uint32_t blocks) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(mbarrier), "r"(column), "r"(row),
      "h"(static_cast<uint16_t>(blocks))
      : "memory");
#else
  emulator::tma_load_2d_multicast(destination, map, column, row, mbarrier, blocks);
#endif
}

MEMEFF_DEVICE void tma_store_2d(const TensorMap* map, uint32_t source, int column, int row) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(source), "r"(column), "r"(row)
               : "memory");
#else
  emulator::tma_store_2d(map, source, column, row, false);
#endif
}

// Adds the tile to the tensor, element by element; each addition is atomic.
MEMEFF_DEVICE void tma_reduce_add_2d(const TensorMap* map, uint32_t source, int column, int row) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::
          "l"(reinterpret_cast<uint64_t>(map)),
      "r"(source), "r"(column), "r"(row)
      : "memory");
#else
  emulator::tma_store_2d(map, source, column, row, true);
#endif
}

// Closes the group of stores that this thread issued since the last commit.
MEMEFF_DEVICE void bulk_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  emulator::bulk_commit();
#endif
}

// Waits until at most kPending groups have not finished reading shared memory, which may then be
// reused.
template <int kPending>
MEMEFF_DEVICE void bulk_wait_read() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#else
  emulator::bulk_wait(kPending, true);
#endif
}

// ---- wgmma: asynchronous products of a warpgroup of 128 threads ----
//
// Operands in shared memory consist of atoms of 8 rows of 128 bytes with 128-byte swizzle, as TMA
// writes them; a tile starts at a multiple of 1024. One instruction takes 16 of k:
//   K-major    rows are 64 adjacent k; `stride` bytes to the next 8 of m or n; next 16 k: + 32
//   MN-major   rows are 64 adjacent m or n; `leading` bytes to the next 64 of them, `stride` bytes
//              to the next 8 k; next 16 k: + 2 * stride

constexpr uint32_t kAtomBytes = 1024;

MEMEFF_DEVICE uint64_t operand_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         kSwizzle128;
}
MEMEFF_DEVICE uint64_t k_major_descriptor(uint32_t address, uint32_t stride = kAtomBytes) {
  return operand_descriptor(address, 16, stride);  // the hardware ignores `leading` here
}
MEMEFF_DEVICE uint64_t mn_major_descriptor(uint32_t address, uint32_t leading,
                                           uint32_t stride = kAtomBytes) {
  return operand_descriptor(address, leading, stride);
}

// Before the first wgmma, and whenever registers of an operand were accessed since the last one.
MEMEFF_DEVICE void wgmma_fence() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence();
#endif
}

MEMEFF_DEVICE void wgmma_commit() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit();
#endif
}

// Waits until at most kPending groups are in flight. Their operands may then be overwritten and
// their accumulators read.
template <int kPending>
MEMEFF_DEVICE void wgmma_wait() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  emulator::wgmma_wait(kPending);
#endif
}

// Ends the arithmetic that makes an operand: the compiler may move it across the fence, which to it
// is about memory only. Stands before the fence.
MEMEFF_DEVICE void operand_is_ready(uint32_t (&a)[4]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
#else
  (void)a;
#endif
}

// Keeps the compiler from moving arithmetic on accumulators across this line: it does not know that
// wgmma_wait completes them.
template <int kCount>
MEMEFF_DEVICE void accumulators_are_ready(float (&d)[kCount]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
#endif
}

#if defined(__CUDACC__)

// The accumulators' places in the instruction, and the asm operands that fill them.
#define MEMEFF_REGISTERS_32                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MEMEFF_REGISTERS_64                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MEMEFF_REGISTERS_128                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define MEMEFF_ACCUMULATORS_8(d, i)                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MEMEFF_ACCUMULATORS_32(d, i)                                                              \
  MEMEFF_ACCUMULATORS_8(d, i), MEMEFF_ACCUMULATORS_8(d, i + 8), MEMEFF_ACCUMULATORS_8(d, i + 16), \
      MEMEFF_ACCUMULATORS_8(d, i + 24)
#define MEMEFF_ACCUMULATORS_64(d, i) MEMEFF_ACCUMULATORS_32(d, i), MEMEFF_ACCUMULATORS_32(d, i + 32)
#define MEMEFF_ACCUMULATORS_128(d, i) \
  MEMEFF_ACCUMULATORS_64(d, i), MEMEFF_ACCUMULATORS_64(d, i + 64)

// `count` accumulators; o0, o1, ... are the numbers of the operands that follow them.
#define MEMEFF_WGMMA_SS(n, type, count, o0, o1, o2, o3, o4)                                   \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #o2                     \
               ", 0;\n"                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                \
               " {" MEMEFF_REGISTERS_##count "}, %" #o0 ", %" #o1 ", accumulate, 1, 1, %" #o3 \
                                             ", %" #o4 ";\n}"                                 \
               : MEMEFF_ACCUMULATORS_##count(d, 0)                                            \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kATransposed ? 1 : 0),                  \
                 "n"(kBTransposed ? 1 : 0))

#define MEMEFF_WGMMA_RS(n, type, count, o0, o1, o2, o3, o4, o5, o6)                               \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #o5                         \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                    \
               " {" MEMEFF_REGISTERS_##count "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 \
                                             ", accumulate, 1, 1, %" #o6 ";\n}"                   \
               : MEMEFF_ACCUMULATORS_##count(d, 0)                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),             \
                 "n"(kBTransposed ? 1 : 0))

#endif  // __CUDACC__

// d[64, kN] = (accumulate ? d : 0) + a[64, 16] b[16, kN]; kN is 64, 128 or 256. "Transposed"
// operands are MN-major. d[i] of thread t: row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 2
// (t % 4) + i % 2 + 8 (i / 4).
template <int kN, class Element, bool kATransposed = false, bool kBTransposed = false>
MEMEFF_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  constexpr bool kBf16 = std::is_same_v<Element, __nv_bfloat16>;
  static_assert(kN == 64 || kN == 128 || kN == 256);
  static_assert(kBf16 || std::is_same_v<Element, __half>);
#if defined(__CUDACC__)
  if constexpr (kBf16 && kN == 64) MEMEFF_WGMMA_SS(64, "bf16", 32, 32, 33, 34, 35, 36);
  if constexpr (kBf16 && kN == 128) MEMEFF_WGMMA_SS(128, "bf16", 64, 64, 65, 66, 67, 68);
  if constexpr (kBf16 && kN == 256) MEMEFF_WGMMA_SS(256, "bf16", 128, 128, 129, 130, 131, 132);
  if constexpr (!kBf16 && kN == 64) MEMEFF_WGMMA_SS(64, "f16", 32, 32, 33, 34, 35, 36);
  if constexpr (!kBf16 && kN == 128) MEMEFF_WGMMA_SS(128, "f16", 64, 64, 65, 66, 67, 68);
  if constexpr (!kBf16 && kN == 256) MEMEFF_WGMMA_SS(256, "f16", 128, 128, 129, 130, 131, 132);
#else
  emulator::wgmma({kBf16, kN, kATransposed, kBTransposed}, d, a, nullptr, b, accumulate != 0);
#endif
}

// The same with A in registers: register i of thread t holds row 16 (t / 32) + t % 32 / 4 + 8 (i %
// 2), columns 2 (t % 4) + 8 (i / 2) and the next: four mma.m16n8k16 A fragments, one per warp.
template <int kN, class Element, bool kBTransposed = false>
MEMEFF_DEVICE void wgmma_a_registers(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                     int accumulate) {
  constexpr bool kBf16 = std::is_same_v<Element, __nv_bfloat16>;
  static_assert(kN == 64 || kN == 128 || kN == 256);
  static_assert(kBf16 || std::is_same_v<Element, __half>);
#if defined(__CUDACC__)
  if constexpr (kBf16 && kN == 64) MEMEFF_WGMMA_RS(64, "bf16", 32, 32, 33, 34, 35, 36, 37, 38);
  if constexpr (kBf16 && kN == 128) MEMEFF_WGMMA_RS(128, "bf16", 64, 64, 65, 66, 67, 68, 69, 70);
  if constexpr (kBf16 && kN == 256)
    MEMEFF_WGMMA_RS(256, "bf16", 128, 128, 129, 130, 131, 132, 133, 134);
  if constexpr (!kBf16 && kN == 64) MEMEFF_WGMMA_RS(64, "f16", 32, 32, 33, 34, 35, 36, 37, 38);
  if constexpr (!kBf16 && kN == 128) MEMEFF_WGMMA_RS(128, "f16", 64, 64, 65, 66, 67, 68, 69, 70);
  if constexpr (!kBf16 && kN == 256)
    MEMEFF_WGMMA_RS(256, "f16", 128, 128, 129, 130, 131, 132, 133, 134);
#else
  emulator::wgmma({kBf16, kN, false, kBTransposed}, d, 0, a, b, accumulate != 0);
#endif
}

// ---- registers per thread: moved from producer to consumer warpgroups ----

template <int kRegisters>
MEMEFF_DEVICE void decrease_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::setmaxnreg(kRegisters, false);
#endif
}

template <int kRegisters>
MEMEFF_DEVICE void increase_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::setmaxnreg(kRegisters, true);
#endif
}

}  // namespace memeff::ptx
