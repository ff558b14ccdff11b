// The sm90 kernels: wgmma and TMA of sm_90a, which runs on compute capability 9.0 only. What they can
// work on are the demands of TMA, which moves all operands and results.
#include "cuda/sm90/kernels.h"

namespace memeff::cuda::sm90 {

namespace {

// Rows of `columns` elements, or more, that start at multiples of 16 bytes and do not overlap, as
// those of an expanded tensor do. No data: any.
bool suits_tma(const void* base, int64_t stride, int64_t element_bytes, int64_t columns = 1) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * element_bytes % 16 == 0 &&
         stride >= columns;
}

bool is_tensor(const void* base, int64_t stride, int64_t element_bytes, int64_t columns = 1) {
  return base != nullptr && suits_tma(base, stride, element_bytes, columns);
}

bool can_run(const Problem& p, const Gpu& gpu) {
  // Rows of gradients are adjacent.
  return gpu.capability == 90 && suits_fused_kernels(p) &&
         suits_tma(p.input, p.input_stride, 2, p.features) &&
         suits_tma(p.weight, p.weight_stride, 2, p.features) && suits_tma(nullptr, p.features, 2);
}

constexpr Variant kVariants[] = {kPlainVariant, {"x2", 2, false}, {"rs", 1, true}};

}  // namespace

const Architecture architecture = {
    "sm90",
    &can_run,
    /*fused=*/true,
    /*relative_speed=*/[](int) { return 0.88; },  // 660 of 750 TFLOP/s (docs/kernels-sm90.md)
    /*overlaps_launches=*/true,
    /*overlaps_epilogue=*/true,
    kVariants,
    3,
};

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
