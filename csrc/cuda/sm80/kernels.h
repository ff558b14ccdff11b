// Gradient and score kernels for sm_80 and newer: mma.sync, cp.async.
#pragma once

#include "cuda/fused_kernels.h"

namespace memeff::cuda::sm80 {

Status linear_statistics(const LinearStatistics& call, void* stream);
Status linear_gradient(const LinearGradient& call, void* stream);
Status grad_input_product(const GradientProduct& call, void* stream);
Status grad_weight_product(const GradientProduct& call, void* stream);

}  // namespace memeff::cuda::sm80
