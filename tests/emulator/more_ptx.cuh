// PTX that the emulator models and no kernel uses, with the conventions of csrc/cuda/ptx.
#pragma once

#include "cuda/ptx/sm90.cuh"

namespace memeff::ptx {

// cp_async_16 for 4 or 8 bytes, for rows that are not 16-byte aligned.
template <int kBytes>
MEMEFF_DEVICE void cp_async_narrow(uint32_t destination, const void* source,
                                   int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8);
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source),
               "n"(kBytes), "r"(source_bytes)
               : "memory");
#else
  emulator::cp_async(destination, source, kBytes, source_bytes);
#endif
}

MEMEFF_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row_address) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row_address)
               : "memory");
#else
  emulator::ldmatrix(r, 2, row_address, false);
#endif
}

MEMEFF_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row_address) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row_address)
               : "memory");
#else
  emulator::ldmatrix(r, 2, row_address, true);
#endif
}

// sm_75: the one product that Turing has for 16-bit floats.
MEMEFF_DEVICE void mma_m16n8k8_fp16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
#else
  emulator::mma_m16n8(emulator::MmaType::kFp16, 8, d, a, &b);
#endif
}

MEMEFF_DEVICE void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
#else
  emulator::mma_m16n8(emulator::MmaType::kBf16, 8, d, a, &b);
#endif
}

MEMEFF_DEVICE uint32_t cluster_size() {
#if defined(__CUDACC__)
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return emulator::cluster_size();
#endif
}

MEMEFF_DEVICE void mbarrier_inval(uint32_t mbarrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
#else
  emulator::mbarrier_inval(mbarrier);
#endif
}

MEMEFF_DEVICE void mbarrier_expect_tx(uint32_t mbarrier, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbarrier),
               "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_expect_tx(mbarrier, bytes, false);
#endif
}

MEMEFF_DEVICE bool mbarrier_test(uint32_t mbarrier, int parity) {
#if defined(__CUDACC__)
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(mbarrier), "r"(parity)
      : "memory");
  return ended != 0;
#else
  return emulator::mbarrier_test(mbarrier, parity);
#endif
}

MEMEFF_DEVICE void prefetch_tensor_map(const TensorMap* map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
#else
  (void)map;
#endif
}

// Waits until at most kPending groups are incomplete: the others are visible in global memory.
template <int kPending>
MEMEFF_DEVICE void bulk_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::bulk_wait(kPending, false);
#endif
}

}  // namespace memeff::ptx
