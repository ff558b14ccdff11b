// The generic kernels: every GPU and problem. They leave matrix products to torch (cuBLAS).
#include "cuda/architecture.h"

namespace memeff::cuda::generic {

const Architecture architecture = {"generic", [](const Problem&, const Gpu&) { return true; }};

}  // namespace memeff::cuda::generic
