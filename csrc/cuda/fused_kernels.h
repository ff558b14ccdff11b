// The functions of a fused architecture (architecture.h), in the variant that was selected.
#pragma once

#include "cuda/architecture.h"
#include "cuda/launch.h"

namespace memeff::cuda {

/// Null: the variant has no such kernel.
struct FusedKernels {
  LinearStatistics* linear_statistics = nullptr;
  LinearGradient* linear_gradient = nullptr;
  GradientProduct *grad_input_product = nullptr, *grad_weight_product = nullptr;
  // Of variants that read scores, and whether they can make these gradients on the way.
  ProductFromScores *grad_input_from_scores = nullptr, *grad_weight_from_scores = nullptr;
  bool (*accepts_scores)(const ScoreGradient& scores) = nullptr;
};

#define MEMEFF_DECLARE(name)               \
  namespace name {                         \
  FusedKernels fused_kernels(int cluster); \
  }
MEMEFF_CUDA_ARCHITECTURES(MEMEFF_DECLARE)
#undef MEMEFF_DECLARE

/// Those of one row of the table.
inline FusedKernels fused_kernels(const Architecture& architecture, int cluster) {
#define MEMEFF_ROW(name) \
  if (&architecture == &name::architecture) return name::fused_kernels(cluster);
  MEMEFF_CUDA_ARCHITECTURES(MEMEFF_ROW)
#undef MEMEFF_ROW
  return {};  // no row: not reached
}

}  // namespace memeff::cuda
