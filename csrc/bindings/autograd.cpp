#include "bindings/autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/call.h"

namespace memeff {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;

/// Arguments that have gradients, in the order in which the backward operators return these, and the options
/// that say which of them are wanted.
constexpr const char* kDifferentiable[] = {"input", "linear_weight", "linear_bias"};
constexpr const char* kWanted[] = {"input_grad", "weight_grad", "bias_grad"};
constexpr size_t kGradients = std::size(kDifferentiable);

constexpr const char* kLossFunction = "linear_cross_entropy";
constexpr const char* kStatisticsFunction = "linear_token_statistics";

/// Torch changes how it counts references to nodes: std::shared_ptr, later c10::intrusive_ptr.
template <class Pointer>
struct NodePointer {
  template <class T>
  static c10::intrusive_ptr<T> make() {
    return c10::make_intrusive<T>();
  }
};
template <class N>
struct NodePointer<std::shared_ptr<N>> {
  template <class T>
  static std::shared_ptr<T> make() {
    return std::shared_ptr<T>(new T, [](N* node) { deleteNode(node); });
  }
};

template <class T>
auto make_node() {
  return NodePointer<decltype(torch::autograd::Edge::function)>::template make<T>();
}

size_t position_of(const c10::FunctionSchema& schema, const std::string& name) {
  const std::optional<int> position = schema.argumentIndexWithName(name);
  TORCH_INTERNAL_ASSERT(position, schema.name(), " has no argument ", name);
  return static_cast<size_t>(*position);
}

/// An undefined tensor for None.
Tensor tensor_of(const IValue& value) { return value.isTensor() ? value.toTensor() : Tensor(); }

IValue value_of(const Tensor& tensor) { return tensor.defined() ? IValue(tensor) : IValue(); }

/// An operator of the same library.
OperatorHandle sibling(const OperatorHandle& op, const std::string& name) {
  const std::string library(op.operator_name().getNamespace().value());
  return c10::Dispatcher::singleton().findSchemaOrThrow((library + "::" + name).c_str(), "");
}

/// Forward-mode AD: the kernels have no tangents, and would lose those of the arguments.
void refuse_tangents(const c10::FunctionSchema& schema, const Stack& stack) {
  const size_t count = schema.arguments().size();
  const auto arguments = torch::jit::last(stack, count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor tensor = tensor_of(arguments[i]);
    TORCH_CHECK_NOT_IMPLEMENTED(
        !tensor.defined() || !torch::autograd::isFwGradDefined(tensor),
        schema.arguments()[i].name(), " of ", schema.name(),
        " has a tangent of forward-mode AD (torch.autograd.forward_ad, torch.func.jvp), which "
        "memeff's kernels do not have, expected none; backend=\"reference\" has them");
  }
}

/// Runs the operator without autograd; its arguments on the stack become its results.
void run_below_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  refuse_tangents(op.schema(), *stack);
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

/// A second derivative: where backward is itself recorded, its results must not look like constants.
struct Refuse final : Node {
  const char* function = "";

  std::string name() const override { return "MemeffSecondDerivative"; }

 protected:
  variable_list apply(variable_list&&) override {
    TORCH_CHECK(
        false, "second derivatives of memeff.", function,
        " (a backward through its gradients, as with create_graph=True) are not implemented; "
        "backend=\"reference\" has them");
  }
};

/// Gives results of a backward that is recorded a history that refuses.
void refuse_second_derivative(const char* function, torch::autograd::edge_list edges,
                              const variable_list& results) {
  auto node = make_node<Refuse>();
  node->function = function;
  node->set_next_edges(std::move(edges));
  for (const Tensor& result : results)
    if (result.defined()) torch::autograd::set_history(result, node);
}

/// What the nodes of forward operators have in common.
struct Gradients : Node {
  const char* title = "";
  std::string op;
  std::vector<SavedVariable> saved;

  std::string name() const override { return title; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved) variable.reset_data();
  }

  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    args.collect(op);
    args.collect(saved, false);
  }

  variable_list apply_with_saved(const variable_list& upstream,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    swap.before(saved);
    variable_list results = apply(variable_list(upstream));
    swap.after(saved);
    return results;
  }

 protected:
  variable_list unpack() {
    variable_list result;
    result.reserve(saved.size());
    for (const SavedVariable& variable : saved) result.push_back(variable.unpack(getptr()));
    return result;
  }
};

