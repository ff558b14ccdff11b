// What the sm_90a family can work on: the demands of TMA, which moves all operands and most
// results.
#include "cuda/launch.h"

namespace memeff::cuda::sm90 {

namespace {

// Rows of `columns` elements, or more.
bool is_tensor(const void* base, int64_t stride, int64_t element_bytes, int64_t columns = 1) {
  return base != nullptr && reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
         stride * element_bytes % 16 == 0 && stride >= columns;
}

}  // namespace

bool accepts(const LinearOperands& operands, const void* block, int64_t block_stride) {
  return is_16_bit(operands.dtype) && operands.features > 0 &&
         is_tensor(operands.input, operands.input_stride, 2, operands.features) &&
         is_tensor(operands.weight, operands.weight_stride, 2, operands.features) &&
         (block == nullptr || is_tensor(block, block_stride, 2));
}

bool accepts(const GradientOperands& operands, const ProductOutput& output) {
  // Split sums are read and written in pairs.
  const bool pairs = reinterpret_cast<uintptr_t>(output.split.remainder) % 4 == 0 &&
                     output.split.remainder_stride % 2 == 0 && operands.features % 2 == 0;
  return is_16_bit(operands.dtype) && operands.features > 0 &&
         is_tensor(operands.gradient, operands.gradient_stride, 2) &&
         is_tensor(operands.other, operands.other_stride, 2, operands.features) &&
         (output.sums != nullptr
              ? is_tensor(output.sums, output.sums_stride, 4, operands.features)
              : is_tensor(output.gradient, output.gradient_stride, 2, operands.features) && pairs);
}

bool accepts(const ScoreGradient& scores) {
  return scores.terms.softcap == 0 && scores.coefficients.entropy == nullptr &&
         scores.coefficients.weighted == nullptr && scores.targets.probabilities == nullptr;
}

}  // namespace memeff::cuda::sm90
