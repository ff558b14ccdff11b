// Schemas of the operators. Python adds fake kernels to them (memeff/ops.py), autograd.h
// their derivatives.
//
// They are functional. Gradients of the forward operator are those of the reduced loss with upstream
// gradient 1; outputs that are not wanted are empty tensors of shape (0,).
#pragma once

#include <torch/library.h>

#include <string>

#include "bindings/arguments.h"

namespace memeff {

inline void define_operators(torch::Library& m) {
  const auto define = [&](const char* name, Operators op, const char* results) {
    m.def((name + schema_of(op) + " -> " + results).c_str());
  };
  const char* gradients = "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  define("linear_cross_entropy_forward", kLossForward,
         "(Tensor loss, Tensor lse, Tensor statistics, Tensor argmax, Tensor grad_input, "
         "Tensor grad_weight, Tensor grad_bias)");
  define("linear_cross_entropy_backward", kLossBackward, gradients);
  define("linear_token_statistics_forward", kStatisticsForward,
         "(Tensor logprob, Tensor lse, Tensor entropy, Tensor logit_sum, Tensor max_logit, "
         "Tensor argmax, Tensor top_logprobs, Tensor top_ids)");
  define("linear_token_statistics_backward", kStatisticsBackward, gradients);
  // Gradients of a sum of per-token losses, in the forward pass: differentiate_chunk (implemented in
  // Python, memeff/fused_loss.py) is called with the statistics of one chunk of tokens after another and
  // returns their upstream gradients. `handle` says whose chunk it is.
  define("linear_loss_gradients", kCustomLoss, gradients);
  m.def(
      "differentiate_chunk(int handle, int begin, Tensor logprob, Tensor lse, Tensor entropy, "
      "Tensor logit_sum, Tensor max_logit) -> Tensor[]");
  m.def("scale_gradient(Tensor gradient, Tensor scale) -> Tensor");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor scale) -> ()");
}

}  // namespace memeff
