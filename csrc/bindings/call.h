// One call of an operator: its tensors checked and described as a Problem, its results allocated.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings/device.h"
#include "core/plan.h"
#include "core/problem.h"

namespace memeff {

using OptionalTensor = std::optional<at::Tensor>;

DType dtype_of(const at::Tensor& tensor, const char* name);

/// The options of a call, as the schema passes them.
struct Options {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing, softcap, logit_scale, z_loss;
  bool input_grad, weight_grad, bias_grad;
  int64_t memory_budget, chunk_size;
  GradAccumulation accumulation;
  double skip_mass;
};

/// A problem with the tensors that own what it points to.
class Call {
 public:
  /// `target` is undefined for a call without one; one with several class indices per token, [N, K], is
  /// only for token statistics.
  Call(const Device& device, const at::Tensor& input, const at::Tensor& weight,
       const at::Tensor& target, const OptionalTensor& bias, const OptionalTensor& class_weight,
       const OptionalTensor& token_weight, const OptionalTensor& num_items, const Options& options);

  const Problem& problem() const { return problem_; }

  void allocate_statistics(bool statistics);
  /// For the backward operator: what the forward one returned, and the upstream gradient.
  void use_statistics(const at::Tensor& known_lse, const at::Tensor& grad_loss);
  void allocate_gradients(bool wanted);

  void run(bool statistics_known);
  /// A budget that the later backward op could not keep is refused before anything is computed.
  void check_backward_budget() const;

  at::Tensor loss, lse, statistics, argmax, grad_input, grad_weight, grad_bias;

 protected:
  void use_lse(const at::Tensor& known);
  PlanRequest plan_request(bool statistics_known, bool input_grad, bool weight_grad,
                           bool bias_grad) const;

  const Device& device_;
  const Options options_;
  Problem problem_;
  at::Tensor input_, weight_, target_, bias_;

 private:
  void check_shapes(const OptionalTensor& bias) const;
  static const double* as_double(const OptionalTensor& tensor, int64_t size, const char* name,
                                 at::Tensor* owner);
  void set_target();
  void check_target_values() const;

  at::Tensor class_weight_, token_weight_, num_items_, grad_loss_;
};

}  // namespace memeff
