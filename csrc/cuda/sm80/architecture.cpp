// The sm80 kernels: mma.sync and cp.async, which every GPU from sm_80 on has.
#include "cuda/architecture.h"

namespace memeff::cuda::sm80 {

namespace {

/// mma.sync is the only way to the tensor cores on sm_8x and sm_12x. On sm_90 it reaches about 62 % of
/// what wgmma does; on sm_100 to sm_11x, whose tensor cores are tcgen05's, about a quarter.
double relative_speed(int capability) {
  if (capability >= 100 && capability < 120) return 0.2;
  return capability >= 90 && capability < 100 ? 0.5 : 0.75;
}

}  // namespace

const Architecture architecture = {
    "sm80",
    [](const Problem& p, const Gpu& gpu) { return gpu.capability >= 80 && suits_fused_kernels(p); },
    /*fused=*/true,
    &relative_speed,
};

}  // namespace memeff::cuda::sm80
