// The sm_90a products, emulated, against double precision: both dtypes, ragged shapes, every
// output, without and with clusters. Two blocks, or clusters, share the work, so that each computes
// several tiles and its ring of stages wraps.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "core/tiling.h"
#include "cuda/launch.h"
#include "emulator/check.h"
#include "emulator/work_list.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::BufferAccess;
using emulator::GlobalBuffer;

namespace {

double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
double to_double(__half x) { return __half2float(x); }
template <class T>
constexpr DType kDtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
// Half a unit in the last place of 1.
template <class T>
constexpr double kRounding = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;

// Where rows end: with their last element, or, where TMA stores them, with its 16 bytes.
enum class RowEnd { kElement, kPiece };

// A registered matrix whose rows are `stride` apart; outputs start as NaN. Beyond the last row's end
// nothing may be touched, and padding between rows must keep its value.
template <class T>
struct Matrix {
  int64_t rows, columns, stride, end;  // of what may be written of a row
  T* data;
  static constexpr int kAlignment = 16;

  Matrix(int64_t rows, int64_t columns, int64_t padding = 0,
         BufferAccess access = BufferAccess::kReadWrite, RowEnd row_end = RowEnd::kElement)
      : rows(rows),
        columns(columns),
        stride(columns + padding),
        end(row_end == RowEnd::kElement ? columns : round_up(columns, 16 / int64_t{sizeof(T)})),
        storage_(bytes() + kAlignment) {
    const auto base = reinterpret_cast<uintptr_t>(storage_.data());
    data = reinterpret_cast<T*>((base + kAlignment - 1) / kAlignment * kAlignment);
    std::memset(static_cast<void*>(data), 0xff, bytes());
    guard_.reset(new GlobalBuffer(data, bytes(), "matrix", access, sizeof(T) == 1 ? 1 : 2));
  }
  T& at(int64_t row, int64_t column) { return data[row * stride + column]; }
  bool padding_is_intact() const {
    for (int64_t row = 0; row + 1 < rows; ++row)
      for (int64_t i = row * stride + end; i < (row + 1) * stride; ++i)
        for (size_t byte = 0; byte < sizeof(T); ++byte)
          if (reinterpret_cast<const unsigned char*>(data + i)[byte] != 0xff) return false;
    return true;
  }

 private:
  size_t bytes() const { return ((rows - 1) * stride + end) * sizeof(T); }
  std::vector<unsigned char> storage_;
  std::unique_ptr<GlobalBuffer> guard_;
};

constexpr auto kInput = BufferAccess::kReadOnly;

struct Family {
  const char* name;
  LinearStatistics* linear_statistics;
  LinearGradient* linear_gradient;
  cuda::GradientProduct *grad_input_product, *grad_weight_product;
};
constexpr Family kFamilies[] = {{"sm90", sm90::linear_statistics, sm90::linear_gradient,
                                 sm90::grad_input_product, sm90::grad_weight_product},
                                {"sm90x2", sm90x2::linear_statistics, sm90x2::linear_gradient,
                                 sm90x2::grad_input_product, sm90x2::grad_weight_product}};
Family family;  // under test

// ---- x W^T: statistics, scores, gradient ----

struct Case {
  int64_t tokens, features, classes;
  int64_t padding = 0;  // between rows of everything 16-bit, in elements
  int64_t first_class = 0;
  int64_t classes_per_range = 256;
  bool options = false;  // bias, class weights, scale, cap
  bool full = false;     // all statistics
  bool store = false;
  bool infinities = false;  // -inf, NaN and the lowest float among the logits
};

template <class T>
struct Linear {
  Case c;
  Matrix<T> x, w;
  Matrix<float> bias, weight;
  Matrix<int64_t> target;
  std::vector<std::vector<double>> z;  // [tokens][classes]

