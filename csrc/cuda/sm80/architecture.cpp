// The sm80 kernels: mma.sync and cp.async, which every GPU from sm_80 on has.
#include "cuda/architecture.h"

namespace memeff::cuda::sm80 {

static constexpr Variant kVariants[] = {{"", 1, false}};

const Architecture architecture = {
    "sm80",
    [](const Problem& p, const Gpu& gpu) { return gpu.capability >= 80 && suits_fused_kernels(p); },
    [](int) { return 0.75; },
    /*fused=*/true,
    /*overlaps_launches=*/false,
    /*overlaps_epilogue=*/false,
    kVariants,
    1,
};

}  // namespace memeff::cuda::sm80
