// linear_statistics of sm_80, emulated, against double precision.
#include <algorithm>

#include "cuda/sm80/kernels.h"
#include "kernels/linear_case.h"

using namespace memeff;
using namespace memeff::cuda;

namespace {

struct Options {
  bool entropy = false, smooth = false, argmax = false, target = true;
  bool store = false;
  int64_t score_padding = 0, score_offset = 0;
};

constexpr int64_t kRange = kStoredTile;

struct Computed {
  Computed(const LinearShape& shape, const Options& options)
      : ranges((shape.classes + kRange - 1) / kRange),
        max("max", ranges, shape.tokens, 5, 0, BufferAccess::kReadWrite),
        sum("sum", ranges, shape.tokens, 3, 0, BufferAccess::kReadWrite),
        entropy("entropy", ranges, shape.tokens, 3, 0, BufferAccess::kReadWrite),
        smooth("smooth", ranges, shape.tokens, 3, 0, BufferAccess::kReadWrite),
        argmax("argmax", ranges * (shape.tokens + 3), BufferAccess::kReadWrite),
        target("target logit", shape.tokens, BufferAccess::kReadWrite),
        scores("scores", shape.classes, shape.tokens, options.score_padding, options.score_offset,
               BufferAccess::kReadWrite) {
    std::fill(argmax.begin(), argmax.end(), -7);
    std::fill(target.begin(), target.end(), 77.f);
  }
  int64_t ranges;
  GuardedMatrix<float> max, sum, entropy, smooth;
  GuardedArray<int32_t> argmax;
  GuardedArray<float> target;
  GuardedMatrix<__half> scores;
};

template <class T>
Status run(LinearCase<T>& c, const Options& options, Computed& out) {
  PartialStatistics partials;
  partials.max = out.max.data();
  partials.max_stride = out.max.stride;
  partials.stride = out.sum.stride;
  partials.sum = out.sum.data();
  if (options.entropy) partials.entropy = out.entropy.data();
  if (options.smooth) partials.smooth = out.smooth.data();
  if (options.argmax) partials.argmax = out.argmax.data();
  StoredScores scores;
  if (options.store) {
    scores.data = out.scores.data();
    scores.stride = out.scores.stride;
    scores.maxima = out.max.data();
    scores.maxima_stride = out.max.stride;
  }
  return sm80::linear_statistics({c.block(), c.operands(), c.terms(), c.targets(), partials,
                                  options.target ? out.target.data() : nullptr, scores},
                                 nullptr);
}

template <class T>
void check_range(LinearCase<T>& c, const Options& options, Computed& out, int64_t range,
                 int64_t n) {
  const int64_t begin = range * kRange, end = std::min(begin + kRange, c.shape.classes);
  double top = -INFINITY, total = 0, entropy = 0, smooth = 0, runner_up = -INFINITY;
  int64_t argmax = begin;
  for (int64_t v = begin; v < end; ++v) {
    const double z = c.logit(n, v);
    if (z > top) {
      runner_up = top;
      top = z;
      argmax = v;
    } else {
      runner_up = std::max(runner_up, z);
    }
    smooth += c.class_weight(v) * z;
  }
  const double reference = std::isinf(top) ? 0 : top;
  for (int64_t v = begin; v < end; ++v) {
    const double z = c.logit(n, v) - reference, e = std::exp(z);
    total += e;
    if (e > 0) entropy += e * z;
  }
  const float max = out.max.at(range, n), sum = out.sum.at(range, n);
  if (std::isnan(total)) {
    CHECK(std::isnan(sum));
    return;
  }
  if (std::isinf(top)) {
    CHECK(max == -INFINITY && sum == 0);
    if (options.entropy) CHECK(out.entropy.at(range, n) == 0);
    if (options.argmax)
      CHECK(out.argmax[range * out.sum.stride + n] == c.shape.first_class + begin);
    return;
  }
  const double tolerance = 4e-6 * (1 + std::abs(top));
  CHECK(std::abs(max - top) < tolerance);
  CHECK(std::abs(std::log(sum) + max - std::log(total) - top) < tolerance);
  if (options.entropy)
    CHECK(std::abs(out.entropy.at(range, n) / sum - entropy / total) < 8 * tolerance);
  if (options.smooth && std::isfinite(smooth))
    CHECK(std::abs(out.smooth.at(range, n) - smooth) < tolerance * (1 + std::sqrt(end - begin)));
  if (!options.argmax) return;
  const int64_t found = out.argmax[range * out.sum.stride + n] - c.shape.first_class;
  // Logits that are equal bit by bit: the first wins. Nearly equal ones: any.
  if (runner_up == top || runner_up < top - 2 * tolerance)
    CHECK(found == argmax);
  else
    CHECK(found >= begin && found < end && c.logit(n, found) > top - 2 * tolerance);
}

template <class T>
void check_scores(LinearCase<T>& c, Computed& out, int64_t n) {
  for (int64_t v = 0; v < c.shape.classes; ++v) {
    const double e = to_double(out.scores.at(v, n)), max = out.max.at(v / 128, n);
    const double z = c.logit(n, v), tolerance = 8e-6 * (1 + std::abs(z));
    if (std::isnan(z)) {
      CHECK(std::isnan(e));
      continue;
    }
    const double wanted = std::isinf(max) ? 0 : std::exp(z - max);
    CHECK(std::abs(e - wanted) <= wanted * (0x1p-11 + tolerance) + kSmallestHalf);
    if (!std::isinf(max) && e >= 0x1p-10)  // as a number of its own
      CHECK(std::abs(std::log(e) + max - z) < 0x1p-11 + tolerance);
  }
}

template <class T>
void check_all(LinearCase<T>& c, const Options& options) {
  Computed out(c.shape, options);
  CHECK(run(c, options, out).ok());
  for (int64_t n = 0; n < c.shape.tokens; ++n) {
    for (int64_t range = 0; range < out.ranges; ++range) check_range(c, options, out, range, n);
    const int64_t target = c.target_of(n);
    if (!options.target || target < 0)
      CHECK(out.target[n] == 77.f);
    else if (std::isfinite(c.logit(n, target)))
      CHECK(std::abs(out.target[n] - c.logit(n, target)) <
            4e-6 * (1 + std::abs(c.logit(n, target))));
    if (options.store) check_scores(c, out, n);
  }
  CHECK(out.max.padding_is_untouched() && out.sum.padding_is_untouched());
  CHECK(out.scores.padding_is_untouched());
  if (!options.entropy) CHECK(std::isnan(out.entropy.at(0, 0)));
  if (!options.smooth) CHECK(std::isnan(out.smooth.at(0, 0)));
  if (!options.argmax) CHECK(out.argmax[0] == -7);
}

// Equal rows of W (so equal logits, large for some tokens), classes that are impossible, and a
// token that is not a number.
template <class T>
void plant_corner_cases(LinearCase<T>& c) {
  const int64_t classes = c.shape.classes;
  for (const int64_t twin : {classes / 2, classes - 1})
    for (int64_t k = 0; k < c.shape.features; ++k) c.w.at(twin, k) = c.w.at(classes / 3, k);
  const int64_t first = c.shape.first_class;
  c.bias[first + classes / 2] = c.bias[first + classes - 1] = c.bias[first + classes / 3];
  for (int64_t n = 0; n < c.shape.tokens; n += 3)
    for (int64_t k = 0; k < c.shape.features; ++k)
      c.x.at(n, k) = T(4.f * static_cast<float>(to_double(c.w.at(classes / 3, k))));
  if (c.shape.bias)
    for (int64_t v = classes / 128 * 128; v < classes - 1; ++v) c.bias[first + v] = -INFINITY;
  if (c.shape.tokens > 2) c.x.at(2, 0) = T(NAN);
}

template <class T>
void test_shapes(unsigned seed) {
  const struct {
    LinearShape shape;
    Options options;
  } cases[] = {
      {{1, 8, 5}, {}},
      {{130, 72, 300, 40, 0, 0, true, true, 0.7, 9.0}, {true, true, true, true}},
      {{5, 33, 259, 1}, {true, true, true, true}},                         // odd rows: unaligned
      {{129, 40, 129, 0, 3, 0, true}, {false, false, true, true}},         // odd strides
      {{70, 64, 131, 7, 0, 1, false, true}, {false, true, false, false}},  // odd addresses
      {{7, 104, 700, 128, 8, 0, true, false, 1.3}, {true, false, false, true}},
      {{7, 104, 700, 128, 8, 0, true, false, 1.3}, {false, false, false, true}},
      // stored
      {{1, 8, 5}, {false, false, false, true, true, 3, 1}},
      {{136, 48, 257, 256, 0, 0, true}, {false, false, false, true, true, 8}},
      {{131, 16, 300, 128, 0, 0, true, true, 0.5, 7.0}, {true, true, true, true, true, 0}},
      {{20, 31, 130, 0}, {false, false, false, true, true, 4, 8}},
  };
  for (const auto& test : cases) {
    LinearCase<T> c(test.shape, seed++);
    plant_corner_cases(c);
    c.compute_logits();
    check_all(c, test.options);
  }
}

// Every column, and with it every position in fragment, warp and tile, is some token's target.
template <class T>
void test_targets() {
  for (const int64_t shift : {0, 61, 100}) {
    LinearCase<T> c({139, 8, 139, 1000}, 5);
    for (int64_t n = 0; n < 139; ++n) c.target[n] = 1000 + (n + shift) % 139;
    c.compute_logits();
    check_all(c, {});
    Options store;
    store.store = true;
    check_all(c, store);
  }
}

// Sums come from fp32 exponentials: closer than rounding E to fp16 would allow.
void test_sums_are_not_rounded() {
  LinearCase<__half> c({130, 8, 128}, 3);
  c.shape.logit_scale = 0.25;
  c.compute_logits();
  Options options;
  options.store = true;
  Computed out(c.shape, options);
  CHECK(run(c, options, out).ok());
  double worst = 0;
  for (int64_t n = 0; n < 130; ++n) {
    double total = 0;
    for (int64_t v = 0; v < 128; ++v) total += std::exp(c.logit(n, v) - out.max.at(0, n));
    worst = std::max(worst, std::abs(out.sum.at(0, n) / total - 1));
  }
  CHECK(worst < 1e-6);
}

// The same bits whether scores are stored or not, and wherever a token stands among which others.
template <class T>
void test_bits() {
  LinearCase<T> c({133, 72, 300, 0, 0, 0, true}, 9);
  c.compute_logits();
  Options options{true, true, true};
  Options store = options;
  store.store = true;
  Computed all(c.shape, options), stored(c.shape, options);
  CHECK(run(c, options, all).ok() && run(c, store, stored).ok());
  // Half of them, each elsewhere.
  LinearCase<T> some({60, 72, 300, 0, 0, 0, true}, 9);
  const auto from = [](int64_t n) { return (n * 37 + 11) % 133; };
  for (int64_t n = 0; n < 60; ++n)
    for (int64_t k = 0; k < 72; ++k) some.x.at(n, k) = c.x.at(from(n), k);
  for (int64_t v = 0; v < 300; ++v) {
    some.bias[v] = c.bias[v];
    for (int64_t k = 0; k < 72; ++k) some.w.at(v, k) = c.w.at(v, k);
  }
  Computed few(some.shape, options);
  CHECK(run(some, options, few).ok());
  const auto same = [&](Computed& one, int64_t i, Computed& other, int64_t j) {
    for (int64_t range = 0; range < one.ranges; ++range) {
      CHECK(one.max.at(range, i) == other.max.at(range, j));
      CHECK(one.sum.at(range, i) == other.sum.at(range, j));
      CHECK(one.entropy.at(range, i) == other.entropy.at(range, j));
      CHECK(one.smooth.at(range, i) == other.smooth.at(range, j));
      CHECK(one.argmax[range * one.sum.stride + i] == other.argmax[range * other.sum.stride + j]);
    }
  };
  for (int64_t n = 0; n < 133; ++n) same(all, n, stored, n);
  for (int64_t n = 0; n < 60; ++n) same(few, n, all, from(n));
}

// Classes masked by the lowest finite number, a whole warp's half of a tile and more.
void test_lowest_logits() {
  LinearCase<__nv_bfloat16> c({70, 16, 300, 0, 0, 0, true}, 7);
  for (int64_t v = 64; v < 256; ++v) c.bias[v] = std::numeric_limits<float>::lowest();
  c.compute_logits();
  Options options;
  options.entropy = true;
  check_all(c, options);
}

void test_errors() {
  LinearCase<__half> c({4, 8, 8}, 1);
  Computed out(c.shape, {});
  const auto refused = [&](const Status& status, const char* part) {
    CHECK(!status.ok() && std::strstr(status.message, part) != nullptr);
  };
  PartialStatistics none;
  refused(sm80::linear_statistics(
              {c.block(), c.operands(), c.terms(), c.targets(), none, nullptr, {}}, nullptr),
          "max and sum");
  Targets probabilities;
  probabilities.probabilities = c.bias.data();
  refused(sm80::linear_statistics(
              {c.block(), c.operands(), c.terms(), probabilities, none, nullptr, {}}, nullptr),
          "probabilities");
  LinearOperands wrong = c.operands();
  wrong.dtype = DType::kFloat32;
  none.max = out.max.data();
  none.sum = out.sum.data();
  refused(sm80::linear_statistics({c.block(), wrong, c.terms(), c.targets(), none, nullptr, {}},
                                  nullptr),
          "bfloat16 or float16");
  Block empty = c.block();
  empty.tokens = 0;
  CHECK(sm80::linear_statistics({empty, c.operands(), c.terms(), c.targets(), none, nullptr, {}},
                                nullptr)
            .ok());
}

}  // namespace

int main() {
  for_clean_schedules("shapes", [] {
    test_shapes<__nv_bfloat16>(11);
    if (emulator::config().schedule == emulator::Schedule::kInOrder) test_shapes<__half>(31);
  });
  test_targets<__nv_bfloat16>();
  test_targets<__half>();
  test_sums_are_not_rounded();
  test_bits<__nv_bfloat16>();
  test_lowest_logits();
  test_errors();
  CHECK(emulator::counters().ldmatrix_conflicts == 0);
  CHECK(emulator::reports().empty());
  return emulator::finish("test_sm80_statistics_kernels");
}
