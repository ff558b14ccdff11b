// What the sm_90a family can work on: the demands of TMA, which moves all operands and results.
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
  const SplitSums& split = output.split;
  const int64_t columns = operands.features;
  // The exponents of a row's 256 columns are read as a word.
  const bool words =
      reinterpret_cast<uintptr_t>(split.exponents) % 4 == 0 && split.exponents_stride % 4 == 0;
  const bool gradient = output.sums == nullptr &&
                        is_tensor(output.gradient, output.gradient_stride, 2, columns) && words &&
                        (split.remainder == nullptr ||
                         is_tensor(split.remainder, split.remainder_stride, 2, columns));
  return is_16_bit(operands.dtype) && columns > 0 &&
         is_tensor(operands.gradient, operands.gradient_stride, 2) &&
         is_tensor(operands.other, operands.other_stride, 2, columns) &&
         (gradient || is_tensor(output.sums, output.sums_stride, 4, columns));
}

bool accepts(const ScoreGradient& scores) {
  return scores.terms.softcap == 0 && scores.coefficients.entropy == nullptr &&
         scores.coefficients.weighted == nullptr && scores.targets.probabilities == nullptr;
}

}  // namespace memeff::cuda::sm90
