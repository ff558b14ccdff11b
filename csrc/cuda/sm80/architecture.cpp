// The sm80 kernels: mma.sync and cp.async, which every GPU from sm_80 on has.
#include "cuda/architecture.h"

namespace memeff::cuda::sm80 {

const Architecture architecture = {
    "sm80",
    [](const Problem& p, const Gpu& gpu) { return gpu.capability >= 80 && suits_fused_kernels(p); },
    /*fused=*/true,
    /*relative_speed=*/[](int) { return 0.75; },
};

}  // namespace memeff::cuda::sm80
