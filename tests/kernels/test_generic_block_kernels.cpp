// block_statistics, keep_scores and block_gradient, emulated, against double precision: every type, ragged and
// unaligned blocks, every option.
#include <limits>
#include <random>

#include "cuda/generic_kernels.h"
#include "kernels/arrays.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::Array;
using emulator::BufferAccess;
using emulator::compare;
using emulator::GlobalBuffer;
using emulator::unit_roundoff;

namespace {

struct Case {
  int64_t classes, tokens, padding;  // rows are tokens + padding elements apart
  int64_t offset = 0;                // elements from a multiple of 16 bytes to the block
  int64_t first_class = 0, classes_per_range = 64;
  bool bias = false, class_weight = false, probabilities = false;
  bool full = true;  // statistics and coefficients that few losses need
  double logit_scale = 1.0, softcap = 0.0;
};

// Inputs of a case, and what the kernels must compute from them.
struct Experiment {
  Case c;
  DType dtype;
  int64_t stride, vocab, token_stride, class_stride;
  Array products, bias, class_weight, probabilities;
  std::vector<int64_t> target;
  GlobalBuffer target_guard;
  std::mt19937 random{11};

  Experiment(const Case& shape, DType type)
      : c(shape),
        dtype(type),
        stride(shape.tokens + shape.padding),
        vocab(shape.first_class + shape.classes + 3),
        token_stride(shape.offset == 0 ? vocab + 1 : 1),  // both layouts
        class_stride(shape.offset == 0 ? 1 : shape.tokens + 2),
        products(type, shape.classes * stride, "products", BufferAccess::kReadWrite, shape.offset),
        bias(type, vocab, "bias", BufferAccess::kReadOnly),
        class_weight(type, vocab, "class_weight", BufferAccess::kReadOnly),
        probabilities(probability_dtype(shape),
                      (shape.tokens - 1) * token_stride + (vocab - 1) * class_stride + 1,
                      "probabilities", BufferAccess::kReadOnly),
        target(shape.tokens),
        target_guard(target.data(), target.size() * 8, "target", BufferAccess::kReadOnly, 8) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.0, 2.0);
    for (int64_t v = 0; v < c.classes; ++v)
      for (int64_t n = 0; n < c.tokens; ++n) products.set(v * stride + n, 3 * normal(random));
    for (int64_t v = 0; v < vocab; ++v) {
      bias.set(v, normal(random));
      class_weight.set(v, v % 7 == 3 ? 0.0 : uniform(random));
      for (int64_t n = 0; n < c.tokens; ++n)
        probabilities.set(n * token_stride + v * class_stride,
                          v % 5 == 2 ? 0.0 : uniform(random) / static_cast<double>(vocab));
    }
    // Targets in the block, in other blocks, and none.
    for (int64_t n = 0; n < c.tokens; ++n)
      target[n] = n % 4 == 3   ? -100
                  : n % 9 == 8 ? vocab - 1 - n % 3
                               : c.first_class + static_cast<int64_t>(random() % c.classes);
  }

  static DType probability_dtype(const Case& c) {
    return c.offset == 0 ? DType::kBFloat16 : DType::kFloat64;
  }
  double logit(int64_t v, int64_t n) const {
    const double u = products.at(v * stride + n) + (c.bias ? bias.at(c.first_class + v) : 0.0);
    const double scaled = u * c.logit_scale;
    return c.softcap == 0.0 ? scaled : c.softcap * std::tanh(scaled / c.softcap);
  }
  double slope(double z) const {
    return c.softcap == 0.0 ? 1.0 : 1 - z / c.softcap * (z / c.softcap);
  }
  double weight(int64_t v) const { return c.class_weight ? class_weight.at(c.first_class + v) : 1; }
  double probability(int64_t v, int64_t n) const {
    return probabilities.at(n * token_stride + (c.first_class + v) * class_stride);
  }
  int64_t local_target(int64_t n) const {
    const int64_t v = target[n] - c.first_class;
    return c.probabilities || target[n] < 0 || v < 0 || v >= c.classes ? -1 : v;
  }

  Block block() const { return {c.first_class, c.classes, c.tokens}; }
  LogitTerms terms() {
    return {c.bias ? bias.data() : nullptr, c.class_weight ? class_weight.data() : nullptr,
            c.logit_scale, c.softcap};
  }
  Targets targets() {
    if (!c.probabilities) return {target.data()};
    return {nullptr, probabilities.data(), probability_dtype(c), token_stride, class_stride};
  }
};

