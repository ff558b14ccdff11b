// D[64,kN] = A[64,64] B[64,kN] by wgmma, from images of the operands' shared memory.
//
// `in` holds, in 32-bit words: the image of A at 0 (8 KiB), the image of B at 2048 (128 kN bytes),
// and fragments of A in registers at 12288, [k / 16][thread][4]. `out` receives [thread][kN / 2]
// floats. Needs 8 KiB + 128 kN bytes of dynamic shared memory and 128 threads.
#pragma once

#include "cuda/ptx/sm90.cuh"

namespace memeff {

constexpr int kImageB = 2048, kFragmentsA = 12288;  // in words of `in`

template <class Element, int kN, bool kATransposed, bool kBTransposed, bool kARegisters>
__global__ void multiply_images(const uint32_t* in, uint32_t* out) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  MEMEFF_DYNAMIC_SHARED(bytes);
  const int t = threadIdx.x;
  for (int i = t; i < kImageB + kN * 32; i += 128) reinterpret_cast<uint32_t*>(bytes)[i] = in[i];
  ptx::fence_proxy_async();
  __syncthreads();

  const uint32_t a = ptx::shared_address(bytes), b = a + 4 * kImageB;
  constexpr uint32_t kGroupBytes = 8 * ptx::kAtomBytes;  // 64 m or n of an MN-major operand, 64 k
  uint32_t fragments[4][4];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i) fragments[k][i] = in[kFragmentsA + (k * 128 + t) * 4 + i];

  float d[kN / 2];
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t bd = kBTransposed
                            ? ptx::mn_major_descriptor(b + 2 * ptx::kAtomBytes * k, kGroupBytes)
                            : ptx::k_major_descriptor(b + 32 * k);
    if constexpr (kARegisters) {
      ptx::wgmma_a_registers<kN, Element, kBTransposed>(d, fragments[k], bd, k > 0);
    } else {
      const uint64_t ad = kATransposed
                              ? ptx::mn_major_descriptor(a + 2 * ptx::kAtomBytes * k, kGroupBytes)
                              : ptx::k_major_descriptor(a + 32 * k);
      ptx::wgmma<kN, Element, kATransposed, kBTransposed>(d, ad, bd, k > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) out[t * (kN / 2) + i] = __float_as_uint(d[i]);
#endif
}

}  // namespace memeff
