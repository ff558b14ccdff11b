// CPU implementations of the operators: checks, allocation, and the call of the driver.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "bindings/request.h"
#include "core/planner.h"
#include "core/problem.h"
#include "cpu/cpu_backend.h"
#include "cpu/number.h"
#include "driver/driver.h"

namespace memeff {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

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

/// Workspace of one call, straight from the system and back to it. Through malloc it would come from the
/// heap once a call or two have raised glibc's threshold, and the heap, cut up by other allocations, would
/// keep more than memory_budget.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    if (bytes_ == 0) return;
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(data_ != MAP_FAILED, "no memory for a workspace of ", bytes, " bytes");
  }
  ~Workspace() {
    if (bytes_ > 0) munmap(data_, bytes_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

/// The options of a call, as the schema passes them.
struct Options {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing, softcap, logit_scale, z_loss;
  bool input_grad, weight_grad, bias_grad;
  int64_t memory_budget, chunk_size;
  GradAccumulation accumulation;
};

/// A problem with the tensors that own what it points to.
class Call {
 public:
  Call(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
       const OptionalTensor& bias, const OptionalTensor& class_weight,
       const OptionalTensor& token_weight, const OptionalTensor& num_items, const Options& options)
      : options_(options), input_(input), weight_(weight), target_(target) {
    check_shapes(bias);
    Problem& p = problem_;
    p.tokens = input.size(0);
    p.features = input.size(1);
    p.vocab = weight.size(0);
    p.dtype = dtype_of(input, "input");
    p.reduction = options.reduction;
    p.ignore_index = options.ignore_index;
    p.label_smoothing = options.label_smoothing;
    p.softcap = options.softcap;
    p.logit_scale = options.logit_scale;
    p.z_loss = options.z_loss;
    // Kernels take any distance between rows, but adjacent features.
    if (p.features > 1 && input_.stride(1) != 1) input_ = input_.contiguous();
    if (p.features > 1 && weight_.stride(1) != 1) weight_ = weight_.contiguous();
    p.input = input_.const_data_ptr();
    p.input_stride = input_.stride(0);
    p.weight = weight_.const_data_ptr();
    p.weight_stride = weight_.stride(0);
    if (bias) {
      bias_ = bias->contiguous();
      p.bias = bias_.const_data_ptr();
    }
    p.class_weight = as_double(class_weight, p.vocab, "weight", &class_weight_);
    p.token_weight = as_double(token_weight, p.tokens, "token_weight", &token_weight_);
    if (num_items) {
      p.num_items = num_items->item().toDouble();
      TORCH_CHECK_VALUE(p.num_items > 0, "num_items=", p.num_items,
                        ": expected a number greater than 0");
    }
    set_target();
  }

  const Problem& problem() const { return problem_; }

  void allocate_statistics(bool statistics) {
    const auto options = input_.options().dtype(
        accumulation_dtype(problem_.dtype) == DType::kFloat64 ? at::kDouble : at::kFloat);
    const int64_t n = problem_.tokens;
    loss =
        options_.reduction == Reduction::kNone ? at::empty({n}, options) : at::empty({}, options);
    lse = at::empty({n}, options.dtype(at::kDouble));
    this->statistics = statistics ? at::zeros({4, n}, options) : at::empty({0}, options);
    argmax = at::empty({statistics ? n : 0}, options.dtype(at::kLong));
    problem_.statistics = statistics;
    problem_.loss = loss.mutable_data_ptr();
    problem_.lse = lse.mutable_data_ptr<double>();
    if (statistics) {
      problem_.statistics_out = this->statistics.mutable_data_ptr();
      problem_.argmax = argmax.mutable_data_ptr<int64_t>();
    }
  }

  void use_statistics(const at::Tensor& known_lse, const at::Tensor& grad_loss) {
    const bool per_token = options_.reduction == Reduction::kNone;
    TORCH_CHECK(known_lse.dim() == 1 && known_lse.size(0) == problem_.tokens, "lse has shape ",
                known_lse.sizes(), ": expected [", problem_.tokens, "]");
    TORCH_CHECK(grad_loss.numel() == (per_token ? problem_.tokens : 1), "grad_loss has ",
                grad_loss.numel(), " elements: expected ", per_token ? problem_.tokens : 1);
    lse = known_lse.to(at::kDouble).contiguous();
    problem_.lse = const_cast<double*>(lse.const_data_ptr<double>());
    grad_loss_ = grad_loss.to(at::kDouble).contiguous();
    problem_.grad_loss = grad_loss_.const_data_ptr<double>();
  }

  void allocate_gradients(bool wanted) {
    const auto allocate = [&](bool want, const at::Tensor& like, void** data) {
      at::Tensor gradient =
          want ? at::empty(like.sizes(), like.options()) : at::empty({0}, like.options());
      if (want) *data = gradient.mutable_data_ptr();
      return gradient;
    };
    grad_input = allocate(wanted && options_.input_grad, input_, &problem_.grad_input);
    grad_weight = allocate(wanted && options_.weight_grad, weight_, &problem_.grad_weight);
    const bool bias = wanted && options_.bias_grad && bias_.defined();
    grad_bias = allocate(bias, bias ? bias_ : weight_, &problem_.grad_bias);
  }

  void run(bool statistics_known) {
    const bool nothing_wanted = problem_.grad_input == nullptr && problem_.grad_weight == nullptr &&
                                problem_.grad_bias == nullptr;
    if (statistics_known && nothing_wanted) return;
    const PlanRequest request =
        plan_request(statistics_known, problem_.grad_input != nullptr,
                     problem_.grad_weight != nullptr, problem_.grad_bias != nullptr);
    Plan plan;
    const std::string problem = make_plan(request, &plan);
    TORCH_CHECK_VALUE(problem.empty(), problem);
    const Workspace workspace(plan.workspace_bytes);
    const CpuContext context{&problem_, &request, &plan, workspace.data()};
    memeff::run(problem_, plan, statistics_known, *make_cpu_backend(context));
  }

  /// A budget that the later backward op could not keep is refused before anything is computed.
  void check_backward_budget() const {
    if (!options_.input_grad && !options_.weight_grad && !options_.bias_grad) return;
    Plan plan;
    const std::string problem = make_plan(
        plan_request(true, options_.input_grad, options_.weight_grad, options_.bias_grad), &plan);
    TORCH_CHECK_VALUE(problem.empty(), problem);
  }

  at::Tensor loss, lse, statistics, argmax, grad_input, grad_weight, grad_bias;

 private:
  PlanRequest plan_request(bool statistics_known, bool input_grad, bool weight_grad,
                           bool bias_grad) const {
    PlanRequest request;
    request.tokens = problem_.tokens;
    request.features = problem_.features;
    request.vocab = problem_.vocab;
    request.dtype = problem_.dtype;
    request.bf16_kernels = uses_bf16_kernels(problem_);
    request.grad_input = input_grad;
    request.grad_weight = weight_grad;
    request.grad_bias = bias_grad;
    request.statistics_known = statistics_known;
    request.partials = count_partials(problem_);
    request.threads = at::get_num_threads();
    request.memory_budget = options_.memory_budget;
    request.chunk_size = options_.chunk_size;
    request.accumulation = options_.accumulation;
    return request;
  }

  void check_shapes(const OptionalTensor& bias) const {
    TORCH_CHECK(input_.dim() == 2, "input has ", input_.dim(), " dimensions: expected 2, [N, D]");
    TORCH_CHECK(weight_.dim() == 2, "linear_weight has ", weight_.dim(),
                " dimensions: expected 2, [V, D]");
    TORCH_CHECK(input_.size(1) == weight_.size(1), "input has ", input_.size(1),
                " features and linear_weight ", weight_.size(1), ": expected the same number");
    TORCH_CHECK(input_.scalar_type() == weight_.scalar_type(), "input has dtype ",
                input_.scalar_type(), " and linear_weight ", weight_.scalar_type(),
                ": expected the same");
    if (!bias) return;
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight_.size(0), "linear_bias has shape ",
                bias->sizes(), ": expected [", weight_.size(0), "]");
    TORCH_CHECK(bias->scalar_type() == input_.scalar_type(), "linear_bias has dtype ",
                bias->scalar_type(), ": expected ", input_.scalar_type(), ", as input");
  }

  static const double* as_double(const OptionalTensor& tensor, int64_t size, const char* name,
                                 at::Tensor* owner) {
    if (!tensor) return nullptr;
    TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size, name, " has shape ", tensor->sizes(),
                ": expected [", size, "]");
    *owner = tensor->to(at::kDouble).contiguous();
    return owner->const_data_ptr<double>();
  }

  void set_target() {
    Problem& p = problem_;
    if (at::isFloatingType(target_.scalar_type())) {
      TORCH_CHECK(target_.dim() == 2 && target_.size(0) == p.tokens && target_.size(1) == p.vocab,
                  "target has shape ", target_.sizes(), ": expected probabilities of shape [",
                  p.tokens, ", ", p.vocab, "]");
      p.probabilities = target_.const_data_ptr();
      p.probabilities_dtype = dtype_of(target_, "target");
      p.probabilities_token_stride = target_.stride(0);
      p.probabilities_class_stride = target_.stride(1);
      return;
    }
    TORCH_CHECK(target_.dim() == 1 && target_.size(0) == p.tokens, "target has shape ",
                target_.sizes(), ": expected [", p.tokens, "], one class index per token");
    target_ = target_.to(at::kLong).contiguous();
    p.target = target_.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < p.tokens; ++n) {
      const int64_t y = p.target[n];
      TORCH_CHECK_INDEX(y == p.ignore_index || (y >= 0 && y < p.vocab), "target[", n, "] is ", y,
                        ": expected a class index in [0, ", p.vocab,
                        ") or ignore_index=", p.ignore_index);
    }
  }

  const Options options_;
  Problem problem_;
  at::Tensor input_, weight_, target_, bias_, class_weight_, token_weight_, grad_loss_;
};

