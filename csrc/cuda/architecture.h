// The seam between the project and the kernels of one GPU architecture: plain C++, tested without a
// GPU. A new architecture is
//
//   csrc/cuda/NAME/            architecture.cpp, fused_kernels.cpp and its kernels
//   a row of the table below   nothing else in csrc knows its name
//   buildtools/sources.json    what compiles the folder, for which GPUs
//
// and its tests and tools, which CONTRIBUTING.md lists.
#pragma once

#include <cstddef>
#include <string>

#include "core/problem.h"

namespace memeff::cuda {

struct Gpu {
  int capability = 0;       // compute capability, 10 major + minor: 75, 80, 86, 89, 90, 100, 120
  std::string name{};       // as the CUDA runtime has it; "" where it is unknown
  int multiprocessors = 0;  // 0 where it is unknown
};

/// One form in which an architecture has its kernels.
struct Variant {
  const char* suffix;  // after the architecture's name: "", "x2", "rs"
  int cluster;         // thread blocks that load the second operand together
  bool reads_scores;   // gradient products read kept scores and make gradients of them on the way
};

inline constexpr Variant kPlainVariant{"", 1, false};

/// A row of the table: all that planner and selection know of an architecture's kernels.
struct Architecture {
  const char* name;  // of its folder, too
  bool (*can_run)(const Problem& problem, const Gpu& gpu);
  /// Scores are computed with their epilogue in one kernel and kept in 16 bits (StoredScores), and
  /// gradient products are handwritten. Else both are cuBLAS's, between elementwise kernels.
  bool fused = false;
  /// Speed of handwritten gradient products, as a part of cuBLAS's on a GPU of this compute
  /// capability: an assumption, until that GPU has measured it.
  double (*relative_speed)(int capability) = nullptr;
  bool overlaps_launches = false;  // of gradient products: ProductOutput::overlaps_previous
  bool overlaps_epilogue = false;  // gradient products move results while they multiply
  const Variant* variants = &kPlainVariant;  // the first is the default
  size_t variant_count = 1;
};

/// The table. Rows that can run everywhere come first; of those that can run a problem the last is
/// the default. ROW(name) stands for name::architecture (name/architecture.cpp, plain C++) and
/// name::fused_kernels (name/fused_kernels.cpp; fused_kernels.h).
#define MEMEFF_CUDA_ARCHITECTURES(ROW) \
  ROW(generic)                         \
  ROW(sm80)                            \
  ROW(sm90)

#define MEMEFF_DECLARE(name)              \
  namespace name {                        \
  extern const Architecture architecture; \
  }
MEMEFF_CUDA_ARCHITECTURES(MEMEFF_DECLARE)
#undef MEMEFF_DECLARE

/// What any fused architecture asks of a problem. Class probabilities are as large as the logits, so
/// reading those once more is no matter. None has a temperature per token. With a soft cap and label
/// smoothing (or the gradient of a sum of logits) together the gradient needs the score itself,
/// which exp(z - max) does not give where it underflows.
inline bool suits_fused_kernels(const Problem& p) {
  return is_16_bit(p.dtype) && p.features > 0 && p.probabilities == nullptr &&
         !(p.softcap > 0 && reaches_all_classes(p)) && !has_temperatures(p);
}

}  // namespace memeff::cuda
