// The sm_90a products, emulated, against double precision: both dtypes, ragged shapes, every output.
// Two blocks share the work, so that each computes several tiles and its ring of stages wraps.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "emulator/check.h"

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

// A registered matrix whose rows are `stride` apart; outputs start as NaN. Beyond the last row's end
// nothing may be touched, and padding between rows must keep its value.
template <class T>
struct Matrix {
  int64_t rows, columns, stride;
  T* data;
  static constexpr int kAlignment = 16;

  Matrix(int64_t rows, int64_t columns, int64_t padding = 0,
         BufferAccess access = BufferAccess::kReadWrite)
      : rows(rows), columns(columns), stride(columns + padding), storage_(bytes() + kAlignment) {
    const auto base = reinterpret_cast<uintptr_t>(storage_.data());
    data = reinterpret_cast<T*>((base + kAlignment - 1) / kAlignment * kAlignment);
    std::memset(static_cast<void*>(data), 0xff, bytes());
    guard_.reset(new GlobalBuffer(data, bytes(), "matrix", access));
  }
  T& at(int64_t row, int64_t column) { return data[row * stride + column]; }
  bool padding_is_intact() const {
    for (int64_t row = 0; row + 1 < rows; ++row)
      for (int64_t i = row * stride + columns; i < (row + 1) * stride; ++i)
        for (size_t byte = 0; byte < sizeof(T); ++byte)
          if (reinterpret_cast<const unsigned char*>(data + i)[byte] != 0xff) return false;
    return true;
  }

 private:
  size_t bytes() const { return ((rows - 1) * stride + columns) * sizeof(T); }
  std::vector<unsigned char> storage_;
  std::unique_ptr<GlobalBuffer> guard_;
};

constexpr auto kInput = BufferAccess::kReadOnly;

// ---- x W^T: statistics, scores, gradient ----

struct Case {
  int64_t tokens, features, classes;
  int64_t padding = 0;  // between rows of everything 16-bit, in elements
  int64_t first_class = 0;
  int64_t classes_per_range = 256;
  bool options = false;  // bias, class weights, scale, cap
  bool full = false;     // all statistics
  bool store = false;
  bool infinities = false;  // -inf and NaN among the logits
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
  Matrix<__half> kept(c.classes, c.tokens, (8 - c.tokens % 8) % 8 + c.padding);
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
      sm90::linear_statistics(linear.block(), linear.operands(), linear.terms(), linear.targets(),
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
      CHECK(wanted_smooth == -INFINITY
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
    CHECK(sm90::linear_statistics(linear.block(), operands, {}, {}, kClasses, partials, nullptr, {},
                                  nullptr)
              .ok());
    for (int64_t n = 0; n < c.tokens; ++n) CHECK(argmax.at(0, n) == first);
  }
}

// Runs `body` under every delivery policy and schedule; `thorough` once for each policy.
void run(const char* what, const std::function<void(bool thorough)>& body) {
  emulator::for_every_schedule([&](const char* variant) {
    body(emulator::config().schedule == emulator::Schedule::kInOrder);
    if (emulator::reports().empty()) return;
    ++emulator::failed_checks;
    std::printf("FAILED %s: reports under %s\n", what, variant);
    emulator::print_reports();
  });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  run("linear_statistics", test_linear_statistics);
  test_argmax_of_equals();
  return emulator::finish("test_sm90_kernels");
}
