// The arguments of the operators, and the one table that their schemas and the reading of them come from.
//
// Tensors are positional, options keyword-only: nobody counts positions. To add an option: a field in
// ProblemOptions or PlanOptions (or here, if only the operators know it), and a row of the table.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "core/plan.h"
#include "core/problem.h"

namespace memeff {

using OptionalTensor = std::optional<at::Tensor>;

/// Operators that have arguments in common, as a set of bits.
enum Operators : unsigned {
  kLossForward = 1,
  kLossBackward = 2,
  kStatisticsForward = 4,
  kStatisticsBackward = 8,
  kCustomLoss = 16,  // linear_loss_gradients
};

struct Arguments : ProblemOptions, PlanOptions {
  // The backward operators': upstream gradients, and what the forward ones returned.
  at::Tensor grad_loss, lse, known_entropy;
  OptionalTensor grad_logprob, grad_lse, grad_entropy, grad_logit_sum;

  at::Tensor input, linear_weight;
  OptionalTensor target, linear_bias, weight, token_weight, num_items;

  // Token statistics': see TokenStatistics.
  bool skip_ignored = false, entropy = false, logit_sum = false, argmax = false;
  int64_t top_k = 0;

  int64_t handle = 0;  // of linear_loss_gradients: whose call it is
};

/// "(Tensor input, ..., *, str reduction, ...)", the arguments in the schema of an operator.
std::string schema_of(Operators op);
/// Takes the arguments of that operator off the stack.
Arguments take_arguments(Operators op, torch::jit::Stack* stack);
/// Sets one by name, for callers without an operator. An unknown name is an error.
void set_argument(Arguments* arguments, std::string_view name, const c10::IValue& value);

/// Whether the forward op computes gradients: only when the loss is a scalar, whose upstream gradient
/// is a common factor, and not in fp16, where the scaled gradients could underflow before that factor
/// (the loss scale of mixed precision training) is applied.
inline bool gradient_in_forward(Reduction reduction, DType dtype) {
  return reduction != Reduction::kNone && dtype != DType::kFloat16;
}

}  // namespace memeff
