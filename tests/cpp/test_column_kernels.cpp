// Every version of the column kernels against plain loops in double, on ragged tiles. What lies beyond
// the tile, between rows and around them, must keep its bytes.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "kernel_variants.h"
#include "memory.h"

namespace {

using namespace memeff;
using test::GuardedBuffer;

struct Shape {
  int64_t classes, tokens, padding;
};

const Shape kShapes[] = {{1, 1, 0},  {3, 5, 2},    {7, 8, 0},    {14, 16, 1},
                         {5, 17, 3}, {224, 33, 0}, {40, 50, 14}, {2, 64, 7}};

/// A tile between guards, rows `stride` apart; the gaps stay poisoned.
template <class T>
struct Tile {
  Tile(const Shape& shape, uint64_t seed, double spread)
      : stride(shape.tokens + shape.padding),
        classes(shape.classes),
        tokens(shape.tokens),
        buffer((stride * (classes - 1) + tokens) * static_cast<int64_t>(sizeof(T))) {
    test::Random random(seed);
    for (int64_t v = 0; v < classes; ++v) {
      for (int64_t t = 0; t < tokens; ++t)
        at(v, t) = static_cast<T>(random.uniform(-spread, spread));
    }
  }

  T& at(int64_t v, int64_t t) { return buffer.template as<T>()[v * stride + t]; }

  bool gaps_intact() {
    for (int64_t v = 0; v + 1 < classes; ++v) {
      for (int64_t t = tokens; t < stride; ++t) {
        unsigned char bytes[sizeof(T)];
        std::memcpy(bytes, &at(v, t), sizeof bytes);
        for (const unsigned char byte : bytes) {
          if (byte != 0xff) return false;
        }
      }
    }
    return buffer.intact();
  }

