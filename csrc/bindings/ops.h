// The operators, for any device: what each does with its arguments. csrc/bindings/*_device.cpp register
// them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <vector>

#include "bindings/arguments.h"
#include "bindings/device.h"

namespace memeff {

/// An operator: its results in the order of the schema.
using Operator = std::vector<at::Tensor>(const Device& device, const Arguments& arguments);

Operator loss_forward, loss_backward, statistics_forward, statistics_backward, custom_loss;

/// As the dispatcher calls it, with the device that D::get() returns. The device of the tensors is current
/// before anything is planned, allocated or launched, whichever device the caller's is.
template <class D, Operators op, Operator run>
void boxed(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const Arguments arguments = take_arguments(op, stack);
  const c10::DeviceGuard guard(arguments.input.device());
  for (at::Tensor& result : run(D::get(), arguments)) stack->emplace_back(std::move(result));
}

template <class D>
at::Tensor scale_gradient(const at::Tensor& gradient, const at::Tensor& scale) {
  const c10::DeviceGuard guard(gradient.device());
  const at::Tensor source = gradient.contiguous();
  at::Tensor result = at::empty(source.sizes(), source.options());
  D::get().scale(source, scale, result);
  return result;
}

template <class D>
void scale_gradient_in_place(at::Tensor& gradient, const at::Tensor& scale) {
  TORCH_CHECK(gradient.is_contiguous(), "gradient has strides ", gradient.strides(),
              ": expected a contiguous tensor");
  const c10::DeviceGuard guard(gradient.device());
  D::get().scale(gradient, scale, gradient);
}

/// Registers the operators with the device that D::get() returns.
template <class D>
void implement_operators(torch::Library& m) {
  using torch::CppFunction;
  m.impl("linear_cross_entropy_forward",
         CppFunction::makeFromBoxedFunction<&boxed<D, kLossForward, loss_forward>>());
  m.impl("linear_cross_entropy_backward",
         CppFunction::makeFromBoxedFunction<&boxed<D, kLossBackward, loss_backward>>());
  m.impl("linear_token_statistics_forward",
         CppFunction::makeFromBoxedFunction<&boxed<D, kStatisticsForward, statistics_forward>>());
  m.impl("linear_token_statistics_backward",
         CppFunction::makeFromBoxedFunction<&boxed<D, kStatisticsBackward, statistics_backward>>());
  m.impl("linear_loss_gradients",
         CppFunction::makeFromBoxedFunction<&boxed<D, kCustomLoss, custom_loss>>());
  m.impl("scale_gradient", &scale_gradient<D>);
  m.impl("scale_gradient_", &scale_gradient_in_place<D>);
}

}  // namespace memeff
