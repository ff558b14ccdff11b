// Schemas of the operators. Python adds fake kernels and autograd to them (memeff/ops.py).
//
// They are functional and positional. Gradients of the forward operator are those of the reduced loss
// with upstream gradient 1; outputs that are not wanted are empty tensors of shape (0,).
#pragma once

#include <torch/library.h>

namespace memeff {

inline void define_operators(torch::Library& m) {
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor target, "
      "Tensor? linear_bias, Tensor? weight, Tensor? token_weight, Tensor? num_items, str "
      "reduction, "
      "int ignore_index, float label_smoothing, float softcap, float logit_scale, float z_loss, "
      "bool input_grad, bool weight_grad, bool bias_grad, bool statistics, SymInt memory_budget, "
      "SymInt chunk_size, str grad_accumulation, float skip_mass) -> "
      "(Tensor loss, Tensor lse, Tensor statistics, Tensor argmax, Tensor grad_input, "
      "Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor lse, Tensor input, Tensor "
      "linear_weight, "
      "Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? token_weight, Tensor? "
      "num_items, "
      "str reduction, int ignore_index, float label_smoothing, float softcap, float logit_scale, "
      "float z_loss, bool input_grad, bool weight_grad, bool bias_grad, SymInt memory_budget, "
      "SymInt chunk_size, str grad_accumulation, float skip_mass) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "linear_token_statistics_forward(Tensor input, Tensor linear_weight, Tensor? target, "
      "Tensor? linear_bias, int ignore_index, float softcap, float logit_scale, bool skip_ignored, "
      "bool entropy, bool argmax, int top_k, bool input_grad, bool weight_grad, bool bias_grad, "
      "SymInt memory_budget, SymInt chunk_size) -> (Tensor logprob, Tensor lse, Tensor entropy, "
      "Tensor max_logit, Tensor argmax, Tensor top_logprobs, Tensor top_ids)");
  m.def(
      "linear_token_statistics_backward(Tensor? grad_logprob, Tensor? grad_lse, Tensor? "
      "grad_entropy, Tensor lse, Tensor entropy, Tensor input, Tensor linear_weight, Tensor? "
      "target, Tensor? linear_bias, int ignore_index, float softcap, float logit_scale, "
      "bool input_grad, bool weight_grad, bool bias_grad, SymInt memory_budget, SymInt chunk_size) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // Gradients of a sum of per-token losses, in the forward pass: differentiate_chunk (implemented in
  // Python, memeff/fused_loss.py) is called with the statistics of one chunk of tokens after another and
  // returns their upstream gradients. `handle` says whose chunk it is.
  m.def(
      "linear_loss_gradients(int handle, Tensor input, Tensor linear_weight, Tensor? target, "
      "Tensor? linear_bias, int ignore_index, float softcap, float logit_scale, bool entropy, "
      "bool input_grad, bool weight_grad, bool bias_grad, SymInt memory_budget, SymInt chunk_size) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "differentiate_chunk(int handle, int begin, Tensor logprob, Tensor lse, Tensor entropy, "
      "Tensor max_logit) -> Tensor[]");
  m.def("scale_gradient(Tensor gradient, Tensor scale) -> Tensor");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor scale) -> ()");
}

}  // namespace memeff
