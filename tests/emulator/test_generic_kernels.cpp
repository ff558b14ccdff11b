// The generic kernels, emulated, against double precision: every dtype, ragged shapes, every
// option.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "emulator/check.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::BufferAccess;
using emulator::GlobalBuffer;

namespace {

struct Case {
  int64_t tokens, classes, padding;  // rows are classes + padding elements apart
  bool bias = false, class_weight = false, probabilities = false;
  double logit_scale = 1.0, softcap = 0.0;
  int slices = 1;  // of the vocabulary, processed one after the other
};

// An array of runtime element type, registered with the emulator.
class Array {
 public:
  Array(DType dtype, int64_t count, const char* name,
        BufferAccess access = BufferAccess::kReadWrite)
      : dtype_(dtype), bytes_(count * size_of(dtype) + 16) {
    // 16-byte aligned, as memory from any CUDA allocator
    void* first = bytes_.data();
    std::size_t space = bytes_.size();
    data_ = std::align(16, 1, first, space);
    emulator::register_buffer(
        data_, count * size_of(dtype), name, access,
        static_cast<int>(size_of(dtype) == 2 || dtype == DType::kFloat32 ? 2 : 8));
  }
  ~Array() { emulator::unregister_buffer(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void* data() { return data_; }
  double at(int64_t i, DType as) const {
    switch (as) {
      case DType::kBFloat16: return __bfloat162float(static_cast<__nv_bfloat16*>(data_)[i]);
      case DType::kFloat16: return __half2float(static_cast<__half*>(data_)[i]);
      case DType::kFloat32: return static_cast<float*>(data_)[i];
      case DType::kFloat64: return static_cast<double*>(data_)[i];
    }
    return 0;
  }
  double at(int64_t i) const { return at(i, dtype_); }
  void set(int64_t i, double value) {
    switch (dtype_) {
      case DType::kBFloat16:
        static_cast<__nv_bfloat16*>(data_)[i] = __float2bfloat16(static_cast<float>(value));
        break;
      case DType::kFloat16:
        static_cast<__half*>(data_)[i] = __float2half(static_cast<float>(value));
        break;
      case DType::kFloat32: static_cast<float*>(data_)[i] = static_cast<float>(value); break;
      case DType::kFloat64: static_cast<double*>(data_)[i] = value; break;
    }
  }

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;
  void* data_;
};

double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return std::ldexp(1.0, -8);
    case DType::kFloat16: return std::ldexp(1.0, -11);
    case DType::kFloat32: return std::ldexp(1.0, -24);
    case DType::kFloat64: return std::ldexp(1.0, -53);
  }
  return 0;
}

const char* name_of(DType dtype) {
  const char* names[] = {"bfloat16", "float16", "float32", "float64"};
  return names[static_cast<int>(dtype)];
}

// Inputs of a case, what the kernels must compute from them, and the errors seen.
struct Experiment {
  Case c;
  DType dtype, accumulation;
  int64_t stride;
  Array logits, bias, class_weight, probabilities;
  std::vector<int64_t> target;
  GlobalBuffer target_guard;
  std::mt19937 random{11};