// `keeps`: by keep_scores, whose ranges are tiles.
void test_statistics(const Case& c, DType dtype, bool keeps = false) {
  Experiment e(c, dtype);
  CHECK(!keeps || c.classes_per_range == kStoredTile);
  const int64_t scores_stride = c.tokens + c.padding;
  Array scores(DType::kFloat16, c.classes * scores_stride, "scores", BufferAccess::kReadWrite,
               c.offset);
  const int64_t ranges = (c.classes + c.classes_per_range - 1) / c.classes_per_range;
  const int64_t max_stride = c.tokens + 1, stride = c.tokens + 2;
  Array max(dtype, ranges * max_stride, "max"), sum(dtype, ranges * stride, "sum"),
      entropy(dtype, ranges * stride, "entropy"), smooth(dtype, ranges * stride, "smooth"),
      dot(dtype, ranges * stride, "dot"), mass(dtype, ranges * stride, "mass"),
      plain(dtype, ranges * stride, "plain"), target_logit(dtype, c.tokens, "target_logit");
  std::vector<int32_t> argmax(ranges * stride, -7);
  const GlobalBuffer guard(argmax.data(), argmax.size() * 4, "argmax", BufferAccess::kReadWrite, 4);

  PartialStatistics partials;
  partials.max = max.data(), partials.max_stride = max_stride;
  partials.sum = sum.data(), partials.stride = stride;
  if (c.full) {
    partials.entropy = entropy.data(), partials.smooth = smooth.data();
    partials.argmax = argmax.data();
  }
  if (c.probabilities) {
    partials.target_dot = dot.data(), partials.target_mass = mass.data();
    partials.target_plain = plain.data();
  }
  if (keeps) {
    CHECK(keep_scores({e.block(), static_cast<const float*>(e.products.data()), e.stride, e.terms(),
                       e.targets(), partials, static_cast<float*>(target_logit.data()),
                       scores.data(), scores_stride},
                      nullptr)
              .ok());
  } else {
    CHECK(block_statistics({e.block(), e.products.data(), e.stride, dtype, e.terms(), e.targets(),
                            c.classes_per_range, partials, target_logit.data()},
                           nullptr)
              .ok());
  }

  const double roundoff = unit_roundoff(dtype);
  for (int64_t range = 0; range < ranges; ++range) {
    const int64_t begin = range * c.classes_per_range;
    const int64_t end = std::min(begin + c.classes_per_range, c.classes);
    for (int64_t n = 0; n < c.tokens; ++n) {
      double largest = -std::numeric_limits<double>::infinity();
      int64_t first = begin;
      for (int64_t v = begin; v < end; ++v)
        if (e.logit(v, n) > largest) largest = e.logit(v, n), first = v;
      double s = 0, h = 0, weighted = 0, d = 0, m = 0, p = 0, absolute = 0;
      for (int64_t v = begin; v < end; ++v) {
        const double z = e.logit(v, n), w = e.weight(v);
        const double q = c.probabilities ? e.probability(v, n) : 0;
        s += std::exp(z - largest), h += std::exp(z - largest) * (z - largest);
        weighted += w * z, d += w * q * z, m += w * q, p += q * z;
        absolute += (1 + w) * std::abs(z);
      }
      const int64_t at = range * stride + n;
      const double scale = 1 + std::abs(largest);
      // The maximum that the sums refer to is the kernel's, a rounding away from ours.
      compare(max.at(range * max_stride + n), largest, 8 * roundoff * scale, "max", dtype);
      compare(sum.at(at), s, 32 * roundoff * scale * s, "sum", dtype);
      if (c.full) {
        compare(entropy.at(at), h, 64 * roundoff * scale * (s - h), "entropy", dtype);
        compare(smooth.at(at), weighted, 16 * roundoff * absolute, "smooth", dtype);
        const int64_t found = argmax[at] - c.first_class;
        CHECK(found == first || (found >= begin && found < end &&
                                 e.logit(found, n) > largest - 8 * roundoff * scale));
      }
      for (int64_t v = begin; keeps && v < end; ++v) {
        const double p = std::exp(e.logit(v, n) - largest);
        const double error = unit_roundoff(DType::kFloat16) + 16 * roundoff * scale;
        compare(scores.at(v * scores_stride + n), p, error * p + std::ldexp(1.0, -25), "score",
                DType::kFloat16);
      }
      if (c.probabilities) {
        compare(dot.at(at), d, 16 * roundoff * absolute, "dot", dtype);
        compare(mass.at(at), m, 16 * roundoff * m, "mass", dtype);
        compare(plain.at(at), p, 16 * roundoff * absolute, "plain", dtype);
      }
    }
    CHECK(max.untouched(range * max_stride + c.tokens));
    for (int64_t padding = range * stride + c.tokens; padding < (range + 1) * stride; ++padding)
      CHECK(sum.untouched(padding) && entropy.untouched(padding) && dot.untouched(padding) &&
            argmax[padding] == -7);
  }
  for (int64_t v = 0; v < c.classes; ++v)
    for (int64_t n = c.tokens; n < scores_stride; ++n)
      CHECK(scores.untouched(v * scores_stride + n));
  for (int64_t n = 0; n < c.tokens; ++n) {
    const int64_t y = e.local_target(n);
    if (y < 0) {
      CHECK(target_logit.untouched(n));
    } else {
      const double z = e.logit(y, n);
      compare(target_logit.at(n), z, 8 * roundoff * (1 + std::abs(z)), "target logit", dtype);
    }
  }
}