  explicit Linear(const Case& of)
      : c(of),
        x(c.tokens, c.features, c.padding, kInput),
        w(c.classes, c.features, c.padding, kInput),
        bias(1, c.first_class + c.classes, 0, kInput),
        weight(1, c.first_class + c.classes, 0, kInput),
        target(1, c.tokens, 0, kInput) {
    std::mt19937 random(29);
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < c.tokens; ++n)
      for (int64_t k = 0; k < c.features; ++k) x.at(n, k) = T(normal(random));
    for (int64_t v = 0; v < c.classes; ++v)
      for (int64_t k = 0; k < c.features; ++k) w.at(v, k) = T(normal(random) * 0.3f);
    for (int64_t v = 0; v < bias.columns; ++v) bias.at(0, v) = normal(random);
    for (int64_t v = 0; v < bias.columns; ++v) weight.at(0, v) = std::abs(normal(random));
    for (int64_t n = 0; n < c.tokens; ++n)
      target.at(0, n) = c.first_class + static_cast<int64_t>(random() % c.classes);
    if (c.tokens > 4) {
      target.at(0, 3) = -100;
      target.at(0, 4) = c.first_class + c.classes;  // in the next block
      target.at(0, 2) = c.first_class - 1;          // in the previous one, or none
    }
    if (c.infinities) {
      bias.at(0, c.first_class + 1) = -INFINITY;
      for (int64_t v = 128; v < 256 && v < c.classes; ++v)
        bias.at(0, c.first_class + v) = -INFINITY;
      // Masked the other way, before classes that are not.
      for (int64_t v = 256; v < 384 && v < c.classes; ++v)
        bias.at(0, c.first_class + v) = -std::numeric_limits<float>::max();
      for (int64_t k = 0; k < c.features; ++k) x.at(c.tokens - 1, k) = T(NAN);
    }
    z.assign(c.tokens, std::vector<double>(c.classes));
    for (int64_t n = 0; n < c.tokens; ++n)
      for (int64_t v = 0; v < c.classes; ++v) {
        double u = 0;
        for (int64_t k = 0; k < c.features; ++k) u += to_double(x.at(n, k)) * to_double(w.at(v, k));
        if (c.options || c.infinities) u += bias.at(0, c.first_class + v);
        z[n][v] = c.options ? 9.0 * std::tanh(0.7 * u / 9.0) : u;
      }
  }
  Block block() const { return {c.first_class, c.classes, c.tokens}; }
  LinearOperands operands() { return {x.data, x.stride, w.data, w.stride, c.features, kDtype<T>}; }
  LogitTerms terms() {
    LogitTerms terms;
    if (c.options || c.infinities) terms.bias = bias.data;
    if (!c.options) return terms;
    terms.class_weight = weight.data;
    terms.logit_scale = 0.7;
    terms.softcap = 9.0;
    return terms;
  }
  Targets targets() {
    Targets targets;
    targets.index = target.data;
    return targets;
  }
  // Counted from the block's first class; -1: outside.
  int64_t target_of(int64_t n) {
    const int64_t v = target.at(0, n) - c.first_class;
    return target.at(0, n) >= 0 && v >= 0 && v < c.classes ? v : -1;
  }
};