  Experiment(const Case& shape, DType type)
      : c(shape),
        dtype(type),
        accumulation(accumulation_dtype(type)),
        stride(shape.classes + shape.padding),
        logits(type, shape.tokens * stride, "logits"),
        bias(accumulation, shape.classes, "bias", BufferAccess::kReadOnly),
        class_weight(accumulation, shape.classes, "class_weight", BufferAccess::kReadOnly),
        probabilities(DType::kBFloat16, shape.tokens * shape.classes, "probabilities",
                      BufferAccess::kReadOnly),
        target(shape.tokens),
        target_guard(target.data(), target.size() * 8, "target", BufferAccess::kReadOnly, 8) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.0, 2.0);
    for (int64_t i = 0; i < c.tokens * stride; ++i) logits.set(i, 3 * normal(random));
    for (int64_t v = 0; v < c.classes; ++v) {
      bias.set(v, normal(random));
      class_weight.set(v, uniform(random));
      for (int64_t n = 0; n < c.tokens; ++n)
        probabilities.set(n * c.classes + v, uniform(random) / static_cast<double>(c.classes));
    }
    for (int64_t n = 0; n < c.tokens; ++n)
      target[n] = n % 4 == 3 ? -100 : static_cast<int64_t>(random() % c.classes);
  }

  double product(int64_t n, int64_t v) const {
    return logits.at(n * stride + v) + (c.bias ? bias.at(v) : 0.0);
  }
  double logit(double u) const {
    const double scaled = u * c.logit_scale;
    return c.softcap == 0.0 ? scaled : c.softcap * std::tanh(scaled / c.softcap);
  }
  double slope(double z) const {
    return c.softcap == 0.0 ? c.logit_scale : c.logit_scale * (1 - z / c.softcap * (z / c.softcap));
  }
  double weight(int64_t v) const { return c.class_weight ? class_weight.at(v) : 1.0; }

  // Slice `s` of the vocabulary, as the kernels get it.
  LogitsBlock slice(int s) {
    const int64_t begin = c.classes * s / c.slices / 8 * 8;
    const int64_t end = s + 1 == c.slices ? c.classes : c.classes * (s + 1) / c.slices / 8 * 8;
    LogitsBlock block;
    block.logits = static_cast<char*>(logits.data()) + begin * size_of(dtype);
    block.tokens = c.tokens;
    block.classes = end - begin;
    block.row_stride = stride;
    block.dtype = dtype;
    block.first_class = begin;
    block.bias = c.bias ? bias.data() : nullptr;
    block.class_weight = c.class_weight ? class_weight.data() : nullptr;
    block.logit_scale = c.logit_scale;
    block.softcap = c.softcap;
    if (c.probabilities) {
      block.probabilities = probabilities.data();
      block.probabilities_dtype = DType::kBFloat16;
      block.probabilities_stride = c.classes;
    } else {
      block.target = target.data();
    }
    return block;
  }
};

double worst_error = 0;  // relative to the tolerance, of everything compared so far

void compare(double got, double expected, double tolerance, const char* what, DType dtype) {
  const double error = std::abs(got - expected) / tolerance;
  if (error > worst_error) worst_error = error;
  if (error <= 1) return;
  ++emulator::failed_checks;
  std::printf("FAILED %s of %s: %.9g instead of %.9g\n", what, name_of(dtype), got, expected);
}

struct Reference {
  double max = -std::numeric_limits<double>::infinity();
  double lse = 0, target = 0, target_mass = 0, weighted = 0, mean_logit = 0;
  int64_t argmax = 0;
};

Reference reference_of(const Experiment& e, int64_t n) {
  Reference r;
  for (int64_t v = 0; v < e.c.classes; ++v) {
    const double z = e.logit(e.product(n, v));
    if (z > r.max) r.max = z, r.argmax = v;
  }
  double sum = 0;
  for (int64_t v = 0; v < e.c.classes; ++v) sum += std::exp(e.logit(e.product(n, v)) - r.max);
  r.lse = r.max + std::log(sum);
  for (int64_t v = 0; v < e.c.classes; ++v) {
    const double z = e.logit(e.product(n, v));
    const double q = e.weight(v) * e.probabilities.at(n * e.c.classes + v);
    r.mean_logit += std::exp(z - r.lse) * z;
    r.weighted += e.weight(v) * z;
    r.target_mass += q;
    if (e.c.probabilities ? true : v == e.target[n]) r.target += e.c.probabilities ? q * z : z;
  }
  return r;
}