// Coefficients of an arbitrary loss, arrays [tokens].
struct LossCoefficients {
  Array shift, softmax, entropy, centre, target, target_rest, weighted;

  LossCoefficients(DType dtype, int64_t tokens)
      : shift(dtype, tokens, "shift"),
        softmax(dtype, tokens, "softmax"),
        entropy(dtype, tokens, "entropy"),
        centre(dtype, tokens, "centre"),
        target(dtype, tokens, "target"),
        target_rest(dtype, tokens, "target_rest"),
        weighted(dtype, tokens, "weighted") {}

  Coefficients of(const Case& c) {
    return {shift.data(),
            softmax.data(),
            c.full ? entropy.data() : nullptr,
            c.full ? centre.data() : nullptr,
            target.data(),
            c.probabilities ? nullptr : target_rest.data(),
            c.full ? weighted.data() : nullptr};
  }
};

void test_gradient(const Case& c, DType dtype, DType gradient_dtype) {
  Experiment e(c, dtype);
  LossCoefficients k(dtype, c.tokens);
  std::normal_distribution<double> normal;
  const auto left_out = [](int64_t n) { return n % 5 == 4; };
  for (int64_t n = 0; n < c.tokens; ++n) {
    double largest = e.logit(0, n);
    for (int64_t v = 1; v < c.classes; ++v) largest = std::max(largest, e.logit(v, n));
    k.shift.set(n, largest + std::abs(normal(e.random)));
    for (Array* array : {&k.softmax, &k.entropy, &k.target, &k.weighted})
      array->set(n, left_out(n) ? 0.0 : normal(e.random));
    k.target_rest.set(n, k.softmax.at(n) + k.target.at(n));
    k.centre.set(n, left_out(n) ? std::nan("") : normal(e.random));
    if (!left_out(n)) continue;
    k.shift.set(n, std::nan(""));
    for (int64_t v = 0; v < c.classes; v += 2) e.products.set(v * e.stride + n, std::nan(""));
  }

  const double roundoff = unit_roundoff(dtype);
  std::vector<double> expected(c.classes * c.tokens), tolerance(c.classes * c.tokens);
  // The gradient of the bias, from gradients before they are rounded; fp16 has factors of tokens.
  const bool sums_bias = is_16_bit(gradient_dtype), has_factors = gradient_dtype == DType::kFloat16;
  Array bias(DType::kFloat32, c.first_class + c.classes + 1, "bias"),
      factors(DType::kFloat32, c.tokens, "factors", BufferAccess::kReadOnly);
  for (int64_t n = 0; n < c.tokens; ++n) factors.set(n, has_factors ? std::ldexp(1.0, n % 3) : 1.0);
  std::vector<double> bias_expected(c.classes), bias_tolerance(c.classes);
  for (int64_t v = 0; v < c.classes; ++v) {
    bias_expected[v] = normal(e.random);
    bias.set(c.first_class + v, bias_expected[v]);
    bias_expected[v] = bias.at(c.first_class + v);
    bias_tolerance[v] = std::ldexp(8.0, -24) * std::abs(bias_expected[v]);
  }
  for (int64_t v = 0; v < c.classes; ++v)
    for (int64_t n = 0; n < c.tokens; ++n) {
      if (left_out(n)) continue;
      const double z = e.logit(v, n), p = std::exp(z - k.shift.at(n));
      std::vector<double> addends = {p * k.softmax.at(n)};
      if (e.local_target(n) == v) {
        addends.push_back(k.target.at(n));
      } else if (c.probabilities) {
        addends.push_back(k.target.at(n) * e.weight(v) * e.probability(v, n));
      }
      if (c.full) {
        addends.push_back(p * k.entropy.at(n) * z);
        addends.push_back(-p * k.entropy.at(n) * k.centre.at(n));
        addends.push_back(k.weighted.at(n) * e.weight(v));
      }
      double dz = 0, magnitude = 0;
      for (const double addend : addends) dz += addend, magnitude += std::abs(addend);
      const int64_t i = v * c.tokens + n;
      expected[i] = dz * e.slope(z);
      // Below its normal range fp16 has a fixed spacing.
      const double tiny = gradient_dtype == DType::kFloat16 ? std::ldexp(1.0, -25) : 0;
      const double unrounded =
          16 * roundoff * magnitude * (1 + std::abs(z) + std::abs(k.shift.at(n)));
      tolerance[i] =
          1.01 * unit_roundoff(gradient_dtype) * std::abs(expected[i]) + tiny + unrounded;
      bias_expected[v] += factors.at(n) * expected[i];
      bias_tolerance[v] +=
          factors.at(n) * (unrounded + std::ldexp(8.0, -24) * std::abs(expected[i]));
    }

  BlockGradient call{e.block(),      e.products.data(), e.stride,    dtype,
                     gradient_dtype, e.terms(),         e.targets(), k.of(c)};
  if (sums_bias) call.bias.sums = static_cast<float*>(bias.data());
  if (has_factors) call.bias.factors = static_cast<const float*>(factors.data());
  CHECK(block_gradient(call, nullptr).ok());
  for (int64_t v = 0; sums_bias && v < c.classes; ++v)
    compare(bias.at(c.first_class + v), bias_expected[v], bias_tolerance[v], "bias sum",
            gradient_dtype);
  for (int64_t v = 0; v < c.first_class; ++v) CHECK(bias.untouched(v));
  CHECK(bias.untouched(c.first_class + c.classes));
  const int64_t stride = e.stride * size_of(dtype) / size_of(gradient_dtype);
  for (int64_t v = 0; v < c.classes; ++v) {
    for (int64_t n = 0; n < c.tokens; ++n)
      compare(e.products.at(v * stride + n, gradient_dtype), expected[v * c.tokens + n],
              tolerance[v * c.tokens + n], "gradient", gradient_dtype);
    for (int64_t n = c.tokens; n < e.stride; ++n) CHECK(e.products.untouched(v * e.stride + n));
  }
}