Options parse_options(c10::string_view reduction, int64_t ignore_index, double label_smoothing,
                      double softcap, double logit_scale, double z_loss, bool input_grad,
                      bool weight_grad, bool bias_grad, int64_t memory_budget, int64_t chunk_size,
                      c10::string_view accumulation) {
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
          parse_accumulation(std::string(accumulation))};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardResult forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                      const OptionalTensor& bias, const OptionalTensor& class_weight,
                      const OptionalTensor& token_weight, const OptionalTensor& num_items,
                      c10::string_view reduction, int64_t ignore_index, double label_smoothing,
                      double softcap, double logit_scale, double z_loss, bool input_grad,
                      bool weight_grad, bool bias_grad, bool statistics, int64_t memory_budget,
                      int64_t chunk_size, c10::string_view accumulation, c10::string_view) {
  const Options options =
      parse_options(reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss,
                    input_grad, weight_grad, bias_grad, memory_budget, chunk_size, accumulation);
  Call call(input, weight, target, bias, class_weight, token_weight, num_items, options);
  call.allocate_statistics(statistics);
  const bool in_forward = gradient_in_forward(options.reduction, call.problem().dtype);
  if (!in_forward) call.check_backward_budget();
  call.allocate_gradients(in_forward);
  call.run(false);
  return {call.loss,       call.lse,         call.statistics, call.argmax,
          call.grad_input, call.grad_weight, call.grad_bias};
}

