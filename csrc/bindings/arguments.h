// The arguments of the operators, and the one table that their schemas and the reading of them come from.
//
// Tensors are positional, options keyword-only: nobody counts positions. To add an option: a field in
// ProblemOptions or PlanOptions (or here, if only the operators know it), and a row of the table.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <array>
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

/// An argument in a few numbers, for the ranks of a sharded vocabulary to compare.
struct ArgumentDigest {
  int64_t kind = 0;  // what the numbers are: kNone, ...
  int64_t numbers[3] = {};
};
constexpr size_t kMostArguments = 48;
using ArgumentDigests = std::array<ArgumentDigest, kMostArguments>;

struct Arguments : ProblemOptions, PlanOptions {
  Operators op{};

  // The backward operators': upstream gradients, and what the forward ones returned.
  at::Tensor grad_loss, lse, known_entropy;
  OptionalTensor grad_logprob, grad_lse, grad_entropy, grad_logit_sum;

  at::Tensor input, linear_weight;
  OptionalTensor target, linear_bias, weight, token_weight, num_items;
  OptionalTensor scale;        // [] another factor of logit_scale, read before anything runs
  OptionalTensor temperature;  // [N] of token statistics

  // Token statistics': see TokenStatistics.
  bool skip_ignored = false, entropy = false, logit_sum = false, argmax = false;
  int64_t top_k = 0;

  // A vocabulary that ranks share: torch.distributed's name of their group ("": none), the first class
  // of this rank (-1: after those of the ranks before it), VocabShard::reduce_input_grad, and whether the
  // sums of grad_input are rounded before they are added up over the ranks.
  std::string vocab_group;
  int64_t vocab_start = -1;
  bool reduce_input_grad = true;
  bool reduce_in_bfloat16 = false;
  ArgumentDigests digests;  // of all arguments, where there is a group

  int64_t handle = 0;  // of linear_loss_gradients: whose call it is
};

/// "(Tensor input, ..., *, str reduction, ...)", the arguments in the schema of an operator.
std::string schema_of(Operators op);
/// Takes the arguments of that operator off the stack.
Arguments take_arguments(Operators op, torch::jit::Stack* stack);
/// Sets one by name, for callers without an operator. An unknown name is an error.
void set_argument(Arguments* arguments, std::string_view name, const c10::IValue& value);

/// What an error calls the operator.
const char* name_of(Operators op);
/// "name is X on rank 0 and Y on rank R" for the first argument of the operator that must be the same on
/// every rank and is not, or "".
std::string describe_difference(Operators op, const ArgumentDigests& first,
                                const ArgumentDigests& other, size_t rank);

/// Whether the forward op computes gradients: only when the loss is a scalar, whose upstream gradient
/// is a common factor, and not in fp16, where the scaled gradients could underflow before that factor
/// (the loss scale of mixed precision training) is applied.
inline bool gradient_in_forward(Reduction reduction, DType dtype) {
  return reduction != Reduction::kNone && dtype != DType::kFloat16;
}

}  // namespace memeff
