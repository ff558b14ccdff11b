// How the sums of one chunk of tokens enter a gradient that several chunks contribute to.
#pragma once

namespace memeff {

enum class WeightUpdate {
  kWrite,       // gradient = sum
  kAccumulate,  // gradient += sum, of gradients in fp32 and fp64, which are their own sums
  // The sum is split between the bf16 gradient and the workspace, as the plan's accumulation says:
  // float32: upper and lower halves; compact: 16-bit codes and exponents of blocks.
  kSplitFirst,
  kSplitNext,
  kSplitLast,  // ... and rounded at last
};

/// The update of one of several terms that add up in split sums.
constexpr WeightUpdate split_update(bool first, bool last) {
  return first  ? WeightUpdate::kSplitFirst
         : last ? WeightUpdate::kSplitLast
                : WeightUpdate::kSplitNext;
}

/// Whether it adds to what is there, and whether it makes the gradient final.
constexpr bool reads_gradient(WeightUpdate update) {
  return update != WeightUpdate::kWrite && update != WeightUpdate::kSplitFirst;
}
constexpr bool is_final(WeightUpdate update) {
  return update != WeightUpdate::kSplitFirst && update != WeightUpdate::kSplitNext;
}

}  // namespace memeff