template <class T>
void test_statistics(const Case& c) {
  Linear<T> linear(c);
  const int64_t ranges = (c.classes + c.classes_per_range - 1) / c.classes_per_range;
  Matrix<float> max(ranges, c.tokens, 5), sum(ranges, c.tokens, 3), entropy(ranges, c.tokens, 3),
      smooth(ranges, c.tokens, 3), hit(1, c.tokens);
  Matrix<int32_t> argmax(ranges, c.tokens, 3);
  Matrix<__half> kept(c.classes, c.tokens, (8 - c.tokens % 8) % 8 + c.padding,
                      BufferAccess::kReadWrite, RowEnd::kPiece);
  PartialStatistics partials;
  partials.max = max.data;
  partials.max_stride = max.stride;
  partials.stride = sum.stride;
  partials.sum = sum.data;
  if (c.full) {
    partials.entropy = entropy.data;
    partials.smooth = smooth.data;
    partials.argmax = argmax.data;
  }
  StoredScores scores;
  if (c.store) scores = {kept.data, kept.stride, max.data, max.stride};
  const Status status =
      family.linear_statistics(linear.block(), linear.operands(), linear.terms(), linear.targets(),
                               c.classes_per_range, partials, hit.data, scores, nullptr);
  CHECK(status.ok());
  CHECK(max.padding_is_intact() && sum.padding_is_intact() && kept.padding_is_intact());

  for (int64_t n = 0; n < c.tokens; ++n) {
    const auto& z = linear.z[n];
    const int64_t y = linear.target_of(n);
    const bool is_nan = c.infinities && n == c.tokens - 1;
    if (y < 0)
      CHECK(std::isnan(hit.at(0, n)));  // not touched
    else
      CHECK(is_nan ? std::isnan(hit.at(0, n))
                   : hit.at(0, n) == z[y] ||
                         std::abs(hit.at(0, n) - z[y]) < 1e-5 * (1 + std::abs(z[y])));
    for (int64_t range = 0; range < ranges; ++range) {
      if (is_nan) {
        CHECK(std::isnan(sum.at(range, n)));
        continue;
      }
      const int64_t begin = range * c.classes_per_range;
      const int64_t end = std::min(begin + c.classes_per_range, c.classes);
      double top = -INFINITY, total = 0, wanted_entropy = 0, wanted_smooth = 0, magnitude = 0;
      for (int64_t v = begin; v < end; ++v) top = std::max(top, z[v]);
      if (top == -INFINITY) {
        CHECK(max.at(range, n) == -INFINITY && sum.at(range, n) == 0.f);
        if (c.full) CHECK(argmax.at(range, n) == c.first_class + begin);
        if (c.store) CHECK(to_double(kept.at(begin, n)) == 0.0);
        continue;
      }
      for (int64_t v = begin; v < end; ++v) {
        const double p = std::exp(z[v] - top);
        total += p;
        if (p > 0) wanted_entropy += p * (z[v] - top);
        const double term = (c.options ? linear.weight.at(0, c.first_class + v) : 1.0) * z[v];
        wanted_smooth += term;
        magnitude += std::abs(term);
      }
      const double tolerance = 1e-5 * (1 + std::abs(top));
      CHECK(std::abs(max.at(range, n) - top) < tolerance);
      CHECK(std::abs(sum.at(range, n) / total - 1) < tolerance);
      if (c.store) {
        for (int64_t v = begin; v < end; ++v) {
          const double wanted = std::exp(z[v] - max.at(range, n));
          CHECK(std::abs(to_double(kept.at(v, n)) - wanted) <
                wanted * (0x1p-11 + 2 * tolerance) + 0x1p-25);
        }
      }
      if (!c.full) continue;
      CHECK(std::abs(entropy.at(range, n) - wanted_entropy) < 4 * tolerance * total);
      CHECK(wanted_smooth < -std::numeric_limits<float>::max()
                ? smooth.at(range, n) == -INFINITY
                : std::abs(smooth.at(range, n) - wanted_smooth) < tolerance * (1 + magnitude));
      const int64_t best = argmax.at(range, n) - c.first_class;
      CHECK(best >= begin && best < end && z[best] > top - tolerance);
    }
  }
}

void test_linear_statistics(bool thorough) {
  test_statistics<__nv_bfloat16>({130, 72, 700, 8, 0, 512, true, true});
  test_statistics<__half>({77, 200, 389, 0, 1000, 128, false, false, true});
  if (!thorough) return;
  test_statistics<__nv_bfloat16>({1, 8, 5});
  test_statistics<__half>({300, 64, 1300, 8, 640, 384, true, false});
  test_statistics<__nv_bfloat16>({129, 328, 512, 24, 0, 128, true, true, true});
  test_statistics<__half>({20, 72, 600, 0, 128, 256, false, true, false, true});
  test_statistics<__nv_bfloat16>({20, 72, 600, 0, 128, 128, false, true, true, true});
  test_statistics<__nv_bfloat16>({40, 40, 530, 0, 0, int64_t{1} << 40, false, true});
}