  int64_t stride, classes, tokens;
  GuardedBuffer buffer;
};

template <class T>
std::vector<T> random_values(int64_t count, uint64_t seed, double low, double high) {
  test::Random random(seed);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(random.uniform(low, high));
  return values;
}

/// Few enough units in the last place that only rounding passes.
template <class T>
double tolerance(double size) {
  return 40 * static_cast<double>(std::numeric_limits<T>::epsilon()) * (1 + std::abs(size));
}

template <class T>
void test_finish_scores(const test::KernelVariant<T>& variant, const Shape& shape, bool bias,
                        double scale, double softcap, bool class_weight, bool all_partials) {
  test::context() = test::describe(variant.name, " finish_scores, ", sizeof(T), " bytes, ",
                                   shape.classes, " x ", shape.tokens, " bias ", bias, " softcap ",
                                   softcap, " partials ", all_partials);
  Tile<T> tile(shape, 3, 5);
  Tile<T> before = tile;
  const std::vector<T> biases = random_values<T>(shape.classes, 4, -1, 1);
  const std::vector<T> weights = random_values<T>(shape.classes, 5, 0, 2);
  ScoreTransform<T> transform;
  transform.scale = static_cast<T>(scale);
  transform.softcap = static_cast<T>(softcap);
  if (bias) transform.bias = biases.data();
  if (class_weight) transform.class_weight = weights.data();

  const int64_t bytes = shape.tokens * static_cast<int64_t>(sizeof(T));
  GuardedBuffer maximum(bytes), sum(bytes), smooth(bytes), weighted(bytes), argmax(bytes);
  TilePartials<T> partials;
  partials.maximum = maximum.as<T>();
  partials.sum = sum.as<T>();
  if (all_partials) {
    partials.smooth = smooth.as<T>();
    partials.weighted = weighted.as<T>();
    partials.argmax = argmax.as<T>();
  }
  variant.kernels.finish_scores(tile.buffer.template as<T>(), tile.stride, shape.classes,
                                shape.tokens, transform, partials);

  for (int64_t t = 0; t < shape.tokens; ++t) {
    double largest = -std::numeric_limits<double>::infinity(), smoothed = 0, size = 0;
    int64_t first = 0;
    for (int64_t v = 0; v < shape.classes; ++v) {
      const auto index = static_cast<size_t>(v);
      double z = before.at(v, t);
      if (bias) z += biases[index];
      z *= static_cast<double>(transform.scale);
      if (softcap > 0) z = softcap * std::tanh(z / softcap);
      // The partial sums are those of the rounded scores.
      const double finished = score_of(tile.at(v, t), transform.softcap);
      CHECK_NEAR(finished, z, tolerance<T>(z));
      if (finished > largest) {
        largest = finished;
        first = v;
      }
      smoothed += finished * (class_weight ? static_cast<double>(weights[index]) : 1.0);
      size += std::abs(finished);
    }
    double total = 0, moment = 0;
    for (int64_t v = 0; v < shape.classes; ++v) {
      const double shifted =
          static_cast<double>(score_of(tile.at(v, t), transform.softcap)) - largest;
      total += std::exp(shifted);
      moment += std::exp(shifted) * shifted;
    }
    CHECK_EQ(static_cast<double>(maximum.as<T>()[t]), largest);
    CHECK_NEAR(sum.as<T>()[t], total, tolerance<T>(total));
    if (!all_partials) continue;
    CHECK_NEAR(smooth.as<T>()[t], smoothed, tolerance<T>(size));
    CHECK_NEAR(weighted.as<T>()[t], moment, tolerance<T>(10 * total));
    CHECK_EQ(static_cast<int64_t>(argmax.as<T>()[t]), first);
  }
  CHECK(tile.gaps_intact());
  CHECK(maximum.intact() && sum.intact() && smooth.intact() && weighted.intact() &&
        argmax.intact());
}

/// Right, and the same bits for a column wherever it stands among others, and for a row.
template <class T>
void test_multiply(const test::KernelVariant<T>& variant, int64_t rows, int64_t inner,
                   int64_t columns, bool by_columns, bool accumulate) {
  test::context() = test::describe(variant.name, " multiply, ", sizeof(T), " bytes, ", rows, " x ",
                                   inner, " x ", columns, " accumulate ", accumulate);
  const int64_t row_stride = by_columns ? 1 : inner + 3, inner_stride = by_columns ? rows + 2 : 1;
  const int64_t b_stride = columns + 5;
  const std::vector<T> a = random_values<T>(rows * (inner + 3) + inner * (rows + 2), 11, -1, 1);
  const std::vector<T> b = random_values<T>(inner * b_stride, 12, -1, 1);
  const auto a_at = [&](int64_t i, int64_t k) {
    return a[static_cast<size_t>(i * row_stride + k * inner_stride)];
  };
  Tile<T> c({rows, columns, 3}, 13, 1);
  Tile<T> before = c;
  variant.kernels.multiply(a.data(), row_stride, inner_stride, rows, b.data(), b_stride, inner,
                           columns, accumulate, c.buffer.template as<T>(), c.stride);
  CHECK(c.gaps_intact());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double wanted = accumulate ? static_cast<double>(before.at(i, j)) : 0;
      double size = 1 + std::abs(wanted);
      for (int64_t k = 0; k < inner; ++k) {
        const double term = static_cast<double>(a_at(i, k)) *
                            static_cast<double>(b[static_cast<size_t>(k * b_stride + j)]);
        wanted += term;
        size += std::abs(term);
      }
      CHECK_NEAR(c.at(i, j), wanted,
                 2 * static_cast<double>(std::numeric_limits<T>::epsilon()) * size);
    }
  }
  if (accumulate) return;
  const int64_t row = rows / 2, column = columns / 3;
  Tile<T> one({1, columns - column, 0}, 14, 1);
  variant.kernels.multiply(a.data() + row * row_stride, row_stride, inner_stride, 1,
                           b.data() + column, b_stride, inner, columns - column, false,
                           one.buffer.template as<T>(), one.stride);
  for (int64_t j = column; j < columns; ++j) CHECK_EQ(one.at(0, j - column), c.at(row, j));
}

/// Without partial sums only the scores change, and plain ones not at all.
template <class T>
void test_scores_only(const test::KernelVariant<T>& variant, const Shape& shape) {
  test::context() =
      test::describe(variant.name, " scores only, ", shape.classes, " x ", shape.tokens);
  Tile<T> tile(shape, 6, 5);
  Tile<T> before = tile;
  ScoreTransform<T> transform;
  variant.kernels.finish_scores(tile.buffer.template as<T>(), tile.stride, shape.classes,
                                shape.tokens, transform, {});
  CHECK(tile.buffer == before.buffer);
  transform.scale = static_cast<T>(0.5);
  variant.kernels.finish_scores(tile.buffer.template as<T>(), tile.stride, shape.classes,
                                shape.tokens, transform, {});
  for (int64_t v = 0; v < shape.classes; ++v) {
    for (int64_t t = 0; t < shape.tokens; ++t) {
      CHECK_EQ(static_cast<double>(tile.at(v, t)), 0.5 * static_cast<double>(before.at(v, t)));
    }
  }
  CHECK(tile.gaps_intact());
}