// Classes, tokens, padding, offset, first class, per range, bias, class weight, probabilities, ...
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {1, 1, 0},
      {5, 7, 1, 0, 0, 64, true},
      {70, 33, 3, 0, 11, 64, true, true},
      {133, 12, 4, 0, 128, 64, false, true, true, true},
      {129, 20, 1, 1, 5, 128, true, true, true, true, 0.5, 7.0},
      {66, 130, 2, 0, 3, 64, true, false, false, true, 2.0},
      {40, 300, 4, 0, 0, 64, false, false, false, false},
      {18, 131, 5, 3, 40, 64, true, true, false, false, 0.25, 12.0},
      {6, 1100, 0, 0, 2, 64, false, true, true, false},
      {3, 1037, 3, 0, 1, 64, true, true, false, true, 1.5, 9.0},
  };
  return all;
}

void test_every_type() {
  emulator::expect_clean("blocks", [] {
    for (const Case& c : cases()) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
        test_statistics(c, dtype);
        test_gradient(c, dtype, dtype);
      }
      test_gradient(c, DType::kFloat32, DType::kBFloat16);
      test_gradient(c, DType::kFloat32, DType::kFloat16);
    }
  });
}

// Blocks that begin at a tile, in tiles that are full, ragged, or end before some warp's classes.
void test_kept_scores() {
  emulator::expect_clean("kept scores", [] {
    for (const Case& c : {
             Case{1, 1, 0, 0, 0, 128},
             Case{5, 7, 1, 0, 128, 128, true},
             Case{133, 12, 4, 0, 256, 128, false, true},
             Case{129, 20, 1, 1, 0, 128, true, true, false, true, 0.5, 7.0},
             Case{256, 130, 2, 0, 128, 128, true, false, false, false, 2.0},
             Case{40, 300, 4, 0, 0, 128, false, false, false, false},
             Case{300, 131, 5, 3, 0, 128, true, true, false, false, 0.25, 12.0},
         })
      test_statistics(c, DType::kFloat32, true);
  });
}