void test_case(const Case& c, DType dtype, DType gradient_dtype) {
  Experiment e(c, dtype);
  const DType a = e.accumulation;
  const int64_t tokens = c.tokens;
  Array max(a, tokens, "max"), sum(a, tokens, "sum"), target(a, tokens, "target logit"),
      mass(a, tokens, "mass"), weighted(a, tokens, "weighted"), entropy(a, tokens, "entropy");
  std::vector<int64_t> argmax(tokens);
  const GlobalBuffer argmax_guard(argmax.data(), argmax.size() * 8, "argmax",
                                  BufferAccess::kReadWrite, 8);
  TokenStatistics statistics{max.data(),      sum.data(),     target.data(), nullptr,
                             weighted.data(), entropy.data(), argmax.data()};
  if (c.probabilities) statistics.target_mass = mass.data();
  for (int s = 0; s < c.slices; ++s)
    CHECK(row_statistics(e.slice(s), statistics, s > 0, nullptr).ok());

  // Coefficients of an arbitrary loss; one token in five has none, as if ignored.
  Array lse(a, tokens, "lse"), A(a, tokens, "A"), B(a, tokens, "B"), C(a, tokens, "C"),
      S(a, tokens, "S");
  std::normal_distribution<double> normal;
  const double roundoff = unit_roundoff(a);
  std::vector<Reference> references;
  for (int64_t n = 0; n < tokens; ++n) {
    const Reference r = reference_of(e, n);
    references.push_back(r);
    const double scale = 1 + std::abs(r.max), many = static_cast<double>(c.classes);
    compare(max.at(n), r.max, 8 * roundoff * scale, "max", dtype);
    compare(max.at(n) + std::log(sum.at(n)), r.lse, 64 * roundoff * scale, "lse", dtype);
    compare(target.at(n), r.target, 64 * roundoff * scale, "target", dtype);
    compare(entropy.at(n) / sum.at(n), r.mean_logit, 64 * roundoff * scale, "entropy", dtype);
    compare(weighted.at(n), r.weighted, 64 * roundoff * scale * many, "weighted", dtype);
    if (c.probabilities) compare(mass.at(n), r.target_mass, 64 * roundoff * many, "mass", dtype);
    CHECK(argmax[n] == r.argmax || e.logit(e.product(n, argmax[n])) > r.max - 8 * roundoff * scale);
    const bool ignored = n % 5 == 4;
    lse.set(n, r.lse);
    for (Array* coefficient : {&A, &B, &C, &S}) coefficient->set(n, ignored ? 0 : normal(e.random));
  }

  std::vector<double> expected(tokens * c.classes), column_sum(c.classes, 0.0);
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t v = 0; v < c.classes; ++v) {
      const double z = e.logit(e.product(n, v));
      double dz = std::exp(z - references[n].lse) * (A.at(n) + B.at(n) * z) + S.at(n) * e.weight(v);
      if (c.probabilities)
        dz += C.at(n) * e.weight(v) * e.probabilities.at(n * c.classes + v);
      else if (v == e.target[n])
        dz += C.at(n);
      expected[n * c.classes + v] = dz * e.slope(z);
    }

  const GradientCoefficients coefficients{lse.data(), A.data(), B.data(), C.data(), S.data()};
  Array sums(a, c.classes, "sums");
  for (int64_t v = 0; v < c.classes; ++v) sums.set(v, 1.0);
  for (int s = 0; s < c.slices; ++s) {
    LogitsBlock block = e.slice(s);
    CHECK(logits_gradient(block, coefficients, gradient_dtype, nullptr).ok());
    // Narrowed rows are half as long, so their distance in elements doubles.
    block.row_stride *= size_of(dtype) / size_of(gradient_dtype);
    block.dtype = gradient_dtype;
    CHECK(add_column_sums(block, sums.data(), nullptr).ok());
    const char* first = static_cast<char*>(block.logits);
    const int64_t offset = (first - static_cast<char*>(e.logits.data())) / size_of(gradient_dtype);
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t v = 0; v < block.classes; ++v) {
        const double got = e.logits.at(offset + n * block.row_stride + v, gradient_dtype);
        const double wanted = expected[n * c.classes + block.first_class + v];
        // Below its normal range fp16 has a fixed spacing.
        const double tiny = gradient_dtype == DType::kFloat16 ? std::ldexp(1.0, -24) : 0;
        compare(got, wanted,
                (unit_roundoff(gradient_dtype) * 1.01 + 64 * roundoff) * std::abs(wanted) + tiny +
                    256 * roundoff,
                "gradient", gradient_dtype);
        column_sum[block.first_class + v] += got;
      }
  }
  for (int64_t v = 0; v < c.classes; ++v)
    compare(sums.at(v), 1 + column_sum[v], 64 * roundoff * (1 + std::abs(column_sum[v])), "sum",
            gradient_dtype);
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {1, 1, 0},
      {3, 7, 1},
      {5, 33, 0, true},
      {2, 520, 0, true, true},
      {5, 1000, 24, false, true, true},
      {3, 1003, 5, true, true, true, 0.5, 7.0, 1},
      {6, 2049, 7, true, false, false, 2.0, 0.0, 1},
      {4, 3000, 8, true, true, false, 1.0, 12.0, 3},
      {2, 777, 7, false, true, true, 1.0, 0.0, 2},
  };
  return all;
}