/// The gradients of the loss were computed with it. Saved are these and the statistics, mostly empty, which stand
/// for this node where backward is itself recorded. The loss could not: code may write into it.
struct ScaleGradients final : Gradients {
  std::optional<OperatorHandle> scale, scale_in_place;

 protected:
  /// Whether the saved tensors are freed after this backward, and may be overwritten: no retain_graph, no
  /// tracing, and one upstream gradient.
  static bool is_last(const Tensor& upstream) {
    const c10::DispatchKeySet keys = upstream.key_set();
    const bool batch =
        keys.has(c10::DispatchKey::FuncTorchBatched) || keys.has(c10::DispatchKey::Batched);
    const bool tangent = torch::autograd::isFwGradDefined(upstream);
    return !batch && !tangent && !torch::autograd::get_current_graph_task_keep_graph() &&
           c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  }

  variable_list apply(variable_list&& upstream) override {
    variable_list results(kGradients);
    if (!upstream[0].defined()) return results;
    const std::lock_guard<std::mutex> lock(mutex_);
    const variable_list tensors = unpack();
    Tensor scale_by = upstream[0];
    const bool recorded = at::GradMode::is_enabled();
    // For outer transforms of torch.func, whose history the statistics have: scale_gradient refuses there.
    if (recorded) scale_by = scale_by.add(tensors[kGradients].flatten().slice(0, 0, 0).sum());
    const bool in_place = !recorded && is_last(scale_by);
    Stack stack;
    for (size_t i = 0; i < kGradients; ++i) {
      if (!task_should_compute_output(i)) continue;
      stack = {tensors[i], scale_by};
      (in_place ? *scale_in_place : *scale).callBoxed(&stack);
      results[i] = in_place ? tensors[i] : stack[0].toTensor();
    }
    if (recorded) {
      torch::autograd::edge_list edges = next_edges();
      if (upstream[0].requires_grad())
        edges.push_back(torch::autograd::impl::gradient_edge(upstream[0]));
      refuse_second_derivative(kLossFunction, std::move(edges), results);
    }
    return results;
  }
};

/// The backward operator computes the gradients.
struct Recompute final : Gradients {
  std::optional<OperatorHandle> backward;
  std::vector<IValue> options;  // of the backward operator

  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    Gradients::compiled_args(args);
    // By value: as lifted arguments they would not tell calls with other options apart.
    for (const IValue& option : options) args.collect(option, /*nested=*/true);
  }

 protected:
  variable_list apply(variable_list&& upstream) override {
    variable_list results(kGradients);
    const auto defined = [](const Tensor& tensor) { return tensor.defined(); };
    if (std::none_of(upstream.begin(), upstream.end(), defined)) return results;
    const std::lock_guard<std::mutex> lock(mutex_);
    Stack stack;
    for (const Tensor& gradient : upstream) stack.push_back(value_of(gradient));
    for (const Tensor& tensor : unpack()) stack.push_back(value_of(tensor));
    stack.insert(stack.end(), options.begin(), options.end());
    for (size_t i = 0; i < kGradients; ++i)
      stack[position_of(backward->schema(), kWanted[i])] = task_should_compute_output(i);
    backward->callBoxed(&stack);
    for (size_t i = 0; i < kGradients; ++i)
      if (task_should_compute_output(i)) results[i] = stack[i].toTensor();
    return results;
  }
};

/// A forward operator and its derivative.
struct Derivative {
  const char* title;  // of its node
  const char* backward;
  size_t differentiable;  // that many results, the first ones, have gradients
  size_t kept;  // that many results, from the second one on, are arguments of the backward operator
};
constexpr Derivative kOfLoss = {"LinearCrossEntropyBackward", "linear_cross_entropy_backward", 1,
                                1};
constexpr Derivative kOfStatistics = {"TokenStatisticsBackward", "linear_token_statistics_backward",
                                      4, 2};

