// The token statistics operators, for any device; as ops.h.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "bindings/ops.h"
#include "bindings/statistics_call.h"

namespace memeff {

using StatisticsResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Those of linear_cross_entropy that token statistics have.
inline Options statistics_options(int64_t ignore_index, double softcap, double logit_scale,
                                  bool input_grad, bool weight_grad, bool bias_grad,
                                  int64_t memory_budget, int64_t chunk_size) {
  return parse_options("none", ignore_index, 0, softcap, logit_scale, 0, input_grad, weight_grad,
                       bias_grad, memory_budget, chunk_size, "auto", 0);
}

template <class D>
StatisticsResult token_statistics_forward(const at::Tensor& input, const at::Tensor& weight,
                                          const OptionalTensor& target, const OptionalTensor& bias,
                                          int64_t ignore_index, double softcap, double logit_scale,
                                          bool skip_ignored, bool entropy, bool argmax,
                                          int64_t top_k, bool input_grad, bool weight_grad,
                                          bool bias_grad, int64_t memory_budget,
                                          int64_t chunk_size) {
  StatisticsCall call(D::get(), input, weight, target, bias,
                      statistics_options(ignore_index, softcap, logit_scale, input_grad,
                                         weight_grad, bias_grad, memory_budget, chunk_size));
  call.allocate_outputs(skip_ignored, entropy, argmax, top_k);
  call.check_backward_budget();
  call.run(false);
  return {call.logprob, call.lse,          call.entropy, call.max_logit,
          call.argmax,  call.top_logprobs, call.top_ids};
}

template <class D>
Gradients token_statistics_backward(
    const OptionalTensor& grad_logprob, const OptionalTensor& grad_lse,
    const OptionalTensor& grad_entropy, const at::Tensor& lse, const at::Tensor& entropy,
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& target,
    const OptionalTensor& bias, int64_t ignore_index, double softcap, double logit_scale,
    bool input_grad, bool weight_grad, bool bias_grad, int64_t memory_budget, int64_t chunk_size) {
  StatisticsCall call(D::get(), input, weight, target, bias,
                      statistics_options(ignore_index, softcap, logit_scale, input_grad,
                                         weight_grad, bias_grad, memory_budget, chunk_size));
  call.use_gradients(lse, entropy, grad_logprob, grad_lse, grad_entropy);
  call.allocate_gradients(true);
  call.run(true);
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

template <class D>
Gradients linear_loss_gradients(int64_t handle, const at::Tensor& input, const at::Tensor& weight,
                                const OptionalTensor& target, const OptionalTensor& bias,
                                int64_t ignore_index, double softcap, double logit_scale,
                                bool entropy, bool input_grad, bool weight_grad, bool bias_grad,
                                int64_t memory_budget, int64_t chunk_size) {
  StatisticsCall call(D::get(), input, weight, target, bias,
                      statistics_options(ignore_index, softcap, logit_scale, input_grad,
                                         weight_grad, bias_grad, memory_budget, chunk_size));
  call.allocate_outputs(false, entropy, false, 0);
  // The operator is implemented in Python; the dispatcher takes care of the interpreter's lock.
  using Chunk = std::vector<at::Tensor>(int64_t, int64_t, const at::Tensor&, const at::Tensor&,
                                        const at::Tensor&, const at::Tensor&);
  static const auto chunk = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("memeff::differentiate_chunk", "")
                                .typed<Chunk>();
  call.differentiate_in_forward([handle](int64_t begin, const at::Tensor& logprob,
                                         const at::Tensor& lse, const at::Tensor& row_entropy,
                                         const at::Tensor& max_logit) {
    return chunk.call(handle, begin, logprob, lse, row_entropy, max_logit);
  });
  call.allocate_gradients(true);
  call.run(false);
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

template <class D>
void implement_statistics_operators(torch::Library& m) {
  m.impl("linear_token_statistics_forward", &token_statistics_forward<D>);
  m.impl("linear_token_statistics_backward", &token_statistics_backward<D>);
  m.impl("linear_loss_gradients", &linear_loss_gradients<D>);
}

}  // namespace memeff