/// A token all of whose scores are -inf has sum 0; NaN and +inf stay visible.
template <class T>
void test_special_scores(const test::KernelVariant<T>& variant) {
  const T infinity = std::numeric_limits<T>::infinity();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> z = {-infinity, -infinity, T{1}, T{1},       // first class
                      -infinity, T{2},      nan,  infinity};  // second class
  std::vector<T> maximum(4), sum(4), weighted(4);
  TilePartials<T> partials;
  partials.maximum = maximum.data();
  partials.sum = sum.data();
  partials.weighted = weighted.data();
  variant.kernels.finish_scores(z.data(), 4, 2, 4, {}, partials);
  test::context() = test::describe(variant.name, " special scores, ", sizeof(T), " bytes");
  CHECK_EQ(maximum[0], -infinity);
  CHECK_EQ(sum[0], 0);
  CHECK_EQ(weighted[0], 0);
  CHECK_EQ(maximum[1], 2);
  CHECK_EQ(sum[1], 1);
  CHECK_EQ(weighted[1], 0);
  CHECK(std::isnan(sum[2]));
  CHECK_EQ(maximum[3], infinity);
  CHECK(!std::isnan(sum[3]));
}

template <class T>
void test_to_gradient(const test::KernelVariant<T>& variant, const Shape& shape, double softcap,
                      bool scale_w, bool class_weight) {
  test::context() = test::describe(variant.name, " to_gradient, ", sizeof(T), " bytes, ",
                                   shape.classes, " x ", shape.tokens, " softcap ", softcap);
  Tile<T> tile(shape, 7, 4);
  ScoreTransform<T> capping;
  capping.softcap = static_cast<T>(softcap);
  if (softcap > 0)
    variant.kernels.finish_scores(tile.buffer.template as<T>(), tile.stride, shape.classes,
                                  shape.tokens, capping, {});
  Tile<T> before = tile;
  const std::vector<T> shift = random_values<T>(shape.tokens, 8, 3, 6);
  const std::vector<T> factor = random_values<T>(shape.tokens, 9, -1, 1);
  const std::vector<T> smoothing = random_values<T>(shape.tokens, 10, 0, 0.1);
  const std::vector<T> weights = random_values<T>(shape.classes, 11, 0, 2);
  GradientTransform<T> transform;
  transform.softcap = static_cast<T>(softcap);
  transform.shift = shift.data();
  transform.scale_p = factor.data();
  if (scale_w) transform.scale_w = smoothing.data();
  if (class_weight) transform.class_weight = weights.data();
  variant.kernels.to_gradient(tile.buffer.template as<T>(), tile.stride, shape.classes,
                              shape.tokens, transform);
  for (int64_t v = 0; v < shape.classes; ++v) {
    for (int64_t t = 0; t < shape.tokens; ++t) {
      const auto token = static_cast<size_t>(t);
      const double z = score_of(before.at(v, t), transform.softcap);
      double expected = factor[token] * std::exp(z - static_cast<double>(shift[token]));
      const double w = class_weight ? static_cast<double>(weights[static_cast<size_t>(v)]) : 1.0;
      if (scale_w) expected -= smoothing[token] * w;
      if (softcap > 0) expected *= 1 - (z / softcap) * (z / softcap);
      CHECK_NEAR(tile.at(v, t), expected, tolerance<T>(2));
    }
  }
  CHECK(tile.gaps_intact());
}

/// Scores from far below the soft cap, which keep their digits, to far beyond: its derivative keeps its
/// own, down to the smallest numbers, and infinite scores count as the cap itself.
template <class T>
void test_saturated_scores(const test::KernelVariant<T>& variant) {
  const T infinity = std::numeric_limits<T>::infinity();
  const T cap = 3;
  constexpr int64_t kTokens = 80;
  std::vector<T> scores(kTokens), maximum(kTokens), shift(kTokens), scale(kTokens, T{1});
  for (int64_t t = 0; t < kTokens; ++t) {
    // Up to 26 times the cap; the first ones 2^-4t of it.
    const double far = 0.05 * static_cast<double>(t * t);
    const T size = static_cast<T>(t < 6 ? std::ldexp(3.0, -static_cast<int>(4 * t)) : far);
    scores[static_cast<size_t>(t)] = t % 2 == 0 ? size : -size;
  }
  for (int64_t t = 40; t < kTokens;
       ++t) {  // one by one around half the cap, where the form changes
    const double half = 3 * std::atanh(0.5);
    scores[static_cast<size_t>(t)] = static_cast<T>(
        half * (1 + static_cast<double>(t - 60) * std::numeric_limits<T>::epsilon() / 2));
  }
  scores[7] = infinity, scores[8] = -infinity;
  std::vector<T> kept = scores;
  ScoreTransform<T> transform;
  transform.softcap = cap;
  TilePartials<T> partials;
  partials.maximum = maximum.data();
  variant.kernels.finish_scores(kept.data(), kTokens, 1, kTokens, transform, partials);
  for (size_t t = 0; t < kTokens; ++t) {
    test::context() = test::describe(variant.name, " saturated score ", scores[t]);
    const double x = std::abs(static_cast<double>(scores[t])) / static_cast<double>(cap);
    const double e = std::exp(-2 * x), slope = 4 * e / ((1 + e) * (1 + e));
    const double expected = static_cast<double>(cap) * std::tanh(scores[t] < 0 ? -x : x);
    CHECK_NEAR(maximum[t], expected, 0.2 * tolerance<T>(0) * std::abs(expected));
    CHECK_NEAR(cap_slope(kept[t]), slope, tolerance<T>(0) * slope);
    shift[t] = maximum[t];  // p is 1, and the gradient the derivative
  }
  std::vector<T> gradient = kept;
  GradientTransform<T> backward;
  backward.softcap = cap;
  backward.shift = shift.data();
  backward.scale_p = scale.data();
  variant.kernels.to_gradient(gradient.data(), kTokens, 1, kTokens, backward);
  for (size_t t = 0; t < kTokens; ++t) {
    const double slope = cap_slope(kept[t]);
    CHECK_NEAR(gradient[t], slope, tolerance<T>(0) * slope);
  }
}