template <const Derivative& derivative>
void forward(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const auto first = stack->end() - static_cast<int64_t>(count);
  std::array<Tensor, kGradients> leaves;
  bool records = false;
  for (size_t i = 0; i < kGradients; ++i) {
    leaves[i] = tensor_of(first[position_of(schema, kDifferentiable[i])]);
    if (!leaves[i].defined() || !leaves[i].requires_grad() || !at::GradMode::is_enabled()) continue;
    first[position_of(schema, kWanted[i])] = true;  // under torch.vmap the caller cannot know
    records = true;
  }
  const std::vector<IValue> arguments(first, stack->end());
  run_below_autograd(op, keys, stack);
  if (!records) return;

  const auto complete = [&](Gradients& node) {
    node.title = derivative.title;
    node.op = schema.name();
    node.set_next_edges(torch::autograd::collect_next_edges(leaves[0], leaves[1], leaves[2]));
  };
  const auto results = stack->end() - static_cast<int64_t>(schema.returns().size());
  const auto set_history = [&](const auto& node) {
    for (size_t i = 0; i < derivative.differentiable; ++i)
      torch::autograd::set_history((results + static_cast<int64_t>(i))->toTensor(), node);
  };

  if constexpr (&derivative == &kOfLoss) {
    Arguments read;
    set_argument(&read, "reduction", arguments[position_of(schema, "reduction")]);
    if (gradient_in_forward(read.reduction, dtype_of(leaves[0], "input"))) {
      auto node = make_node<ScaleGradients>();
      complete(*node);
      node->scale = sibling(op, "scale_gradient");
      node->scale_in_place = sibling(op, "scale_gradient_");
      for (auto gradient = stack->end() - kGradients; gradient != stack->end(); ++gradient)
        node->saved.emplace_back(gradient->toTensor(), false);
      const Tensor& statistics = (results + 2)->toTensor();
      node->saved.emplace_back(statistics.tensor_data(), false);
      set_history(node);
      torch::autograd::set_history(statistics, node);
      return;
    }
  }
  auto node = make_node<Recompute>();
  complete(*node);
  node->backward = sibling(op, derivative.backward);
  // What has a history of this node must not be kept by it.
  for (size_t i = 1; i <= derivative.kept; ++i)
    node->saved.emplace_back((results + static_cast<int64_t>(i))->toTensor().detach(), false);
  for (size_t i = 0; i < count && !schema.arguments()[i].kwarg_only(); ++i)
    node->saved.emplace_back(tensor_of(arguments[i]), false);
  for (const c10::Argument& argument : node->backward->schema().arguments())
    if (argument.kwarg_only())
      node->options.push_back(arguments[position_of(schema, argument.name())]);
  set_history(node);
}

/// An operator without derivative, which runs in backward.
template <const char* const& function>
void no_derivative(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  torch::autograd::edge_list edges;
  for (const IValue& argument : torch::jit::last(*stack, count)) {
    if (argument.isTensor() && argument.toTensor().requires_grad())
      edges.push_back(torch::autograd::impl::gradient_edge(argument.toTensor()));
  }
  run_below_autograd(op, keys, stack);
  if (edges.empty() || !at::GradMode::is_enabled()) return;
  variable_list results;
  for (const IValue& result : torch::jit::last(*stack, op.schema().returns().size()))
    results.push_back(result.toTensor());
  refuse_second_derivative(function, std::move(edges), results);
}

}  // namespace

void implement_autograd(torch::Library& m) {
  using torch::CppFunction;
  m.impl("linear_cross_entropy_forward", CppFunction::makeFromBoxedFunction<&forward<kOfLoss>>());
  m.impl("linear_cross_entropy_backward",
         CppFunction::makeFromBoxedFunction<&no_derivative<kLossFunction>>());
  m.impl("linear_token_statistics_forward",
         CppFunction::makeFromBoxedFunction<&forward<kOfStatistics>>());
  m.impl("linear_token_statistics_backward",
         CppFunction::makeFromBoxedFunction<&no_derivative<kStatisticsFunction>>());
  m.impl("scale_gradient", CppFunction::makeFromBoxedFunction<&no_derivative<kLossFunction>>());
}

}  // namespace memeff
