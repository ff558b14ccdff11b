// The operators, for any device: what each does with a Call. csrc/bindings/*_device.cpp register them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "bindings/call.h"
#include "bindings/request.h"

namespace memeff {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline Options parse_options(c10::string_view reduction, int64_t ignore_index,
                             double label_smoothing, double softcap, double logit_scale,
                             double z_loss, bool input_grad, bool weight_grad, bool bias_grad,
                             int64_t memory_budget, int64_t chunk_size,
                             c10::string_view accumulation, double skip_mass) {
  return {parse_reduction(std::string(reduction)),
          ignore_index,
          label_smoothing,
          softcap,
          logit_scale,
          z_loss,
          input_grad,
          weight_grad,
          bias_grad,
          memory_budget,
          chunk_size,
          parse_accumulation(std::string(accumulation)),
          skip_mass};
}

template <class D>
ForwardResult forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                      const OptionalTensor& bias, const OptionalTensor& class_weight,
                      const OptionalTensor& token_weight, const OptionalTensor& num_items,
                      c10::string_view reduction, int64_t ignore_index, double label_smoothing,
                      double softcap, double logit_scale, double z_loss, bool input_grad,
                      bool weight_grad, bool bias_grad, bool statistics, int64_t memory_budget,
                      int64_t chunk_size, c10::string_view accumulation, double skip_mass) {
  const Options options = parse_options(reduction, ignore_index, label_smoothing, softcap,
                                        logit_scale, z_loss, input_grad, weight_grad, bias_grad,
                                        memory_budget, chunk_size, accumulation, skip_mass);
  Call call(D::get(), input, weight, target, bias, class_weight, token_weight, num_items, options);
  TORCH_CHECK(call.problem().targets == 1, "target has shape ", target.sizes(), ": expected [",
              call.problem().tokens, "], one class index per token");
  call.allocate_statistics(statistics);
  const bool in_forward = gradient_in_forward(options.reduction, call.problem().dtype);
  if (!in_forward) call.check_backward_budget();
  call.allocate_gradients(in_forward);
  call.run(false);
  return {call.loss,       call.lse,         call.statistics, call.argmax,
          call.grad_input, call.grad_weight, call.grad_bias};
}

template <class D>
Gradients backward(const at::Tensor& grad_loss, const at::Tensor& lse, const at::Tensor& input,
                   const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
                   const OptionalTensor& class_weight, const OptionalTensor& token_weight,
                   const OptionalTensor& num_items, c10::string_view reduction,
                   int64_t ignore_index, double label_smoothing, double softcap, double logit_scale,
                   double z_loss, bool input_grad, bool weight_grad, bool bias_grad,
                   int64_t memory_budget, int64_t chunk_size, c10::string_view accumulation,
                   double skip_mass) {
  const Options options = parse_options(reduction, ignore_index, label_smoothing, softcap,
                                        logit_scale, z_loss, input_grad, weight_grad, bias_grad,
                                        memory_budget, chunk_size, accumulation, skip_mass);
  Call call(D::get(), input, weight, target, bias, class_weight, token_weight, num_items, options);
  TORCH_CHECK(call.problem().targets == 1, "target has shape ", target.sizes(), ": expected [",
              call.problem().tokens, "], one class index per token");
  call.use_statistics(lse, grad_loss);
  call.allocate_gradients(true);
  call.run(true);
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

template <class D>
at::Tensor scale_gradient(const at::Tensor& gradient, const at::Tensor& scale) {
  const at::Tensor source = gradient.contiguous();
  at::Tensor result = at::empty(source.sizes(), source.options());
  D::get().scale(source, scale, result);
  return result;
}

template <class D>
void scale_gradient_in_place(at::Tensor& gradient, const at::Tensor& scale) {
  TORCH_CHECK(gradient.is_contiguous(), "gradient has strides ", gradient.strides(),
              ": expected a contiguous tensor");
  D::get().scale(gradient, scale, gradient);
}

/// Registers the operators with the device that D::get() returns.
template <class D>
void implement_operators(torch::Library& m) {
  m.impl("linear_cross_entropy_forward", &forward<D>);
  m.impl("linear_cross_entropy_backward", &backward<D>);
  m.impl("scale_gradient", &scale_gradient<D>);
  m.impl("scale_gradient_", &scale_gradient_in_place<D>);
}

}  // namespace memeff
