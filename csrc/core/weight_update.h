// How the sums of one chunk of tokens enter a gradient that several chunks contribute to.
#pragma once

namespace memeff {

enum class WeightUpdate {
  kWrite,       // gradient = sum
  kAddNative,   // gradient += sum, rounded to its dtype
  kSplitFirst,  // fp32 sum kept as (upper half in the bf16 gradient, lower half in the workspace)
  kSplitNext,
  kSplitLast,  // ... and rounded at last
};

}  // namespace memeff
