#include "bindings/call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <vector>

#include "core/planning.h"

namespace memeff {

DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    default:
      TORCH_CHECK(false, name, " has dtype ", tensor.scalar_type(),
                  ": expected bfloat16, float16, float32 or float64");
  }
}

namespace {

/// Where a tensor's data lies. In the shard of a rank that has no classes tensors without elements have
/// some address, too: null means that there is no such tensor.
template <class T>
T* address(T* data, bool sharded) {
  alignas(64) static char nothing[64];
  return data != nullptr || !sharded ? data : reinterpret_cast<T*>(nothing);
}

}  // namespace

Call::Call(const Device& device, const Arguments& arguments)
    : device_(device),
      arguments_(arguments),
      input_(arguments.input),
      weight_(arguments.linear_weight),
      target_(arguments.target.value_or(at::Tensor())) {
  if (arguments.vocab_group.empty()) {
    describe();
  } else {
    ranks_ = std::make_unique<RankCall>(arguments.vocab_group, input_.device());
    try {
      describe();
    } catch (const std::exception& error) {
      ranks_->report_failure(error);
      throw;
    }
    ranks_->agree(device_, arguments, problem_);
    problem_.shard = &ranks_->shard();
  }
  if (problem_.target != nullptr && device_.values_are_at_hand()) check_target_values();
}

void Call::describe() {
  const Arguments& arguments = arguments_;
  check_shapes();
  Problem& p = problem_;
  static_cast<ProblemOptions&>(p) = arguments;
  if (arguments.scale) {
    const double scale = arguments.scale->item().toDouble();
    TORCH_CHECK_VALUE(std::isfinite(scale) && scale != 0, "logit_scale is ", scale,
                      ", expected a finite value other than 0");
    p.logit_scale *= scale;
  }
  p.tokens = input_.size(0);
  p.features = input_.size(1);
  p.vocab = weight_.size(0);
  p.dtype = dtype_of(input_, "input");
  // Kernels take any distance between rows, but adjacent features.
  if (p.features > 1 && input_.stride(1) != 1) input_ = input_.contiguous();
  if (p.features > 1 && weight_.stride(1) != 1) weight_ = weight_.contiguous();
  p.input = input_.const_data_ptr();
  p.input_stride = input_.stride(0);
  p.weight = weight_.const_data_ptr();
  p.weight_stride = weight_.stride(0);
  if (arguments.linear_bias) {
    bias_ = arguments.linear_bias->contiguous();
    p.bias = address(bias_.const_data_ptr(), ranks_ != nullptr);
  }
  p.class_weight = as_double(arguments.weight, {p.vocab}, "weight", &class_weight_);
  p.token_weight = as_double(arguments.token_weight, {p.tokens}, "token_weight", &token_weight_);
  if (arguments.num_items) {
    num_items_ = arguments.num_items->to(at::kDouble);
    p.num_items = num_items_.const_data_ptr<double>();
    if (device_.values_are_at_hand()) {
      TORCH_CHECK_VALUE(*p.num_items > 0, "num_items=", *p.num_items,
                        ": expected a number greater than 0");
    }
  }
  set_target();
}

void Call::allocate_statistics() {
  const bool statistics = arguments_.statistics;
  const at::TensorOptions options = accumulation_options();
  const int64_t n = problem_.tokens;
  loss =
      arguments_.reduction == Reduction::kNone ? at::empty({n}, options) : at::empty({}, options);
  lse = at::empty({n}, options.dtype(at::kDouble));
  this->statistics = statistics ? at::zeros({4, n}, options) : at::empty({0}, options);
  argmax = at::empty({statistics ? n : 0}, options.dtype(at::kLong));
  problem_.loss = loss.mutable_data_ptr();
  problem_.lse = lse.mutable_data_ptr<double>();
  if (statistics) {
    problem_.statistics_out = this->statistics.mutable_data_ptr();
    problem_.argmax = argmax.mutable_data_ptr<int64_t>();
  }
}

void Call::use_lse() {
  problem_.lse = const_cast<double*>(as_double(arguments_.lse, {problem_.tokens}, "lse", &lse));
}

void Call::use_statistics() {
  use_lse();
  const at::Tensor& grad_loss = arguments_.grad_loss;
  const bool per_token = arguments_.reduction == Reduction::kNone;
  TORCH_CHECK(grad_loss.numel() == (per_token ? problem_.tokens : 1), "grad_loss has ",
              grad_loss.numel(), " elements: expected ", per_token ? problem_.tokens : 1);
  grad_loss_ = grad_loss.to(at::kDouble).contiguous();
  problem_.grad_loss = grad_loss_.const_data_ptr<double>();
}

void Call::allocate_gradients(bool wanted) {
  // Without tokens nothing is computed, so nothing else would write the zeros.
  const bool zeros = problem_.tokens == 0;
  const auto allocate = [&](bool want, const at::Tensor& like, void** data) {
    const std::vector<int64_t> sizes = want ? like.sizes().vec() : std::vector<int64_t>{0};
    at::Tensor gradient =
        zeros ? at::zeros(sizes, like.options()) : at::empty(sizes, like.options());
    if (want) *data = address(gradient.mutable_data_ptr(), ranks_ != nullptr);
    return gradient;
  };
  grad_input = allocate(wanted && arguments_.grad_input, input_, &problem_.grad_input);
  grad_weight = allocate(wanted && arguments_.grad_weight, weight_, &problem_.grad_weight);
  const bool bias = wanted && arguments_.grad_bias && bias_.defined();
  grad_bias = allocate(bias, bias ? bias_ : weight_, &problem_.grad_bias);
}