// So many classes that a thread takes 16 rows; in one schedule, because of the time it takes.
void test_many_classes() {
  const Case c{131072 - 3, 1, 0, 0, 0, 65536};
  test_gradient(c, DType::kFloat32, DType::kBFloat16);
  CHECK(emulator::reports().empty());
}

// -inf logits, ranges of nothing else, and NaN behave as in a log-softmax.
void test_special_values() {
  const double inf = std::numeric_limits<double>::infinity();
  enum { kOneFinite, kNothing, kNan, kAllNan, kTwice, kPositive, kTokens };
  const int64_t classes = 130;
  Case shape{classes, kTokens, 2, 0, 1000, 64};
  Experiment e(shape, DType::kFloat32);
  for (int64_t v = 0; v < classes; ++v) {
    const auto set = [&](int token, double u) { e.products.set(v * e.stride + token, u); };
    set(kOneFinite, v == 7 ? 1.0 : -inf);
    set(kNothing, -inf);
    set(kNan, v == 70 ? std::nan("") : 0.0);
    set(kAllNan, std::nan(""));
    set(kTwice, v == 30 || v == 33 ? 2.0 : 1.0);  // the last warp's, then the first warp's
    set(kPositive, v == 9 ? inf : 0.0);
  }
  const int64_t ranges = 3;
  Array max(DType::kFloat32, ranges * kTokens, "max"),
      sum(DType::kFloat32, ranges * kTokens, "sum"),
      entropy(DType::kFloat32, ranges * kTokens, "entropy");
  std::vector<int32_t> argmax(ranges * kTokens, -1);
  const GlobalBuffer guard(argmax.data(), argmax.size() * 4, "argmax", BufferAccess::kReadWrite, 4);
  PartialStatistics partials;
  partials.max = max.data(), partials.sum = sum.data(), partials.entropy = entropy.data();
  partials.argmax = argmax.data(), partials.max_stride = partials.stride = kTokens;
  CHECK(
      block_statistics(
          {e.block(), e.products.data(), e.stride, DType::kFloat32, {}, {}, 64, partials, nullptr},
          nullptr)
          .ok());
  CHECK(max.at(kOneFinite) == 1 && sum.at(kOneFinite) == 1 && entropy.at(kOneFinite) == 0);
  CHECK(argmax[kOneFinite] == 1007);
  for (int64_t range = 0; range < ranges; ++range) {
    const int64_t at = range * kTokens + kNothing;
    CHECK(max.at(at) == -inf && sum.at(at) == 0 && entropy.at(at) == 0);
    CHECK(argmax[at] == 1000 + 64 * range);
    CHECK(std::isnan(sum.at(range * kTokens + kAllNan)));
  }
  CHECK(sum.at(kNan) == 64 && std::isnan(sum.at(kTokens + kNan)) &&
        sum.at(2 * kTokens + kNan) == 2);
  CHECK(max.at(kTwice) == 2 && argmax[kTwice] == 1030);
  CHECK(max.at(kPositive) == inf && std::isnan(sum.at(kPositive)) && argmax[kPositive] == 1009);

  // The same in tiles, whose scores are 0 where a logit is -inf.
  Array scores(DType::kFloat16, classes * e.stride, "scores");
  CHECK(keep_scores({e.block(),
                     static_cast<const float*>(e.products.data()),
                     e.stride,
                     {},
                     {},
                     partials,
                     nullptr,
                     scores.data(),
                     e.stride},
                    nullptr)
            .ok());
  const auto score = [&](int64_t v, int token) { return scores.at(v * e.stride + token); };
  for (const int64_t tile : {0, 1}) {
    const int64_t at = tile * kTokens;
    CHECK(max.at(at + kNothing) == -inf && sum.at(at + kNothing) == 0);
    CHECK(entropy.at(at + kNothing) == 0 && argmax[at + kNothing] == 1000 + 128 * tile);
    CHECK(std::isnan(sum.at(at + kAllNan)));
  }
  CHECK(max.at(kOneFinite) == 1 && sum.at(kOneFinite) == 1 && entropy.at(kOneFinite) == 0);
  CHECK(argmax[kOneFinite] == 1007 && argmax[kTwice] == 1030 && argmax[kPositive] == 1009);
  CHECK(std::isnan(max.at(kNan)) && std::isnan(sum.at(kNan)) && sum.at(kTokens + kNan) == 2);
  CHECK(max.at(kPositive) == inf && std::isnan(sum.at(kPositive)));
  for (int64_t v = 0; v < classes; ++v) {
    CHECK(score(v, kOneFinite) == (v == 7 ? 1 : 0) && score(v, kNothing) == 0);
    CHECK(std::isnan(score(v, kAllNan)) && std::isnan(score(v, kNan)) == (v < 128));
  }

  // A class weight or probability of zero hides a logit of -inf from the sums over targets.
  shape.probabilities = shape.class_weight = true;
  Experiment hidden(shape, DType::kFloat32);
  for (int64_t v = 0; v < classes; ++v)
    if (hidden.weight(v) == 0 || hidden.probability(v, 0) == 0)
      hidden.products.set(v * hidden.stride, -inf);
  Array dot(DType::kFloat32, ranges * kTokens, "dot"),
      plain(DType::kFloat32, ranges * kTokens, "plain");
  partials.target_dot = dot.data(), partials.target_plain = plain.data();
  CHECK(block_statistics({hidden.block(), hidden.products.data(), hidden.stride, DType::kFloat32,
                          hidden.terms(), hidden.targets(), 64, partials, nullptr},
                         nullptr)
            .ok());
  CHECK(std::isfinite(dot.at(0)) && plain.at(0) == -inf);  // w = 0, but q is not

  // Gradients. Tokens without coefficients get zeros, the others what a log-softmax gives.
  LossCoefficients k(DType::kFloat32, kTokens);
  for (int64_t n = 0; n < kTokens; ++n) {
    const bool counts = n == kOneFinite || n == kNan;
    k.shift.set(n, counts ? 1.0 : std::nan(""));
    for (Array* array : {&k.softmax, &k.entropy}) array->set(n, counts ? 1.0 : 0.0);
    for (Array* array : {&k.centre, &k.target, &k.target_rest, &k.weighted}) array->set(n, 0.0);
  }
  CHECK(block_gradient({e.block(),
                        e.products.data(),
                        e.stride,
                        DType::kFloat32,
                        DType::kBFloat16,
                        {},
                        {},
                        k.of(Case{classes, kTokens, 2})},
                       nullptr)
            .ok());
  for (int64_t v = 0; v < classes; ++v)
    for (int64_t n = 0; n < kTokens; ++n) {
      const double got = e.products.at(v * 2 * e.stride + n, DType::kBFloat16);
      if (n == kNan) {
        CHECK(v == 70 ? std::isnan(got)
                      : got == __bfloat162float(__float2bfloat16(std::exp(-1.f))));
      } else {
        CHECK(got == (n == kOneFinite && v == 7 ? 2.0 : 0.0));
      }
    }
}

