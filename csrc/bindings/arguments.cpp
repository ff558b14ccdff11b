#include "bindings/arguments.h"

#include <c10/util/Exception.h>

namespace memeff {
namespace {

using c10::IValue;

constexpr unsigned kLoss = kLossForward | kLossBackward;
constexpr unsigned kStatistics = kStatisticsForward | kStatisticsBackward | kCustomLoss;
constexpr unsigned kAll = kLoss | kStatistics;

struct Row {
  std::string_view schema;  // type and name
  unsigned operators;       // those that have it
  void (*read)(const IValue& value, Arguments* arguments);

  std::string_view name() const { return schema.substr(schema.find(' ') + 1); }
  bool is_tensor() const { return schema.substr(0, 6) == "Tensor"; }
};

/// The value as it is.
template <auto member>
void read(const IValue& value, Arguments* arguments) {
  auto& field = arguments->*member;
  field = value.to<std::remove_reference_t<decltype(field)>>();
}

void read_reduction(const IValue& value, Arguments* arguments) {
  const std::string& name = value.toStringRef();
  TORCH_CHECK_VALUE(name == "mean" || name == "sum" || name == "none", "reduction is '", name,
                    "', expected 'mean', 'sum' or 'none'");
  arguments->reduction = name == "mean"  ? Reduction::kMean
                         : name == "sum" ? Reduction::kSum
                                         : Reduction::kNone;
}

void read_accum_dtype(const IValue& value, Arguments* arguments) {
  if (value.isNone()) return;
  const at::ScalarType dtype = value.toScalarType();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble, "accum_dtype is ", dtype,
                    ", expected float32, float64 or None");
  arguments->accumulation = GradAccumulation::kFloat32;
}

using A = Arguments;

constexpr Row kTable[] = {
    {"Tensor grad_loss", kLossBackward, read<&A::grad_loss>},
    {"Tensor? grad_logprob", kStatisticsBackward, read<&A::grad_logprob>},
    {"Tensor? grad_lse", kStatisticsBackward, read<&A::grad_lse>},
    {"Tensor? grad_entropy", kStatisticsBackward, read<&A::grad_entropy>},
    {"Tensor? grad_logit_sum", kStatisticsBackward, read<&A::grad_logit_sum>},
    {"Tensor lse", kLossBackward | kStatisticsBackward, read<&A::lse>},
    {"Tensor known_entropy", kStatisticsBackward, read<&A::known_entropy>},
    {"Tensor input", kAll, read<&A::input>},
    {"Tensor linear_weight", kAll, read<&A::linear_weight>},
    {"Tensor target", kLoss, read<&A::target>},
    {"Tensor? target", kStatistics, read<&A::target>},
    {"Tensor? linear_bias", kAll, read<&A::linear_bias>},
    {"Tensor? weight", kLoss, read<&A::weight>},
    {"Tensor? token_weight", kLoss, read<&A::token_weight>},
    {"Tensor? num_items", kLoss, read<&A::num_items>},
    // Options.
    {"int handle", kCustomLoss, read<&A::handle>},
    {"str reduction", kLoss, read_reduction},
    {"int ignore_index", kAll, read<&A::ignore_index>},
    {"float label_smoothing", kLoss, read<&A::label_smoothing>},
    {"float softcap", kAll, read<&A::softcap>},
    {"float logit_scale", kAll, read<&A::logit_scale>},
    {"float z_loss", kLoss, read<&A::z_loss>},
    {"bool return_statistics", kLossForward, read<&A::statistics>},
    {"bool skip_ignored", kStatisticsForward, read<&A::skip_ignored>},
    {"bool entropy", kStatisticsForward | kCustomLoss, read<&A::entropy>},
    {"bool logit_sum", kStatisticsForward | kCustomLoss, read<&A::logit_sum>},
    {"bool argmax", kStatisticsForward, read<&A::argmax>},
    {"int top_k", kStatisticsForward, read<&A::top_k>},
    {"bool input_grad", kAll, read<&A::grad_input>},
    {"bool weight_grad", kAll, read<&A::grad_weight>},
    {"bool bias_grad", kAll, read<&A::grad_bias>},
    {"SymInt memory_budget", kAll, read<&A::memory_budget>},
    {"SymInt chunk_size", kAll, read<&A::chunk_size>},
    {"ScalarType? accum_dtype", kLoss, read_accum_dtype},
    {"float skip_mass", kLoss, read<&A::skip_mass>},
};

}  // namespace

std::string schema_of(Operators op) {
  std::string schema = "(";
  bool options = false;
  for (const Row& row : kTable) {
    if ((row.operators & op) == 0) continue;
    if (schema.size() > 1) schema += ", ";
    if (!options && !row.is_tensor()) {
      schema += "*, ";
      options = true;
    }
    schema += row.schema;
  }
  return schema + ")";
}

Arguments take_arguments(Operators op, torch::jit::Stack* stack) {
  size_t count = 0;
  for (const Row& row : kTable) count += (row.operators & op) != 0 ? 1 : 0;
  Arguments arguments;
  size_t position = stack->size() - count;
  for (const Row& row : kTable) {
    if ((row.operators & op) != 0) row.read((*stack)[position++], &arguments);
  }
  stack->erase(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  return arguments;
}

void set_argument(Arguments* arguments, std::string_view name, const IValue& value) {
  for (const Row& row : kTable) {
    if (row.name() != name) continue;
    row.read(value, arguments);
    return;
  }
  TORCH_CHECK_VALUE(false, "memeff's operators have no argument '", name, "'");
}

}  // namespace memeff
