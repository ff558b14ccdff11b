// The generic kernels: every GPU and problem. They leave matrix products to torch (cuBLAS).
#include "cuda/architecture.h"

namespace memeff::cuda::generic {

static constexpr Variant kVariants[] = {{"", 1, false}};

const Architecture architecture = {
    "generic",
    [](const Problem&, const Gpu&) { return true; },
    [](int) { return 1.0; },
    /*fused=*/false,
    /*overlaps_launches=*/false,
    /*overlaps_epilogue=*/false,
    kVariants,
    1,
};

}  // namespace memeff::cuda::generic