/// Products with a few columns: partial sums of 256 terms, so that their number costs no digits.
template <class T>
void test_add_few_features(const test::KernelVariant<T>& variant, const Shape& shape) {
  for (const int64_t features : {int64_t{1}, int64_t{4}, kFewFeatures}) {
    test::context() = test::describe(variant.name, " add_few_features, ", shape.classes, " x ",
                                     shape.tokens, " x ", features);
    Tile<T> tile(shape, 13, 1);
    const int64_t weight_stride = features + 2, sums_stride = features + 3;
    const std::vector<T> weight = random_values<T>(shape.classes * weight_stride, 14, -1, 1);
    GuardedBuffer sums(((shape.tokens - 1) * sums_stride + features) *
                       static_cast<int64_t>(sizeof(T)));
    for (const int times : {1, 2}) {
      variant.kernels.add_few_features(tile.buffer.template as<T>(), tile.stride, shape.classes,
                                       shape.tokens, weight.data(), weight_stride, features,
                                       times == 2, sums.as<T>(), sums_stride);
      for (int64_t t = 0; t < shape.tokens; ++t) {
        for (int64_t d = 0; d < features; ++d) {
          double expected = 0;
          for (int64_t v = 0; v < shape.classes; ++v) {
            expected += static_cast<double>(tile.at(v, t)) *
                        static_cast<double>(weight[static_cast<size_t>(v * weight_stride + d)]);
          }
          CHECK_NEAR(sums.as<T>()[t * sums_stride + d], times * expected,
                     tolerance<T>(static_cast<double>(shape.classes)));
        }
      }
    }
    CHECK(sums.intact() && tile.gaps_intact());
  }
}

template <class T>
void test_add_row_sums(const test::KernelVariant<T>& variant, const Shape& shape) {
  test::context() =
      test::describe(variant.name, " add_row_sums, ", shape.classes, " x ", shape.tokens);
  Tile<T> tile(shape, 12, 1);
  GuardedBuffer sums(shape.classes * 8);
  for (int64_t v = 0; v < shape.classes; ++v) sums.as<double>()[v] = static_cast<double>(v);
  variant.kernels.add_row_sums(tile.buffer.template as<T>(), tile.stride, shape.classes,
                               shape.tokens, sums.as<double>());
  for (int64_t v = 0; v < shape.classes; ++v) {
    double expected = static_cast<double>(v);
    for (int64_t t = 0; t < shape.tokens; ++t) expected += tile.at(v, t);
    CHECK_NEAR(sums.as<double>()[v], expected, tolerance<T>(static_cast<double>(shape.tokens + v)));
  }
  CHECK(sums.intact() && tile.gaps_intact());
}

template <class T>
void test_variant(const test::KernelVariant<T>& variant) {
  for (const int64_t inner : {0, 1, 127, 300})
    for (const int64_t columns : {1, 17, 32})
      for (const bool by_columns : {false, true})
        test_multiply(variant, 7, inner, columns, by_columns, by_columns);
  for (const Shape& shape : kShapes) {
    for (const double softcap : {0.0, 3.0}) {
      for (const bool more : {false, true}) {
        test_finish_scores(variant, shape, more, more ? 1.5 : 1.0, softcap, more, more);
        test_finish_scores(variant, shape, !more, 0.7, softcap, false, more);
        test_to_gradient(variant, shape, 1.5 * softcap, more, more);
        test_to_gradient(variant, shape, 1.5 * softcap, true, !more);
      }
    }
    test_scores_only(variant, shape);
    test_add_few_features(variant, shape);
    test_add_row_sums(variant, shape);
  }
  test_special_scores(variant);
  test_saturated_scores(variant);
}

}  // namespace

int main() {
  for (const auto& variant : test::kernel_variants<float>()) test_variant(variant);
  for (const auto& variant : test::kernel_variants<double>()) test_variant(variant);
  return test::result();
}
