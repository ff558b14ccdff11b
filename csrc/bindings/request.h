// Names of options and dtypes as Python spells them, for the operators and for memeff.plan.
#pragma once

#include <stdexcept>
#include <string>

#include "core/plan.h"
#include "core/problem.h"

namespace memeff {

inline Reduction parse_reduction(const std::string& name) {
  if (name == "none") return Reduction::kNone;
  if (name == "sum") return Reduction::kSum;
  if (name == "mean") return Reduction::kMean;
  throw std::invalid_argument("reduction='" + name + "': expected 'mean', 'sum' or 'none'");
}

inline GradAccumulation parse_accumulation(const std::string& name) {
  if (name == "auto") return GradAccumulation::kAuto;
  if (name == "float32") return GradAccumulation::kFloat32;
  throw std::invalid_argument("grad_accumulation='" + name + "': expected 'auto' or 'float32'");
}

/// Whether the forward op computes gradients: only when the loss is a scalar, whose upstream gradient
/// is a common factor, and not in fp16, where the scaled gradients could underflow before that factor
/// (the loss scale of mixed precision training) is applied.
inline bool gradient_in_forward(Reduction reduction, DType dtype) {
  return reduction != Reduction::kNone && dtype != DType::kFloat16;
}

}  // namespace memeff
