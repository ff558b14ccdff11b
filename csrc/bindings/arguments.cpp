#include "bindings/arguments.h"

#include <ATen/ops/ne.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <sstream>
#include <vector>

namespace memeff {
namespace {

using c10::IValue;

constexpr unsigned kLoss = kLossForward | kLossBackward;
constexpr unsigned kStatistics = kStatisticsForward | kStatisticsBackward | kCustomLoss;
constexpr unsigned kAll = kLoss | kStatistics;

/// What ranks that share a vocabulary must have in common of an argument.
enum class Alike {
  kFully,       // options; of tensors dtype and shape
  kAndContent,  // and what integers and numbers a tensor on the CPU holds
  kAndZeros,    // and where it is 0
  kButClasses,  // dtype and all of the shape apart from the number of classes
  kNot,
};

struct Row {
  std::string_view schema;  // type and name
  unsigned operators;       // those that have it
  void (*read)(const IValue& value, Arguments* arguments);
  Alike alike = Alike::kFully;

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

void read_reduce_dtype(const IValue& value, Arguments* arguments) {
  if (value.isNone()) return;
  const at::ScalarType dtype = value.toScalarType();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "reduce_dtype is ", dtype,
                    ", expected float32, bfloat16 or None");
  arguments->reduce_in_bfloat16 = dtype == at::kBFloat16;
}

using A = Arguments;

constexpr Row kTable[] = {
    {"Tensor grad_loss", kLossBackward, read<&A::grad_loss>},
    // Where these are 0 tokens are left out.
    {"Tensor? grad_logprob", kStatisticsBackward, read<&A::grad_logprob>, Alike::kAndZeros},
    {"Tensor? grad_lse", kStatisticsBackward, read<&A::grad_lse>, Alike::kAndZeros},
    {"Tensor? grad_entropy", kStatisticsBackward, read<&A::grad_entropy>, Alike::kAndZeros},
    {"Tensor? grad_logit_sum", kStatisticsBackward, read<&A::grad_logit_sum>, Alike::kAndZeros},
    {"Tensor lse", kLossBackward | kStatisticsBackward, read<&A::lse>},
    {"Tensor known_entropy", kStatisticsBackward, read<&A::known_entropy>},
    {"Tensor input", kAll, read<&A::input>},
    {"Tensor linear_weight", kAll, read<&A::linear_weight>, Alike::kButClasses},
    {"Tensor target", kLoss, read<&A::target>, Alike::kAndContent},
    {"Tensor? target", kStatistics, read<&A::target>, Alike::kAndContent},
    {"Tensor? linear_bias", kAll, read<&A::linear_bias>, Alike::kButClasses},
    {"Tensor? weight", kLoss, read<&A::weight>, Alike::kButClasses},
    {"Tensor? token_weight", kLoss, read<&A::token_weight>, Alike::kAndContent},
    {"Tensor? num_items", kLoss, read<&A::num_items>, Alike::kAndContent},
    {"Tensor? scale", kAll, read<&A::scale>, Alike::kAndContent},
    {"Tensor? temperature", kStatistics, read<&A::temperature>, Alike::kAndContent},
    // Options.
    {"str vocab_group", kAll, read<&A::vocab_group>, Alike::kNot},
    {"int vocab_start", kAll, read<&A::vocab_start>, Alike::kNot},
    {"bool reduce_input_grad", kAll, read<&A::reduce_input_grad>},
    {"ScalarType? reduce_dtype", kAll, read_reduce_dtype},
    {"int handle", kCustomLoss, read<&A::handle>, Alike::kNot},
    {"str reduction", kLoss, read_reduction},
    {"int ignore_index", kAll, read<&A::ignore_index>},
    {"float label_smoothing", kLoss, read<&A::label_smoothing>},
    {"float softcap", kAll, read<&A::softcap>},
    {"float logit_scale", kAll, read<&A::logit_scale>},
    {"float z_loss", kLoss, read<&A::z_loss>},
    {"bool return_statistics", kLossForward, read<&A::statistics>},
    {"bool skip_ignored", kStatisticsForward | kStatisticsBackward, read<&A::skip_ignored>},
    {"bool entropy", kStatisticsForward | kCustomLoss, read<&A::entropy>},
    {"bool logit_sum", kStatisticsForward | kCustomLoss, read<&A::logit_sum>},
    {"bool argmax", kStatisticsForward, read<&A::argmax>},
    {"int top_k", kStatisticsForward, read<&A::top_k>},
    {"bool input_grad", kAll, read<&A::grad_input>},
    {"bool weight_grad", kAll, read<&A::grad_weight>},
    {"bool bias_grad", kAll, read<&A::grad_bias>},
    {"SymInt memory_budget", kAll, read<&A::memory_budget>, Alike::kNot},
    {"SymInt chunk_size", kAll, read<&A::chunk_size>},
    {"ScalarType? accum_dtype", kLoss, read_accum_dtype},
    {"float skip_mass", kLoss, read<&A::skip_mass>},
};

static_assert(std::size(kTable) <= kMostArguments, "room for every digest");

/// The arguments of an operator, in order.
std::vector<const Row*> rows_of(Operators op) {
  std::vector<const Row*> rows;
  rows.reserve(std::size(kTable));
  for (const Row& row : kTable)
    if ((row.operators & op) != 0) rows.push_back(&row);
  return rows;
}

// ---- what ranks compare ----

enum DigestKind : int64_t { kNone, kInteger, kReal, kString, kTensor };  // kTensor + its dtype

/// FNV-1a.
int64_t hash(const void* data, int64_t bytes) {
  const auto* next = static_cast<const unsigned char*>(data);
  uint64_t result = 14695981039346656037u;
  for (int64_t i = 0; i < bytes; ++i) result = (result ^ next[i]) * 1099511628211u;
  return static_cast<int64_t>(result);
}

int64_t hash_of_content(const at::Tensor& tensor) {
  if (!tensor.is_cpu()) return 0;
  const at::Tensor dense = tensor.contiguous();
  return hash(dense.const_data_ptr(), static_cast<int64_t>(dense.nbytes()));
}

ArgumentDigest digest_tensor(const at::Tensor& tensor, Alike alike) {
  ArgumentDigest digest;
  digest.kind = kTensor + static_cast<int64_t>(tensor.scalar_type());
  digest.numbers[0] = tensor.dim() > 0 ? tensor.size(0) : -1;
  digest.numbers[1] = tensor.dim() > 1 ? tensor.size(1) : -1;
  const bool probabilities =
      alike == Alike::kAndContent && tensor.dim() == 2 && at::isFloatingType(tensor.scalar_type());
  if (alike == Alike::kButClasses) digest.numbers[0] = 0;
  if (probabilities) {
    digest.numbers[1] = 0;
  } else if (alike == Alike::kAndContent) {
    digest.numbers[2] = hash_of_content(tensor);
  } else if (alike == Alike::kAndZeros) {
    digest.numbers[2] = hash_of_content(tensor.ne(0));
  }
  return digest;
}

ArgumentDigest digest_of(const IValue& value, Alike alike) {
  ArgumentDigest digest;
  if (value.isTensor()) return digest_tensor(value.toTensor(), alike);
  if (value.isBool() || value.isInt()) {
    digest.kind = kInteger;
    digest.numbers[0] = value.isBool() ? value.toBool() : value.toInt();
  } else if (value.isDouble()) {
    digest.kind = kReal;
    const double real = value.toDouble();
    std::memcpy(digest.numbers, &real, sizeof real);
  } else if (value.isString()) {
    digest.kind = kString;
    const std::string& text = value.toStringRef();
    std::memcpy(digest.numbers, text.data(), std::min(text.size(), sizeof digest.numbers - 1));
  }
  return digest;
}

std::string show(const ArgumentDigest& digest) {
  std::ostringstream text;
  if (digest.kind == kNone) {
    text << "None";
  } else if (digest.kind == kInteger) {
    text << digest.numbers[0];
  } else if (digest.kind == kReal) {
    double real;
    std::memcpy(&real, digest.numbers, sizeof real);
    text << real;
  } else if (digest.kind == kString) {
    text << "'" << reinterpret_cast<const char*>(digest.numbers) << "'";
  } else {
    text << "a " << static_cast<at::ScalarType>(digest.kind - kTensor) << " tensor with sizes ["
         << digest.numbers[0];
    if (digest.numbers[1] >= 0) text << ", " << digest.numbers[1];
    text << "]";
  }
  return text.str();
}

}  // namespace

const char* name_of(Operators op) {
  switch (op) {
    case kLossForward: return "linear_cross_entropy_forward";
    case kLossBackward: return "linear_cross_entropy_backward";
    case kStatisticsForward: return "linear_token_statistics_forward";
    case kStatisticsBackward: return "linear_token_statistics_backward";
    case kCustomLoss: return "linear_loss_gradients";
  }
  return "linear_distillation_loss";  // which is Python alone
}

std::string describe_difference(Operators op, const ArgumentDigests& first,
                                const ArgumentDigests& other, size_t rank) {
  const std::vector<const Row*> rows = rows_of(op);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i]->alike == Alike::kNot) continue;
    const ArgumentDigest &a = first[i], &b = other[i];
    const bool same = std::equal(a.numbers, a.numbers + 2, b.numbers) && a.kind == b.kind;
    const std::string name(rows[i]->name());
    const std::string elsewhere = " on rank " + std::to_string(rank);
    if (!same) return name + " is " + show(a) + " on rank 0 and " + show(b) + elsewhere;
    if (a.numbers[2] != b.numbers[2])
      return name + " holds other " + (rows[i]->alike == Alike::kAndZeros ? "zeros" : "values") +
             elsewhere + " than on rank 0";
  }
  return "";
}

std::string schema_of(Operators op) {
  std::string schema = "(";
  bool options = false;
  for (const Row* row : rows_of(op)) {
    if (schema.size() > 1) schema += ", ";
    if (!options && !row->is_tensor()) {
      schema += "*, ";
      options = true;
    }
    schema += row->schema;
  }
  return schema + ")";
}

Arguments take_arguments(Operators op, torch::jit::Stack* stack) {
  const std::vector<const Row*> rows = rows_of(op);
  const IValue* const values = stack->data() + stack->size() - rows.size();
  Arguments arguments;
  arguments.op = op;
  for (size_t i = 0; i < rows.size(); ++i) rows[i]->read(values[i], &arguments);
  if (!arguments.vocab_group.empty()) {
    for (size_t i = 0; i < rows.size(); ++i)
      arguments.digests[i] = digest_of(values[i], rows[i]->alike);
  }
  torch::jit::drop(stack, rows.size());
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