Status gradient_in_float(Experiment& e, const Coefficients& coefficients) {
  return block_gradient({e.block(),
                         e.products.data(),
                         e.stride,
                         DType::kFloat32,
                         DType::kFloat32,
                         {},
                         e.targets(),
                         coefficients},
                        nullptr);
}

// The target's entry keeps its digits when its softmax is close to 1: p - 1 would have none.
void test_target_of_a_peaked_softmax() {
  Experiment e({2, 3, 1}, DType::kFloat32);
  LossCoefficients k(DType::kFloat32, 3);
  for (int64_t n = 0; n < 3; ++n) {
    e.target[n] = n % 2;
    for (int64_t v = 0; v < 2; ++v) e.products.set(v * e.stride + n, v == n % 2 ? -1e-9 : -20.0);
    k.shift.set(n, 0.0), k.softmax.set(n, 0.5), k.target.set(n, -0.5), k.target_rest.set(n, 0.0);
  }
  CHECK(gradient_in_float(e, {k.shift.data(), k.softmax.data(), nullptr, nullptr, k.target.data(),
                              k.target_rest.data()})
            .ok());
  for (int64_t n = 0; n < 3; ++n)
    compare(e.products.at(n % 2 * e.stride + n), -5e-10, 1e-15, "peaked target", DType::kFloat32);
}