// Equal logits: the first class is the largest, in every half, quad and register.
void test_argmax_of_equals() {
  constexpr int64_t kClasses = 384;
  Case c{9, 64, kClasses};
  Linear<__nv_bfloat16> linear(c);
  Matrix<__nv_bfloat16> w(kClasses, c.features, 0, kInput);
  Matrix<float> max(1, c.tokens), sum(1, c.tokens);
  Matrix<int32_t> argmax(1, c.tokens);
  for (const int64_t first : {0, 1, 2, 9, 130, 255, 257, 383}) {
    for (int64_t v = 0; v < kClasses; ++v)
      for (int64_t k = 0; k < c.features; ++k)
        w.at(v, k) = k == 0 && v < first ? __nv_bfloat16(-1.f) : __nv_bfloat16(0.f);
    for (int64_t n = 0; n < c.tokens; ++n) linear.x.at(n, 0) = __nv_bfloat16(1.f);
    LinearOperands operands = linear.operands();
    operands.weight = w.data;
    operands.weight_stride = w.stride;
    PartialStatistics partials;
    partials.max = max.data;
    partials.sum = sum.data;
    partials.argmax = argmax.data;
    partials.max_stride = partials.stride = c.tokens;
    CHECK(family
              .linear_statistics(linear.block(), operands, {}, {}, kClasses, partials, nullptr, {},
                                 nullptr)
              .ok());
    for (int64_t n = 0; n < c.tokens; ++n) CHECK(argmax.at(0, n) == first);
  }
}

template <class T>
void test_gradient(const Case& c, bool marks, bool smoothing, double skip_mass = 1e-2) {
  Linear<T> linear(c);
  std::mt19937 random(31);
  std::normal_distribution<float> normal;
  Matrix<float> shift(1, c.tokens, 0, kInput), softmax(1, c.tokens, 0, kInput),
      entropy(1, c.tokens, 0, kInput), centre(1, c.tokens, 0, kInput),
      target(1, c.tokens, 0, kInput), rest(1, c.tokens, 0, kInput),
      weighted(1, c.tokens, 0, kInput);
  for (int64_t n = 0; n < c.tokens; ++n) {
    double total = 0;
    for (const double z : linear.z[n]) total += std::exp(z);
    // Part of the vocabulary: its probabilities need not add up to 1.
    shift.at(0, n) = static_cast<float>(std::log(total) + 0.1);
    softmax.at(0, n) = normal(random);
    entropy.at(0, n) = c.full ? normal(random) * 0.1f : 0.f;
    centre.at(0, n) = normal(random);
    target.at(0, n) = normal(random);
    rest.at(0, n) = softmax.at(0, n) + target.at(0, n);
    weighted.at(0, n) = smoothing ? normal(random) * 0.01f : 0.f;
  }
  const int64_t ignored = c.tokens - 1;  // whose logits are NaN in the cases with infinities
  for (Matrix<float>* m : {&softmax, &entropy, &target, &rest, &weighted}) m->at(0, ignored) = 0.f;
  Coefficients coefficients;
  coefficients.shift = shift.data;
  coefficients.softmax = softmax.data;
  coefficients.target = target.data;
  coefficients.target_rest = rest.data;
  if (c.full) {
    coefficients.entropy = entropy.data;
    coefficients.centre = centre.data;
  }
  if (smoothing) coefficients.weighted = weighted.data;

  const int64_t class_tiles = (c.classes + 127) / 128, token_tiles = (c.tokens + 127) / 128;
  constexpr int64_t kVocab = 5000;
  Matrix<T> gradient(c.classes, c.tokens, (8 - c.tokens % 8) % 8 + c.padding,
                     BufferAccess::kReadWrite, RowEnd::kPiece);
  Matrix<uint8_t> tiles(class_tiles, token_tiles, 2);
  const Status status = family.linear_gradient(linear.block(), linear.operands(), linear.terms(),
                                               linear.targets(), coefficients, gradient.data,
                                               gradient.stride, marks ? tiles.data : nullptr,
                                               tiles.stride, skip_mass, kVocab, nullptr);
  CHECK(status.ok());
  CHECK(gradient.padding_is_intact() && tiles.padding_is_intact());

  for (int64_t n = 0; n < c.tokens; ++n)
    for (int64_t v = 0; v < c.classes; ++v) {
      const double z = linear.z[n][v], p = std::exp(z - shift.at(0, n));
      const double w = c.options ? linear.weight.at(0, c.first_class + v) : 1.0;
      double wanted = p * softmax.at(0, n) + weighted.at(0, n) * w;
      if (p > 0) wanted += p * entropy.at(0, n) * (z - centre.at(0, n));
      double terms = std::abs(p * softmax.at(0, n)) + std::abs(weighted.at(0, n) * w);
      if (p > 0) terms += std::abs(p * entropy.at(0, n) * (z - centre.at(0, n)));
      if (v == linear.target_of(n)) {
        wanted += target.at(0, n);
        terms += std::abs(target.at(0, n));
      }
      if (c.options) wanted *= 1 - z * z / 81;
      if (n == ignored) wanted = terms = 0;
      const double got = to_double(gradient.at(v, n));
      CHECK(std::abs(got - wanted) <= std::abs(wanted) * kRounding<T> + terms * 3e-5 + 0x1p-25);
    }
  if (!marks) return;
  int skipped = 0;
  for (int64_t i = 0; i < class_tiles; ++i)
    for (int64_t j = 0; j < token_tiles; ++j) {
      const int64_t end = std::min((i + 1) * 128, c.classes);
      const double limit = skip_mass * static_cast<double>(end - i * 128) / kVocab;
      bool keep = false, close = false;
      for (int64_t n = j * 128; n < std::min((j + 1) * 128, c.tokens); ++n) {
        double mass = 0;
        for (int64_t v = i * 128; v < end; ++v) {
          if (n != ignored) mass += std::exp(linear.z[n][v] - shift.at(0, n));
          keep |= v == linear.target_of(n);
        }
        keep |= !(mass < limit);
        close |= std::abs(mass / limit - 1) < 1e-4;
      }
      skipped += !keep;
      CHECK(close || tiles.at(i, j) == (keep ? 1 : 0));
    }
  CHECK(skipped > 0 || skip_mass == 0);
}

