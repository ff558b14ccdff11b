// Which kernels a problem runs on: plain C++, tested without a GPU.
#pragma once

#include <string>

#include "core/problem.h"

namespace memeff::cuda {

/// A family of kernels. The generic ones leave matrix products to torch (cuBLAS).
enum class Family { kGeneric, kSm80, kSm90 };

struct Selection {
  Family scores = Family::kGeneric;    // x W^T with statistics or gradients in its epilogue
  Family products = Family::kGeneric;  // grad_input and grad_weight from gradients of the logits

  /// Whether scores are kept in 16 bits (StoredScores) rather than as products of type A.
  bool stores_16_bits() const { return scores != Family::kGeneric; }
};

struct Gpu {
  int capability = 0;  // compute capability, 10 major + minor: 75, 80, 86, 89, 90, 100, 120
};

/// The families for the problem on that GPU. `forced` overrides the choice where the problem and
/// the GPU allow it: "" or "scores,products", each generic, sm80 or sm90 (the environment variable
/// MEMEFF_CUDA_KERNELS, for tests and benchmarks). A name that means nothing is reported in `error`.
Selection select_kernels(const Problem& problem, const Gpu& gpu, const std::string& forced,
                         std::string* error);

/// "scores,products", as in `forced`.
std::string name_of(const Selection& selection);

}  // namespace memeff::cuda