// So it does when p and the target's coefficient are small compared with the softmax's: softmax - softmax
// would leave nothing of them.
void test_small_target_of_a_flat_softmax() {
  Experiment e({2, 3, 1}, DType::kFloat32);
  LossCoefficients k(DType::kFloat32, 3);
  for (int64_t n = 0; n < 3; ++n) {
    e.target[n] = n % 2;
    for (int64_t v = 0; v < 2; ++v) e.products.set(v * e.stride + n, -20.0);
    k.shift.set(n, 0.0), k.softmax.set(n, 0.5), k.target.set(n, n * 1e-9);
    k.target_rest.set(n, 0.5 + n * 1e-9);
  }
  CHECK(gradient_in_float(e, {k.shift.data(), k.softmax.data(), nullptr, nullptr, k.target.data(),
                              k.target_rest.data()})
            .ok());
  for (int64_t n = 0; n < 3; ++n) {
    const double wanted = 0.5 * std::exp(-20.0) + n * 1e-9;
    compare(e.products.at(n % 2 * e.stride + n), wanted, 1e-6 * wanted, "small target",
            DType::kFloat32);
  }
}

// Targets without coefficients are none: every entry is softmax p.
void test_targets_without_coefficients() {
  for (const bool probabilities : {false, true}) {
    Case shape{2, 3, 1};
    shape.probabilities = probabilities;
    Experiment e(shape, DType::kFloat32);
    LossCoefficients k(DType::kFloat32, 3);
    for (int64_t n = 0; n < 3; ++n) {
      k.shift.set(n, 0.0), k.softmax.set(n, 0.5);
      for (int64_t v = 0; v < 2; ++v) e.products.set(v * e.stride + n, 0.0);
    }
    CHECK(gradient_in_float(e, {k.shift.data(), k.softmax.data()}).ok());
    for (int64_t v = 0; v < 2; ++v)
      for (int64_t n = 0; n < 3; ++n) CHECK(e.products.at(v * e.stride + n) == 0.5);
  }
}

void test_statuses() {
  Experiment e({2, 8, 0}, DType::kFloat32);
  Array max(DType::kFloat32, 8, "max"), sum(DType::kFloat32, 8, "sum");
  const auto statistics = [&](const Block& block, DType dtype, int64_t per_range,
                              const PartialStatistics& partials) {
    return block_statistics(
        {block, e.products.data(), e.stride, dtype, {}, {}, per_range, partials, nullptr}, nullptr);
  };
  PartialStatistics partials;
  CHECK(!statistics(e.block(), DType::kFloat32, 64, partials).ok());
  CHECK(statistics({}, DType::kFloat32, 64, partials).ok());
  partials.max = max.data(), partials.sum = sum.data(), partials.stride = partials.max_stride = 8;
  CHECK(statistics(e.block(), DType::kFloat32, 64, partials).ok());
  CHECK(!statistics(e.block(), DType::kFloat32, 0, partials).ok());
  CHECK(!statistics(e.block(), DType::kBFloat16, 64, partials).ok());
  partials.target_mass = sum.data();
  CHECK(!statistics(e.block(), DType::kFloat32, 64, partials).ok());

  const auto gradient = [&](const Block& block, DType from, DType to) {
    return block_gradient({block, e.products.data(), e.stride, from, to, {}, {}, {}}, nullptr);
  };
  CHECK(!gradient(e.block(), DType::kFloat64, DType::kFloat32).ok());
  CHECK(!gradient(e.block(), DType::kBFloat16, DType::kBFloat16).ok());
  CHECK(gradient({}, DType::kFloat32, DType::kFloat32).ok());
  BlockGradient unrounded{e.block(), e.products.data(), e.stride, DType::kFloat32, DType::kFloat32};
  unrounded.bias.sums = static_cast<float*>(sum.data());
  CHECK(!block_gradient(unrounded, nullptr).ok());
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_every_type();
  test_kept_scores();
  test_many_classes();
  test_special_values();
  test_target_of_a_peaked_softmax();
  test_small_target_of_a_flat_softmax();
  test_targets_without_coefficients();
  test_statuses();
  CHECK(emulator::reports().empty());
  emulator::print_reports();
  std::printf("largest error: %.2f of the tolerance\n", emulator::worst_error);
  return emulator::finish("test_generic_block_kernels");
}