void test_linear_gradient(bool thorough) {
  test_gradient<__nv_bfloat16>({130, 72, 700, 8, 0, 0, true, true}, true, true, 0);
  // Four tokens: most tiles have no target, and a generous bound leaves some of them out.
  test_gradient<__half>({4, 72, 1500, 0, 1000}, true, false, 30);
  if (!thorough) return;
  test_gradient<__half>({77, 200, 389, 0, 1000}, false, false);
  test_gradient<__nv_bfloat16>({1, 8, 5}, false, false);
  test_gradient<__nv_bfloat16>({150, 64, 2300, 8, 128}, true, false, 40);
  test_gradient<__half>({20, 72, 600, 8, 128, 0, false, true, false, true}, true, true, 0);
}

// ---- G^T W and G x ----

struct ProductCase {
  int64_t classes, tokens, features;
  int64_t padding = 0;  // between rows of everything
  bool marks = false;
};

struct Product {
  bool of_weight;
  ProductOfGradient kind() const {
    return of_weight ? ProductOfGradient::kGradWeight : ProductOfGradient::kGradInput;
  }
  Status operator()(int64_t classes, int64_t tokens, const GradientOperands& operands,
                    const ProductOutput& output) const {
    return (of_weight ? family.grad_weight_product : family.grad_input_product)(
        classes, tokens, operands, output, nullptr);
  }
};

