// One call of an operator: its tensors checked and described as a Problem, its results allocated.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/device.h"
#include "bindings/vocab_parallel.h"
#include "core/plan.h"
#include "core/problem.h"

namespace memeff {

DType dtype_of(const at::Tensor& tensor, const char* name);

/// A problem with the tensors that own what it points to.
class Call {
 public:
  /// A call without target, or with several class indices per token, [N, K], is for token statistics.
  /// Refers to the arguments, which must outlive it.
  Call(const Device& device, const Arguments& arguments);

  const Problem& problem() const { return problem_; }

  void allocate_statistics();
  /// For the backward operator: what the forward one returned, and the upstream gradient.
  void use_statistics();
  void allocate_gradients(bool wanted);

  void run(bool statistics_known);
  /// A budget that this op or the later backward op could not keep is refused before anything is computed.
  void check_budget() const;

  at::Tensor loss, lse, statistics, argmax, grad_input, grad_weight, grad_bias;

 protected:
  void use_lse();
  /// Statistics have the accumulation type, and are on the input's device.
  at::TensorOptions accumulation_options() const;
  /// The numbers of a tensor of that shape, which `owner` keeps; null if there is none.
  const double* as_double(const OptionalTensor& tensor, at::IntArrayRef shape, const char* name,
                          at::Tensor* owner) const;
  /// `backward`: what the later op may turn out to compute.
  void check_budget(const std::vector<Problem>& backward) const;
  /// For all gradients that are asked for.
  PlanRequest plan_request(bool statistics_known) const;

  const Device& device_;
  const Arguments& arguments_;
  Problem problem_;
  at::Tensor input_, weight_, target_, bias_;

 private:
  /// Fills the problem from the arguments.
  void describe();
  void check_shapes() const;
  void set_target();
  void check_target_values() const;

  std::unique_ptr<RankCall> ranks_;  // null unless ranks share the vocabulary
  at::Tensor class_weight_, token_weight_, num_items_, grad_loss_;
};

}  // namespace memeff