void test_every_dtype() {
  struct {
    DType logits, gradient;
  } const types[] = {{DType::kFloat32, DType::kFloat32},   {DType::kFloat32, DType::kBFloat16},
                     {DType::kFloat32, DType::kFloat16},   {DType::kFloat64, DType::kFloat64},
                     {DType::kBFloat16, DType::kBFloat16}, {DType::kFloat16, DType::kFloat16}};
  emulator::for_every_schedule([&](const char* variant) {
    for (const auto& type : types)
      for (const Case& c : cases()) test_case(c, type.logits, type.gradient);
    if (emulator::reports().empty()) return;
    ++emulator::failed_checks;
    std::printf("FAILED: reports under %s\n", variant);
    emulator::print_reports();
  });
}

// -inf logits, rows of nothing else, and NaN behave as in a log-softmax.
void test_special_values() {
  const double inf = std::numeric_limits<double>::infinity();
  Experiment e({4, 40, 0}, DType::kFloat32);
  for (int64_t v = 0; v < 40; ++v) {
    e.logits.set(v, v == 7 ? 1.0 : -inf);
    e.logits.set(40 + v, -inf);
    e.logits.set(80 + v, v == 9 ? std::nan("") : 0.0);
    e.logits.set(120 + v, std::nan(""));
  }
  Array max(DType::kFloat32, 4, "max"), sum(DType::kFloat32, 4, "sum"),
      entropy(DType::kFloat32, 4, "entropy");
  std::vector<int64_t> argmax(4, -1);
  const GlobalBuffer argmax_guard(argmax.data(), 32, "argmax", BufferAccess::kReadWrite, 8);
  TokenStatistics statistics{max.data(), sum.data(),     nullptr,      nullptr,
                             nullptr,    entropy.data(), argmax.data()};
  CHECK(row_statistics(e.slice(0), statistics, false, nullptr).ok());
  CHECK(max.at(0) == 1.0 && sum.at(0) == 1.0 && entropy.at(0) == 1.0);
  CHECK(max.at(1) == -inf && sum.at(1) == 0.0);
  CHECK(argmax[0] == 7 && argmax[1] == 0);
  CHECK(std::isnan(sum.at(2)));
  CHECK(std::isnan(sum.at(3)));

  // Coefficients of zero: an ignored token, whose gradient is zero whatever its logits.
  Array lse(DType::kFloat32, 4, "lse"), A(DType::kFloat32, 4, "A"), C(DType::kFloat32, 4, "C");
  for (int64_t n = 0; n < 4; ++n) {
    lse.set(n, n == 0 ? 1.0 : 0.0);
    A.set(n, n == 0 ? 1.0 : 0.0);
    C.set(n, 0.0);
  }
  const GradientCoefficients coefficients{lse.data(), A.data(), nullptr, C.data(), nullptr};
  CHECK(logits_gradient(e.slice(0), coefficients, DType::kBFloat16, nullptr).ok());
  for (int64_t n = 0; n < 4; ++n)
    for (int64_t v = 0; v < 40; ++v)
      CHECK(e.logits.at(n * 80 + v, DType::kBFloat16) == (n == 0 && v == 7 ? 1.0 : 0.0));
}

void test_statuses() {
  Experiment e({1, 8, 0}, DType::kBFloat16);
  const GradientCoefficients coefficients;
  CHECK(!logits_gradient(e.slice(0), coefficients, DType::kFloat32, nullptr).ok());
  CHECK(!row_statistics(e.slice(0), TokenStatistics{}, false, nullptr).ok());
  LogitsBlock empty;
  CHECK(row_statistics(empty, TokenStatistics{}, false, nullptr).ok());
  CHECK(logits_gradient(empty, coefficients, DType::kFloat32, nullptr).ok());
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_every_dtype();
  test_special_values();
  test_statuses();
  CHECK(emulator::reports().empty());
  emulator::print_reports();
  std::printf("largest error: %.2f of the tolerance\n", worst_error);
  return emulator::finish("test_generic_kernels");
}