template <class T>
void test_product(const ProductCase& c, bool of_weight) {
  std::mt19937 random(37);
  std::normal_distribution<float> normal;
  const int64_t rows = of_weight ? c.classes : c.tokens, k = of_weight ? c.tokens : c.classes;
  const int64_t token_tiles = (c.tokens + 127) / 128;
  Matrix<T> g(c.classes, c.tokens, (8 - c.tokens % 8) % 8 + c.padding, kInput);
  Matrix<T> other(k, c.features, c.padding, kInput);
  Matrix<uint8_t> tiles((c.classes + 127) / 128, token_tiles, 1, kInput);
  for (int64_t v = 0; v < c.classes; ++v)
    for (int64_t n = 0; n < c.tokens; ++n) g.at(v, n) = T(normal(random));
  for (int64_t i = 0; i < k; ++i)
    for (int64_t d = 0; d < c.features; ++d) other.at(i, d) = T(normal(random));
  for (int64_t i = 0; i < tiles.rows; ++i)
    for (int64_t j = 0; j < token_tiles; ++j)
      // Also rows and columns of tiles none of which counts.
      tiles.at(i, j) = random() % 3 == 0 && i != 1 && j != 1;

  std::vector<double> wanted(rows * c.features), magnitude(rows * c.features);
  for (int64_t v = 0; v < c.classes; ++v)
    for (int64_t n = 0; n < c.tokens; ++n) {
      if (c.marks && tiles.at(v / 128, n / 128) == 0) continue;
      const int64_t row = of_weight ? v : n, i = of_weight ? n : v;
      for (int64_t d = 0; d < c.features; ++d) {
        const double term = to_double(g.at(v, n)) * to_double(other.at(i, d));
        wanted[row * c.features + d] += term;
        magnitude[row * c.features + d] += std::abs(term);
      }
    }

  const Product product{of_weight};
  const ListedWork work(product.kind(), c.classes, c.tokens, tiles.data, tiles.stride);
  GradientOperands operands{g.data, g.stride, other.data, other.stride, c.features, kDtype<T>};
  if (c.marks) operands.list = work.list;
  const auto expect = [&](auto&& value, double factor, double rounding) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t d = 0; d < c.features; ++d) {
        const double w = wanted[row * c.features + d] * factor;
        const double tolerance =
            std::abs(w) * rounding + magnitude[row * c.features + d] * factor * 1e-6;
        CHECK(std::abs(value(row, d) - w) <= tolerance);
      }
  };

  Matrix<float> sums(rows, c.features, c.padding);
  ProductOutput output;
  output.sums = sums.data;
  output.sums_stride = sums.stride;
  CHECK(product(c.classes, c.tokens, operands, output).ok());
  const auto sum = [&](int64_t row, int64_t d) { return static_cast<double>(sums.at(row, d)); };
  expect(sum, 1, 0);
  output.accumulate = true;
  CHECK(product(c.classes, c.tokens, operands, output).ok());
  expect(sum, 2, 0);
  CHECK(sums.padding_is_intact());

  Matrix<float> scale(1, 1, 0, kInput);
  scale.at(0, 0) = 0.37f;
  Matrix<T> gradient(rows, c.features, c.padding);
  output = {};
  output.gradient = gradient.data;
  output.gradient_stride = gradient.stride;
  output.scale = scale.data;
  output.beside = true;  // of the one that adds to the sums: other memory, more blocks
  CHECK(product(c.classes, c.tokens, operands, output).ok());
  output.beside = false;
  const auto value = [&](int64_t row, int64_t d) { return to_double(gradient.at(row, d)); };
  expect(value, 0.37f, kRounding<T>);
  output.update = WeightUpdate::kAddNative;
  CHECK(product(c.classes, c.tokens, operands, output).ok());
  expect(value, 2 * 0.37f, 2 * kRounding<T>);

  Matrix<uint16_t> remainder(rows, c.features, c.padding);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    output.split.remainder = remainder.data;
    output.split.remainder_stride = remainder.stride;
    for (const WeightUpdate update :
         {WeightUpdate::kSplitFirst, WeightUpdate::kSplitNext, WeightUpdate::kSplitLast}) {
      output.update = update;
      CHECK(product(c.classes, c.tokens, operands, output).ok());
      if (update != WeightUpdate::kSplitNext) continue;
      const auto joined = [&](int64_t row, int64_t d) {
        uint16_t upper;
        std::memcpy(&upper, &gradient.at(row, d), 2);
        const uint32_t bits = uint32_t{upper} << 16 | remainder.at(row, d);
        float both;
        std::memcpy(&both, &bits, 4);
        return static_cast<double>(both);
      };
      expect(joined, 2, 0);
    }
    expect(value, 3 * 0.37f, kRounding<T>);
  } else {
    output.update = WeightUpdate::kSplitFirst;
    CHECK(!product(c.classes, c.tokens, operands, output).ok());
  }
  CHECK(gradient.padding_is_intact() && remainder.padding_is_intact());
}

void test_products(bool thorough) {
  for (const bool of_weight : {false, true}) {
    test_product<__nv_bfloat16>({300, 264, 72, 8, true}, of_weight);
    test_product<__nv_bfloat16>({300, 290, 72, 8}, of_weight);
    if (!thorough) continue;
    test_product<__half>({300, 290, 264}, of_weight);
    test_product<__half>({200, 77, 328}, of_weight);
    test_product<__nv_bfloat16>({5, 1, 8}, of_weight);
    test_product<__half>({520, 136, 264, 8, true}, of_weight);
  }
}

