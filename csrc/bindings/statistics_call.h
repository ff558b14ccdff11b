// A call of the token statistics operators: see Call, and TokenStatistics in core/problem.h.
#pragma once

#include <functional>
#include <vector>

#include "bindings/call.h"

namespace memeff {

class StatisticsCall : public Call {
 public:
  StatisticsCall(const Device& device, const Arguments& arguments);

  /// Outputs of the forward operator; those that are not wanted are empty.
  void allocate_outputs();
  /// For the backward operator: what the forward one returned, and the upstream gradients.
  void use_gradients();
  void check_budget() const;
  /// Gradients in the forward pass. `differentiate` gets the first row and the statistics of a chunk, and
  /// returns upstream gradients of logprob, lse and, each if it was computed, entropy and logit_sum.
  using Differentiate = std::function<std::vector<at::Tensor>(
      int64_t begin, const at::Tensor& logprob, const at::Tensor& lse, const at::Tensor& entropy,
      const at::Tensor& logit_sum, const at::Tensor& max_logit)>;
  void differentiate_in_forward(Differentiate differentiate);

  at::Tensor logprob, entropy, logit_sum, max_logit, argmax, top_logprobs, top_ids;

 private:
  void use_temperature();
  void differentiate_rows(int64_t begin, int64_t end);

  TokenStatistics statistics_;
  Differentiate differentiate_;
  at::Tensor grad_logprob_, grad_lse_, grad_entropy_, grad_logit_sum_, inverse_temperature_;
};

}  // namespace memeff
