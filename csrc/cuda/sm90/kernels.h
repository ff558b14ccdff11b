// Score kernels and gradient products for sm_90a: wgmma, TMA. kCluster, 1 or 2: thread blocks that load
// the second operand together.
#pragma once

#include "cuda/fused_kernels.h"

namespace memeff::cuda::sm90 {

template <int kCluster>
Status linear_statistics(const LinearStatistics& call, void* stream);
template <int kCluster>
Status linear_gradient(const LinearGradient& call, void* stream);
/// Products that skip tiles run without clusters: which tiles count differs between the two blocks.
template <int kCluster>
Status grad_input_product(const GradientProduct& call, void* stream);
template <int kCluster>
Status grad_weight_product(const GradientProduct& call, void* stream);
Status grad_input_from_scores(const GradientProduct& call, const ScoreGradient& scores,
                              void* stream);
Status grad_weight_from_scores(const GradientProduct& call, const ScoreGradient& scores,
                               void* stream);

/// Whether these kernels can work on the operands: TMA wants 16-bit rows that start at multiples of 16
/// bytes and do not overlap. `block` is what is stored, scores or a gradient [classes, tokens], or
/// null. Where rows of what is stored end inside 16 bytes, the rest of these is overwritten, too.
bool accepts(const LinearOperands& operands, const void* block, int64_t block_stride);
bool accepts(const GradientOperands& operands, const ProductOutput& output);
/// Products from scores know the softmax's term and index targets: no soft cap, no `entropy` or
/// `weighted`, no class probabilities.
bool accepts(const ScoreGradient& scores);

}  // namespace memeff::cuda::sm90