// Few of many k tiles count: no others are loaded.
void test_few_tiles() {
  for (const bool of_weight : {false, true}) {
    constexpr int64_t kMany = 40 * 128 - 60;
    const ProductCase c{of_weight ? 8 : kMany, of_weight ? kMany : 8, 8};
    Matrix<__half> g(c.classes, c.tokens, (8 - c.tokens % 8) % 8, kInput),
        other(kMany, c.features, 0, kInput);
    Matrix<uint8_t> tiles((c.classes + 127) / 128, (c.tokens + 127) / 128, 0, kInput);
    Matrix<float> sums(8, c.features);
    for (int64_t i = 0; i < c.classes * g.stride; ++i)
      if (i % g.stride < c.tokens) g.data[i] = __half(1.f);
    for (int64_t i = 0; i < kMany * c.features; ++i) other.data[i] = __half(1.f);
    double wanted = 0;
    for (const int64_t i : {3, 31, 32, 39}) wanted += std::min<int64_t>(128, kMany - i * 128);
    for (int64_t i = 0; i < 40; ++i)
      (of_weight ? tiles.at(0, i) : tiles.at(i, 0)) = i == 3 || i == 31 || i == 32 || i == 39;
    const Product product{of_weight};
    const ListedWork work(product.kind(), c.classes, c.tokens, tiles.data, tiles.stride);
    const GradientOperands operands{g.data,     g.stride,        other.data, other.stride,
                                    c.features, DType::kFloat16, work.list};
    ProductOutput output;
    output.sums = sums.data;
    output.sums_stride = sums.stride;
    const auto before = emulator::counters().tma;
    CHECK(Product{of_weight}(c.classes, c.tokens, operands, output).ok());
    // 8 tiles of k 64 wide: A in 1 or 2 boxes, B in 4; and 2 x 8 boxes of results. A GPU counts none.
    const auto counted = emulator::counters().tma - before;
    CHECK(emulator::counters().tma == 0 || counted == 8 * ((of_weight ? 1 : 2) + 4) + 16);
    for (int64_t i = 0; i < 8; ++i)
      for (int64_t d = 0; d < 8; ++d) CHECK(sums.at(i, d) == static_cast<float>(wanted));
  }
}

void test_refusals() {
  Linear<__half> linear({8, 64, 16});
  Matrix<float> max(1, 8), sum(1, 8);
  PartialStatistics partials;
  partials.max = max.data;
  partials.sum = sum.data;
  partials.max_stride = partials.stride = 8;
  const auto accepted = [&](const LinearOperands& operands, int64_t range, const Targets& targets) {
    return family
        .linear_statistics(linear.block(), operands, {}, targets, range, partials, nullptr, {},
                           nullptr)
        .ok();
  };
  const LinearOperands good = linear.operands();
  CHECK(sm90::accepts(good, nullptr, 0) && accepted(good, 256, {}));
  CHECK(!accepted(good, 64, {}));
  Targets probabilities;
  probabilities.probabilities = max.data;
  CHECK(!accepted(good, 256, probabilities));
  for (int defect = 0; defect < 4; ++defect) {
    LinearOperands bad = good;
    if (defect == 0) bad.input_stride += 4;
    if (defect == 1) bad.weight_stride += 4;
    if (defect == 2) bad.input = static_cast<const char*>(bad.input) + 8;
    if (defect == 3) bad.dtype = DType::kFloat32;
    CHECK(!sm90::accepts(bad, nullptr, 0) && !accepted(bad, 256, {}));
  }
  CHECK(!sm90::accepts(good, max.data, 12));
}

// Runs `body` under every delivery policy and schedule; `thorough` once for each policy.
void run(const char* what, const std::function<void(bool thorough)>& body) {
  emulator::for_every_schedule([&](const char* variant) {
    body(emulator::config().schedule == emulator::Schedule::kInOrder);
    if (emulator::reports().empty()) return;
    ++emulator::failed_checks;
    std::printf("FAILED %s of %s: reports under %s\n", what, family.name, variant);
    emulator::print_reports();
  });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  for (const Family& one : kFamilies) {
    family = one;
    run("linear_statistics", test_linear_statistics);
    run("linear_gradient", test_linear_gradient);
    run("gradient products", test_products);
    test_argmax_of_equals();
    test_few_tiles();
    test_refusals();
    CHECK(emulator::reports().empty());
  }
  return emulator::finish("test_sm90_kernels");
}