void Call::run(bool statistics_known) {
  PlanRequest request = plan_request(statistics_known);
  request.grad_input = problem_.grad_input != nullptr;
  request.grad_weight = problem_.grad_weight != nullptr;
  request.grad_bias = problem_.grad_bias != nullptr;
  if (statistics_known && !wants_gradient(request)) return;
  const std::string objection = device_.run(problem_, request, input_);
  TORCH_CHECK_VALUE(objection.empty(), objection);
}

void Call::check_budget(const std::vector<Problem>& backward) const {
  if (arguments_.memory_budget < 0) return;
  Objections objections;
  Plan plan;
  PlanRequest request = plan_request(false);
  request.grad_input = request.grad_weight = request.grad_bias = false;
  objections.add(device_.plan(problem_, request, &plan), plan);
  request = plan_request(true);
  if (wants_gradient(request)) {
    for (const Problem& problem : backward)
      objections.add(device_.plan(problem, request, &plan), plan);
  }
  TORCH_CHECK_VALUE(objections.worst().empty(), objections.worst());
}

void Call::check_budget() const {
  Problem backward = problem_;
  backward.statistics = false;
  check_budget({backward});
}

PlanRequest Call::plan_request(bool statistics_known) const {
  PlanRequest request = memeff::plan_request(problem_, arguments_);
  request.statistics_known = statistics_known;
  if (ranks_ != nullptr) ranks_->complete(&request);
  return request;
}

void Call::check_shapes() const {
  TORCH_CHECK(input_.dim() == 2, "input has ", input_.dim(), " dimensions: expected 2, [N, D]");
  TORCH_CHECK(weight_.dim() == 2, "linear_weight has ", weight_.dim(),
              " dimensions: expected 2, [V, D]");
  TORCH_CHECK(input_.size(1) == weight_.size(1), "input has ", input_.size(1),
              " features and linear_weight ", weight_.size(1), ": expected the same number");
  TORCH_CHECK(input_.scalar_type() == weight_.scalar_type(), "input has dtype ",
              input_.scalar_type(), " and linear_weight ", weight_.scalar_type(),
              ": expected the same");
  const OptionalTensor& bias = arguments_.linear_bias;
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight_.size(0), "linear_bias has shape ",
              bias->sizes(), ": expected [", weight_.size(0), "]");
  TORCH_CHECK(bias->scalar_type() == input_.scalar_type(), "linear_bias has dtype ",
              bias->scalar_type(), ": expected ", input_.scalar_type(), ", as input");
}

at::TensorOptions Call::accumulation_options() const {
  return input_.options().dtype(accumulation_dtype(problem_.dtype) == DType::kFloat64 ? at::kDouble
                                                                                      : at::kFloat);
}

const double* Call::as_double(const OptionalTensor& tensor, at::IntArrayRef shape, const char* name,
                              at::Tensor* owner) const {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->sizes() == shape, name, " has shape ", tensor->sizes(), ": expected ", shape);
  *owner = tensor->to(at::kDouble).contiguous();
  return address(owner->const_data_ptr<double>(), ranks_ != nullptr);
}

void Call::set_target() {
  Problem& p = problem_;
  if (!target_.defined()) {
    p.targets = 0;
    return;
  }
  if (at::isFloatingType(target_.scalar_type())) {
    TORCH_CHECK(target_.dim() == 2 && target_.size(0) == p.tokens && target_.size(1) == p.vocab,
                "target has shape ", target_.sizes(), ": expected probabilities of shape [",
                p.tokens, ", ", p.vocab, "]");
    p.probabilities = address(target_.const_data_ptr(), ranks_ != nullptr);
    p.probabilities_dtype = dtype_of(target_, "target");
    p.probabilities_token_stride = target_.stride(0);
    p.probabilities_class_stride = target_.stride(1);
    return;
  }
  TORCH_CHECK((target_.dim() == 1 || target_.dim() == 2) && target_.size(0) == p.tokens,
              "target has shape ", target_.sizes(), ": expected [", p.tokens,
              "], one class index per token");
  p.targets = target_.dim() == 2 ? target_.size(1) : 1;
  target_ = target_.to(at::kLong).contiguous();
  p.target = target_.const_data_ptr<int64_t>();
}

void Call::check_target_values() const {
  const Problem& p = problem_;
  const int64_t vocab = total_vocab(p);
  for (int64_t i = 0; i < p.tokens * p.targets; ++i) {
    const int64_t y = p.target[i];
    TORCH_CHECK_INDEX(y == p.ignore_index || (y >= 0 && y < vocab), "target[", i, "] is ", y,
                      ": expected a class index in [0, ", vocab,
                      ") or ignore_index=", p.ignore_index);
  }
}

}  // namespace memeff