Gradients backward(const at::Tensor& grad_loss, const at::Tensor& lse, const at::Tensor& input,
                   const at::Tensor& weight, const at::Tensor& target, const OptionalTensor& bias,
                   const OptionalTensor& class_weight, const OptionalTensor& token_weight,
                   const OptionalTensor& num_items, c10::string_view reduction,
                   int64_t ignore_index, double label_smoothing, double softcap, double logit_scale,
                   double z_loss, bool input_grad, bool weight_grad, bool bias_grad,
                   int64_t memory_budget, int64_t chunk_size, c10::string_view accumulation,
                   c10::string_view) {
  const Options options =
      parse_options(reduction, ignore_index, label_smoothing, softcap, logit_scale, z_loss,
                    input_grad, weight_grad, bias_grad, memory_budget, chunk_size, accumulation);
  Call call(input, weight, target, bias, class_weight, token_weight, num_items, options);
  call.use_statistics(lse, grad_loss);
  call.allocate_gradients(true);
  call.run(true);
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

void scale_elements(const at::Tensor& from, double scale, const at::Tensor& to) {
  dispatch(dtype_of(from, "gradient"), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* source = static_cast<const T*>(from.const_data_ptr());
    T* target = static_cast<T*>(to.mutable_data_ptr());
    const auto factor = static_cast<Arithmetic>(scale);
    at::parallel_for(0, from.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        store(target + i, static_cast<Arithmetic>(to_arithmetic(source[i]) * factor));
      }
    });
  });
}

at::Tensor scale_gradient(const at::Tensor& gradient, const at::Tensor& scale) {
  const at::Tensor source = gradient.contiguous();
  at::Tensor result = at::empty(source.sizes(), source.options());
  scale_elements(source, scale.item().toDouble(), result);
  return result;
}

void scale_gradient_in_place(at::Tensor& gradient, const at::Tensor& scale) {
  TORCH_CHECK(gradient.is_contiguous(), "gradient has strides ", gradient.strides(),
              ": expected a contiguous tensor");
  const double factor = scale.item().toDouble();
  if (factor != 1.0) scale_elements(gradient, factor, gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(memeff, CPU, m) {
  m.impl("linear_cross_entropy_forward", &forward);
  m.impl("linear_cross_entropy_backward", &backward);
  m.impl("scale_gradient", &scale_gradient);
  m.impl("scale_gradient_", &scale_gradient_in_place);
}

}  // namespace memeff
