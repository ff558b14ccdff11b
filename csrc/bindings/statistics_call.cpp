#include "bindings/statistics_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace memeff {

StatisticsCall::StatisticsCall(const Device& device, const Arguments& arguments)
    : Call(device, arguments) {
  TORCH_CHECK(problem_.probabilities == nullptr, "target has dtype ", target_.scalar_type(),
              ": expected class indices");
  problem_.reduction = Reduction::kNone;
  // linear_loss has no loss of tokens without a target.
  statistics_.skip_ignored =
      arguments.op == kCustomLoss ? target_.defined() : arguments.skip_ignored;
  use_temperature();
  problem_.token_statistics = &statistics_;
}

void StatisticsCall::use_temperature() {
  if (!arguments_.temperature) return;
  const int64_t n = problem_.tokens, targets = problem_.targets;
  const at::Tensor temperature = arguments_.temperature->to(at::kDouble).contiguous();
  TORCH_CHECK(temperature.dim() == 1 && temperature.size(0) == n, "temperature has shape ",
              temperature.sizes(), ": expected [", n, "]");
  inverse_temperature_ = temperature.reciprocal();
  statistics_.inverse_temperature = inverse_temperature_.const_data_ptr<double>();
  if (!device_.values_are_at_hand()) return;
  const double* values = temperature.const_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* classes = problem_.target + i * targets;
    const bool ignored = statistics_.skip_ignored &&
                         std::all_of(classes, classes + targets,
                                     [&](int64_t y) { return y == problem_.ignore_index; });
    TORCH_CHECK_VALUE(ignored || (values[i] > 0 && std::isfinite(values[i])), "temperature[", i,
                      "] is ", values[i], ", expected a finite value > 0");
  }
}

void StatisticsCall::allocate_outputs() {
  const bool with_entropy = arguments_.entropy, with_argmax = arguments_.argmax;
  const int64_t top = arguments_.top_k;
  const int64_t n = problem_.tokens;
  const int64_t vocab = total_vocab(problem_);
  TORCH_CHECK(
      vocab > 0 || problem_.shard == nullptr,
      "linear_weight has no classes on any rank, expected at least one class: statistics of no "
      "logits do not exist");
  TORCH_CHECK_VALUE(top >= 0 && top <= vocab, "top_k=", top,
                    ": expected a number of classes in [0, ", vocab, "]");
  const at::TensorOptions floating = accumulation_options();
  const auto indices = input_.options().dtype(at::kLong);
  lse = at::empty({n}, floating.dtype(at::kDouble));
  problem_.lse = lse.mutable_data_ptr<double>();
  logprob = at::empty({n, problem_.targets}, floating);
  if (problem_.targets > 0) statistics_.logprob = logprob.mutable_data_ptr();
  max_logit = at::empty({n}, floating);
  statistics_.max_logit = max_logit.mutable_data_ptr();
  entropy = at::empty({with_entropy ? n : 0}, floating.dtype(at::kDouble));
  if (with_entropy) statistics_.entropy = entropy.mutable_data_ptr<double>();
  logit_sum = at::empty({arguments_.logit_sum ? n : 0}, floating);
  if (arguments_.logit_sum) statistics_.logit_sum = logit_sum.mutable_data_ptr();
  argmax = at::empty({with_argmax ? n : 0}, indices);
  if (with_argmax) statistics_.argmax = argmax.mutable_data_ptr<int64_t>();
  // Zeros: tokens that take no part get none of them.
  top_logprobs = at::zeros({n, top}, floating);
  top_ids = at::zeros({n, top}, indices);
  statistics_.top = top;
  statistics_.top_logprobs = top_logprobs.mutable_data_ptr();
  statistics_.top_ids = top_ids.mutable_data_ptr<int64_t>();
}

void StatisticsCall::use_gradients() {
  const int64_t n = problem_.tokens;
  use_lse();
  statistics_.grad_logprob =
      as_double(arguments_.grad_logprob, {n, problem_.targets}, "grad_logprob", &grad_logprob_);
  statistics_.grad_lse = as_double(arguments_.grad_lse, {n}, "grad_lse", &grad_lse_);
  statistics_.grad_entropy =
      as_double(arguments_.grad_entropy, {n}, "grad_entropy", &grad_entropy_);
  statistics_.grad_logit_sum =
      as_double(arguments_.grad_logit_sum, {n}, "grad_logit_sum", &grad_logit_sum_);
  if (statistics_.grad_entropy != nullptr)
    statistics_.known_entropy = as_double(arguments_.known_entropy, {n}, "entropy", &entropy);
}

void StatisticsCall::differentiate_in_forward(Differentiate differentiate) {
  differentiate_ = std::move(differentiate);
  const auto options = lse.options();
  const int64_t n = problem_.tokens;
  grad_logprob_ = at::empty({n, problem_.targets}, options);
  grad_lse_ = at::empty({n}, options);
  statistics_.grad_logprob = grad_logprob_.const_data_ptr<double>();
  statistics_.grad_lse = grad_lse_.const_data_ptr<double>();
  if (statistics_.entropy != nullptr) {
    grad_entropy_ = at::empty({n}, options);
    statistics_.grad_entropy = grad_entropy_.const_data_ptr<double>();
    statistics_.known_entropy = statistics_.entropy;
  }
  if (statistics_.logit_sum != nullptr) {
    grad_logit_sum_ = at::empty({n}, options);
    statistics_.grad_logit_sum = grad_logit_sum_.const_data_ptr<double>();
  }
  statistics_.context = this;
  statistics_.differentiate = [](void* context, int64_t begin, int64_t end) {
    static_cast<StatisticsCall*>(context)->differentiate_rows(begin, end);
  };
}

void StatisticsCall::differentiate_rows(int64_t begin, int64_t end) {
  const auto rows = [&](const at::Tensor& tensor) {
    return tensor.size(0) == problem_.tokens ? tensor.slice(0, begin, end) : tensor;
  };
  const std::vector<at::Tensor> gradients = differentiate_(
      begin, rows(logprob), rows(lse), rows(entropy), rows(logit_sum), rows(max_logit));
  std::vector<const at::Tensor*> targets = {&grad_logprob_, &grad_lse_};
  if (statistics_.entropy != nullptr) targets.push_back(&grad_entropy_);
  if (statistics_.logit_sum != nullptr) targets.push_back(&grad_logit_sum_);
  for (size_t i = 0; i < gradients.size(); ++i) {
    targets[i]->slice(0, begin, end).copy_(gradients[i]);
  }
}

void StatisticsCall::check_budget() const {
  // Other kernels may compute the gradients if some flow through the entropy or the sum of the logits,
  // and need more or less.
  TokenStatistics plain = statistics_;
  plain.entropy = nullptr;
  plain.logit_sum = nullptr;
  plain.argmax = nullptr;
  plain.top = 0;
  std::vector<TokenStatistics> later = {plain};
  if (statistics_.entropy != nullptr) {
    later.push_back(plain);
    later.back().grad_entropy = problem_.lse;
  }
  if (statistics_.logit_sum != nullptr) {
    const std::vector<TokenStatistics> without = later;
    for (TokenStatistics with : without) {
      with.grad_logit_sum = problem_.lse;
      later.push_back(with);
    }
  }
  std::vector<Problem> backward(later.size(), problem_);
  for (size_t i = 0; i < later.size(); ++i) backward[i].token_statistics = &later[i];
  Call::check_budget(backward);
}

}  // namespace memeff
