// What happens to gradients after the scores, emulated, against double precision: stored_gradient,
// add_bias_gradient, update_rows, copy_rows, scale_gradient.
#include <limits>
#include <random>

#include "cuda/generic_kernels.h"
#include "kernels/arrays.h"
#include "kernels/compact_gradient.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::Array;
using emulator::compare;
using emulator::unit_roundoff;

namespace {

// Below its normal range fp16 has a fixed spacing; this is half of it.
double rounding_near_zero(DType dtype) {
  return dtype == DType::kFloat16 ? std::ldexp(1.0, -25) : 0;
}

constexpr DType kTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64};

// ---- stored scores ----

struct StoredCase {
  int64_t classes, tokens, padding, offset = 0, first_class = 0;
  double softcap = 0.0;
  bool entropy = false, weighted = false, class_weight = false;
};

void test_stored_gradient(const StoredCase& c, DType gradient_dtype) {
  std::mt19937 random{5};
  std::normal_distribution<double> normal;
  const int64_t stride = c.tokens + c.padding, vocab = c.first_class + c.classes + 1;
  const int64_t tiles = (c.classes + kStoredTile - 1) / kStoredTile, maxima_stride = c.tokens + 3;
  Array scores(DType::kFloat16, c.classes * stride, "scores", BufferAccess::kReadWrite, c.offset);
  Array maxima(DType::kFloat32, tiles * maxima_stride, "maxima", BufferAccess::kReadOnly);
  Array weight(DType::kFloat32, vocab, "class_weight", BufferAccess::kReadOnly);
  Array shift(DType::kFloat32, c.tokens, "shift", BufferAccess::kReadOnly),
      softmax(DType::kFloat32, c.tokens, "softmax", BufferAccess::kReadOnly),
      entropy(DType::kFloat32, c.tokens, "entropy", BufferAccess::kReadOnly),
      centre(DType::kFloat32, c.tokens, "centre", BufferAccess::kReadOnly),
      coefficient(DType::kFloat32, c.tokens, "target coefficient", BufferAccess::kReadOnly),
      weighted(DType::kFloat32, c.tokens, "weighted", BufferAccess::kReadOnly),
      target_gradient(DType::kFloat32, c.tokens, "target_gradient", BufferAccess::kReadOnly);
  std::vector<int64_t> target(c.tokens);
  const GlobalBuffer guard(target.data(), target.size() * 8, "target", BufferAccess::kReadOnly, 8);

  for (int64_t v = 0; v < vocab; ++v) weight.set(v, std::abs(normal(random)));
  std::vector<double> expected(c.classes * c.tokens), tolerance(c.classes * c.tokens);
  // The gradient of the bias, from gradients before they are rounded; fp16 has factors of tokens.
  const bool has_factors = gradient_dtype == DType::kFloat16;
  Array bias(DType::kFloat32, vocab, "bias"),
      factors(DType::kFloat32, c.tokens, "factors", BufferAccess::kReadOnly);
  std::vector<double> bias_expected(c.classes), bias_tolerance(c.classes);
  for (int64_t v = 0; v < c.classes; ++v) {
    bias.set(c.first_class + v, normal(random));
    bias_expected[v] = bias.at(c.first_class + v);
    bias_tolerance[v] = std::ldexp(8.0, -24) * std::abs(bias_expected[v]);
  }
  for (int64_t n = 0; n < c.tokens; ++n) {
    const bool left_out = n % 5 == 4;
    factors.set(n, has_factors ? std::ldexp(1.0, static_cast<int>(n % 3)) : 1.0);
    shift.set(n, left_out ? std::nan("") : 4 + std::abs(normal(random)));
    for (Array* array : {&softmax, &entropy, &coefficient, &weighted, &target_gradient})
      array->set(n, left_out ? 0.0 : normal(random));
    centre.set(n, left_out ? std::nan("") : normal(random));
    if (left_out) target_gradient.set(n, std::nan(""));
    target[n] = n % 4 == 3   ? -2
                : n % 7 == 6 ? vocab - 1
                             : c.first_class + static_cast<int64_t>(random() % c.classes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const double max = 3 * normal(random);
      maxima.set(tile * maxima_stride + n, max);
      for (int64_t v = tile * kStoredTile; v < std::min((tile + 1) * kStoredTile, c.classes); ++v) {
        const int64_t at = v * stride + n;
        // Scores of 0: so far below the maximum that fp16 cannot hold them.
        scores.set(at, left_out      ? std::nan("")
                       : v % 11 == 3 ? 0.0
                                     : std::exp(-6 * std::abs(normal(random))));
        if (left_out) continue;
        const double e = scores.at(at), m = maxima.at(tile * maxima_stride + n);
        const double p = e * std::exp(m - shift.at(n)), z = m + std::log(e);
        const double entropy_part = c.entropy && e > 0 ? p * entropy.at(n) * (z - centre.at(n)) : 0;
        const double weighted_part =
            c.weighted ? weighted.at(n) * (c.class_weight ? weight.at(c.first_class + v) : 1) : 0;
        const double slope = c.softcap == 0 || e == 0 ? 1 : 1 - z * z / (c.softcap * c.softcap);
        const int64_t i = v * c.tokens + n;
        expected[i] = (p * softmax.at(n) + entropy_part + weighted_part) * slope;
        const double magnitude =
            std::abs(p * softmax.at(n)) + std::abs(entropy_part) + std::abs(weighted_part);
        double unrounded = std::ldexp(16.0, -24) * magnitude * (1 + std::abs(m) + shift.at(n)) *
                           (c.softcap == 0 || e == 0 ? 1 : 1 + z * z / (c.softcap * c.softcap));
        if (c.first_class + v == target[n]) {
          expected[i] = target_gradient.at(n);
          unrounded = 0;
        }
        tolerance[i] = 1.01 * unit_roundoff(gradient_dtype) * std::abs(expected[i]) +
                       rounding_near_zero(gradient_dtype) + unrounded;
        bias_expected[v] += factors.at(n) * expected[i];
        bias_tolerance[v] +=
            factors.at(n) * (unrounded + std::ldexp(8.0, -24) * std::abs(expected[i]));
      }
    }
  }

  const StoredScores stored{scores.data(), stride, static_cast<float*>(maxima.data()),
                            maxima_stride};
  const LogitTerms terms{nullptr, c.class_weight ? weight.data() : nullptr, 0.5, c.softcap};
  const Coefficients coefficients{shift.data(),
                                  softmax.data(),
                                  c.entropy ? entropy.data() : nullptr,
                                  c.entropy ? centre.data() : nullptr,
                                  coefficient.data(),
                                  nullptr,
                                  c.weighted ? weighted.data() : nullptr};
  CHECK(stored_gradient({{c.first_class, c.classes, c.tokens},
                         stored,
                         gradient_dtype,
                         terms,
                         {target.data()},
                         coefficients,
                         static_cast<const float*>(target_gradient.data()),
                         {static_cast<float*>(bias.data()),
                          has_factors ? static_cast<const float*>(factors.data()) : nullptr}},
                        nullptr)
            .ok());
  for (int64_t v = 0; v < vocab; ++v) {
    const int64_t i = v - c.first_class;
    if (i < 0 || i >= c.classes)
      CHECK(bias.untouched(v));
    else
      compare(bias.at(v), bias_expected[i], bias_tolerance[i], "bias sum", gradient_dtype);
  }
  for (int64_t v = 0; v < c.classes; ++v) {
    for (int64_t n = 0; n < c.tokens; ++n)
      compare(scores.at(v * stride + n, gradient_dtype), expected[v * c.tokens + n],
              tolerance[v * c.tokens + n], "stored gradient", gradient_dtype);
    for (int64_t n = c.tokens; n < stride; ++n) CHECK(scores.untouched(v * stride + n));
  }
}

void test_stored_gradients() {
  // Classes, tokens, padding, offset, first class, softcap, entropy, weighted, class weight.
  const StoredCase cases[] = {
      {1, 1, 0},
      {37, 16, 0, 0, 128},
      {300, 9, 7, 0, 256, 0.0, true, true, true},
      {130, 261, 3, 1, 0, 15.0, true},
      {129, 40, 8, 0, 128, 11.0},
      {20, 530, 6, 0, 384, 0.0, false, true},
  };
  emulator::expect_clean("stored_gradient", [&] {
    for (const StoredCase& c : cases)
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) test_stored_gradient(c, dtype);
  });
}

// NaN scores and rows of -inf alone are NaN in the gradient, as after a log-softmax; -inf next to
// finite logits is zero.
void test_stored_special_values() {
  const double inf = std::numeric_limits<double>::infinity();
  enum { kHalfInfinite, kNan, kNothing, kTokens };
  Array scores(DType::kFloat16, 2 * kTokens, "scores"), maxima(DType::kFloat32, kTokens, "maxima"),
      shift(DType::kFloat32, kTokens, "shift"), softmax(DType::kFloat32, kTokens, "softmax"),
      entropy(DType::kFloat32, kTokens, "entropy");
  const double max[] = {2.0, 0.0, -inf}, lse[] = {2.0, std::nan(""), -inf};
  for (int64_t n = 0; n < kTokens; ++n) {
    maxima.set(n, max[n]), shift.set(n, lse[n]), softmax.set(n, 0.5), entropy.set(n, 0.25);
    scores.set(n, n == kNothing ? 0.0 : 1.0);
    scores.set(kTokens + n, n == kNan ? std::nan("") : 0.0);
  }
  const StoredScores stored{scores.data(), kTokens, static_cast<float*>(maxima.data()), kTokens};
  CHECK(stored_gradient({{0, 2, kTokens},
                         stored,
                         DType::kBFloat16,
                         {},
                         {},
                         {shift.data(), softmax.data(), entropy.data()},
                         nullptr},
                        nullptr)
            .ok());
  CHECK(scores.at(kHalfInfinite, DType::kBFloat16) == 1.0);
  CHECK(scores.at(kTokens + kHalfInfinite, DType::kBFloat16) == 0.0);
  for (int64_t v = 0; v < 2; ++v)
    CHECK(std::isnan(scores.at(v * kTokens + kNan, DType::kBFloat16)) &&
          std::isnan(scores.at(v * kTokens + kNothing, DType::kBFloat16)));

  const auto status = [&](const Block& block, DType dtype, const LogitTerms& terms,
                          const Targets& targets, const Coefficients& coefficients) {
    return stored_gradient({block, stored, dtype, terms, targets, coefficients, nullptr}, nullptr);
  };
  const int64_t index = 0;
  CHECK(status({}, DType::kBFloat16, {}, {}, {}).ok());
  CHECK(!status({64, 2, 3}, DType::kBFloat16, {}, {}, {}).ok());
  CHECK(!status({0, 2, 3}, DType::kFloat32, {}, {}, {}).ok());
  CHECK(!status({0, 2, 3}, DType::kBFloat16, {}, {nullptr, shift.data()}, {}).ok());
  CHECK(!status({0, 2, 3}, DType::kBFloat16, {}, {&index}, {}).ok());
  Coefficients smooth;
  smooth.weighted = shift.data();
  CHECK(!status({0, 2, 3}, DType::kBFloat16, {nullptr, nullptr, 1.0, 5.0}, {}, smooth).ok());
}

// ---- sums over tokens ----

void test_bias_gradient(int64_t classes, int64_t tokens, int64_t padding, int64_t offset,
                        DType dtype) {
  std::mt19937 random{7};
  std::normal_distribution<double> normal;
  const int64_t stride = tokens + padding, first_class = 3;
  Array gradient(dtype, classes * stride, "gradient", BufferAccess::kReadOnly, offset);
  Array sums(dtype, first_class + classes + 1, "sums");
  std::vector<double> expected(classes), magnitude(classes);
  for (int64_t v = 0; v < classes; ++v) {
    sums.set(first_class + v, normal(random));
    expected[v] = sums.at(first_class + v), magnitude[v] = std::abs(expected[v]);
    for (int64_t n = 0; n < tokens; ++n) {
      gradient.set(v * stride + n, normal(random));
      const double term = gradient.at(v * stride + n);
      expected[v] += term;
      magnitude[v] += std::abs(term);
    }
  }
  CHECK(add_bias_gradient({first_class, classes, tokens}, gradient.data(), stride, dtype,
                          sums.data(), nullptr)
            .ok());
  for (int64_t v = 0; v < classes; ++v)
    compare(sums.at(first_class + v), expected[v], 8 * unit_roundoff(dtype) * magnitude[v],
            "bias sum", dtype);
  CHECK(sums.untouched(0) && sums.untouched(2) && sums.untouched(first_class + classes));
}

// ---- rows ----

// Three chunks enter a gradient by `updates`, one after the other, with a scale and without.
void test_update(const std::vector<WeightUpdate>& updates, DType dtype, bool scaled, int64_t rows,
                 int64_t columns, int64_t offset) {
  std::mt19937 random{3};
  std::normal_distribution<double> normal;
  const DType a = accumulation_dtype(dtype);
  const int64_t sums_stride = columns + 5, gradient_stride = columns + 3;
  const int64_t remainder_stride = columns + 1;
  const int64_t parts = 1 + columns % 3, part_stride = rows * sums_stride + 2 * offset;
  Array gradient(dtype, rows * gradient_stride, "gradient", BufferAccess::kReadWrite, offset);
  // Every other row has one of the two scales, or all have the first one.
  Array scale(a, rows, "scale", BufferAccess::kReadOnly);
  for (int64_t r = 0; r < rows; ++r) scale.set(r, r % 2 == 0 ? 0.3 : 1.7);
  std::vector<uint16_t> remainder(rows * remainder_stride, 0x1234);
  const GlobalBuffer guard(remainder.data(), remainder.size() * 2, "remainder");
  const int64_t scale_stride = rows % 3 == 0 ? 0 : 1;
  std::vector<double> expected(rows * columns), tolerance(rows * columns);
  for (const WeightUpdate update : updates) {
    Array sums(a, parts * part_stride, "sums", BufferAccess::kReadOnly, offset);
    const bool last = update == WeightUpdate::kSplitLast;
    const bool split =
        last || update == WeightUpdate::kSplitFirst || update == WeightUpdate::kSplitNext;
    const bool starts = update == WeightUpdate::kWrite || update == WeightUpdate::kSplitFirst;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < columns; ++d) {
        const double factor = scaled ? scale.at(r * scale_stride) : 1.0;
        double& value = expected[r * columns + d];
        double& error = tolerance[r * columns + d];
        if (starts) value = error = 0;
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t at = part * part_stride + r * sums_stride + d;
          sums.set(at, normal(random));
          sum += sums.at(at);
          error += 4 * unit_roundoff(a) * std::abs(sums.at(at)) * (scaled ? 1.7 : 1);
        }
        value += split ? sum : sum * factor;
        error += 4 * unit_roundoff(a) * (std::abs(value) + std::abs(sum));
        if (last) value *= factor;
        if (!split || last)
          error += 1.01 * unit_roundoff(dtype) * std::abs(value) + rounding_near_zero(dtype);
      }
    RowUpdate rows_of;
    rows_of.sums = sums.data(), rows_of.sums_stride = sums_stride;
    rows_of.parts = parts, rows_of.part_stride = part_stride;
    rows_of.gradient = gradient.data(), rows_of.gradient_stride = gradient_stride;
    if (split)
      rows_of.split.remainder = remainder.data(), rows_of.split.remainder_stride = remainder_stride;
    rows_of.dtype = dtype, rows_of.rows = rows, rows_of.columns = columns;
    rows_of.update = update, rows_of.scale = scaled ? scale.data() : nullptr;
    rows_of.scale_stride = scale_stride;
    CHECK(update_rows(rows_of, nullptr).ok());

    const bool halves = split && !last;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < columns; ++d) {
        double got = gradient.at(r * gradient_stride + d);
        if (halves) {
          const auto upper = __float2bfloat16(static_cast<float>(got));
          uint16_t upper_bits;
          std::memcpy(&upper_bits, &upper, 2);
          const uint32_t bits = uint32_t{upper_bits} << 16 | remainder[r * remainder_stride + d];
          float joined;
          std::memcpy(&joined, &bits, 4);
          got = joined;
          // The first sum is kept bit by bit.
          if (starts && parts == 1) CHECK(got == sums.at(r * sums_stride + d));
        }
        compare(got, expected[r * columns + d], tolerance[r * columns + d], "update", dtype);
      }
      for (int64_t d = columns; d < gradient_stride; ++d)
        CHECK(gradient.untouched(r * gradient_stride + d));
      CHECK(remainder[r * remainder_stride + columns] == 0x1234);
    }
  }
}

// Compact sums of chunks, with blocks of every magnitude, zeros, infinity and NaN among them.
template <class T>
void test_compact_update(int64_t rows, int64_t columns, int64_t padding, int64_t offset) {
  std::mt19937 random{11};
  std::normal_distribution<float> normal;
  CompactGradient<T> compact(rows, columns, padding, offset);
  GuardedMatrix<float> sums("sums", rows, columns, 5, offset, BufferAccess::kReadWrite);
  GuardedArray<float> scale("scale", 1);
  scale[0] = 0.3f;
  for (const WeightUpdate update : {WeightUpdate::kSplitFirst, WeightUpdate::kSplitNext,
                                    WeightUpdate::kSplitNext, WeightUpdate::kSplitLast}) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < columns; ++d) {
        const int64_t block = d / kCompactBlock;
        const int magnitude = static_cast<int>((r * 7 + block * 3) % 11) * 25 - 150;
        sums.at(r, d) = (r + block) % 6 == 5 ? 0.f : std::ldexp(normal(random), magnitude);
      }
    if (update == WeightUpdate::kSplitNext) sums.at(rows - 1, columns - 1) = INFINITY;
    if (update == WeightUpdate::kSplitNext) sums.at(0, 0) = NAN;
    RowUpdate rows_of;
    rows_of.sums = sums.data(), rows_of.sums_stride = sums.stride;
    rows_of.gradient = compact.gradient.data();
    rows_of.gradient_stride = compact.gradient.stride;
    rows_of.split = compact.split();
    rows_of.dtype = dtype_of<T>(), rows_of.rows = rows, rows_of.columns = columns;
    rows_of.update = update, rows_of.scale = scale.data();
    CHECK(update_rows(rows_of, nullptr).ok());
    CHECK(compact.is_model_after(
        update, [&](int64_t r, int64_t d) { return sums.at(r, d); }, scale[0]));
  }
}

void test_copy(DType from_dtype, DType to_dtype, int64_t rows, int64_t columns, int64_t offset) {
  std::mt19937 random{9};
  std::normal_distribution<double> normal;
  const int64_t from_stride = columns + 2, to_stride = columns + 7;
  Array from(from_dtype, rows * from_stride, "from", BufferAccess::kReadOnly, offset);
  Array to(to_dtype, rows * to_stride, "to", BufferAccess::kReadWrite, offset);
  for (int64_t i = 0; i < rows * from_stride; ++i) from.set(i, normal(random));
  CHECK(copy_rows(
            {from.data(), from_stride, from_dtype, to.data(), to_stride, to_dtype, rows, columns},
            nullptr)
            .ok());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < columns; ++d)
      CHECK(to.at(r * to_stride + d) == from.at(r * from_stride + d));
    for (int64_t d = columns; d < to_stride; ++d) CHECK(to.untouched(r * to_stride + d));
  }
}

// A row whose factor is 0 gets zeros, though it holds nothing but NaN.
void test_multiply_rows(DType dtype, int64_t rows, int64_t columns, int64_t offset) {
  std::mt19937 random{9};
  std::normal_distribution<double> normal;
  const int64_t from_stride = columns + 2, to_stride = columns + 7;
  Array from(dtype, rows * from_stride, "from", BufferAccess::kReadOnly, offset);
  Array to(dtype, rows * to_stride, "to", BufferAccess::kReadWrite, offset);
  Array factors(DType::kFloat32, rows, "factors", BufferAccess::kReadOnly);
  for (int64_t r = 0; r < rows; ++r) {
    factors.set(r, r % 3 == 0 ? 0.0 : r % 3 == 1 ? 1.0 : 0.25);
    for (int64_t d = 0; d < columns && r % 3 != 0; ++d)
      from.set(r * from_stride + d, normal(random));
  }
  CHECK(multiply_rows({from.data(), from_stride, dtype, static_cast<const float*>(factors.data()),
                       to.data(), to_stride, rows, columns},
                      nullptr)
            .ok());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < columns; ++d)
      compare(to.at(r * to_stride + d),
              r % 3 == 0 ? 0.0 : factors.at(r) * from.at(r * from_stride + d), 1e-7,
              "multiplied row", dtype);
    for (int64_t d = columns; d < to_stride; ++d) CHECK(to.untouched(r * to_stride + d));
  }
}

// What a row holds whose factor is not 0 does not matter.
void test_non_finite_rows(DType dtype, int64_t rows, int64_t columns, int64_t offset) {
  const int64_t stride = columns + 2;
  Array factors(DType::kFloat32, rows, "factors", BufferAccess::kReadOnly);
  for (int64_t r = 0; r < rows; ++r) factors.set(r, r % 2 == 0 ? 0.0 : 1.0);
  const double values[] = {1.0, NAN, INFINITY, -INFINITY};
  for (const double value : values)
    for (const int64_t row : {int64_t{0}, rows / 2, rows - 1})
      for (const int64_t column : {int64_t{0}, columns - 1}) {
        Array matrix(dtype, rows * stride, "matrix", BufferAccess::kReadOnly, offset);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < columns && r % 2 == 0; ++d) matrix.set(r * stride + d, 1.0);
        matrix.set(row * stride + column, value);
        int32_t found = 0;
        const GlobalBuffer guard(&found, 4, "found", BufferAccess::kReadWrite, 4);
        CHECK(
            find_non_finite_rows({matrix.data(), stride, dtype,
                                  static_cast<const float*>(factors.data()), rows, columns, &found},
                                 nullptr)
                .ok());
        CHECK(found == (row % 2 == 0 && !std::isfinite(value) ? 1 : 0));
      }
}

void test_scale(DType dtype, int64_t n, double factor, bool in_place, int64_t offset) {
  std::mt19937 random{2};
  std::normal_distribution<double> normal;
  // Nothing may be written in place where the scale is 1.
  const auto access = in_place && factor == 1 ? BufferAccess::kReadOnly : BufferAccess::kReadWrite;
  Array from(dtype, n, "from", access, offset), to(dtype, n, "to");
  double scale = factor;
  const GlobalBuffer guard(&scale, 8, "scale", BufferAccess::kReadOnly, 8);
  std::vector<double> expected(n);
  for (int64_t i = 0; i < n; ++i) {
    from.set(i, normal(random));
    expected[i] = from.at(i) * factor;
  }
  Array& result = in_place ? from : to;
  CHECK(scale_gradient(from.data(), result.data(), dtype, n, &scale, nullptr).ok());
  for (int64_t i = 0; i < n; ++i)
    compare(result.at(i), expected[i],
            (1.01 * unit_roundoff(dtype) + 2 * unit_roundoff(accumulation_dtype(dtype))) *
                    std::abs(expected[i]) +
                rounding_near_zero(dtype),
            "scaled gradient", dtype);
}

void test_rows() {
  const int64_t shapes[][3] = {{1, 1, 0}, {9, 40, 0}, {3, 261, 1}, {2, 2055, 0}, {11, 8, 3}};
  emulator::expect_clean("rows", [&] {
    for (const auto& [rows, columns, offset] : shapes) {
      for (const DType dtype : kTypes) {
        if (!is_16_bit(dtype)) test_bias_gradient(rows, columns, 3, offset, dtype);
        test_copy(dtype, dtype, rows, columns, offset);
        test_multiply_rows(dtype, rows, columns, offset);
        test_non_finite_rows(dtype, rows, columns, offset);
        for (const bool scaled : {false, true}) {
          if (is_16_bit(dtype))
            test_update({WeightUpdate::kWrite}, dtype, scaled, rows, columns, offset);
          else
            test_update(
                {WeightUpdate::kWrite, WeightUpdate::kAccumulate, WeightUpdate::kAccumulate}, dtype,
                scaled, rows, columns, offset);
        }
        for (const double factor : {1.0, 1.7}) {
          test_scale(dtype, rows * columns, factor, true, offset);
          test_scale(dtype, rows * columns, factor, false, offset);
        }
      }
      test_copy(DType::kBFloat16, DType::kFloat32, rows, columns, offset);
      test_copy(DType::kFloat16, DType::kFloat32, rows, columns, offset);
      for (const bool scaled : {false, true})
        test_update({WeightUpdate::kSplitFirst, WeightUpdate::kSplitNext, WeightUpdate::kSplitLast},
                    DType::kBFloat16, scaled, rows, columns, offset);
      test_compact_update<__nv_bfloat16>(rows, columns, 3, offset);
      test_compact_update<__half>(rows, columns, 8 - columns % 8, offset);
    }
  });
  // More elements than the grid covers at once; in one schedule, because of the time it takes.
  test_scale(DType::kBFloat16, 2048 * 256 * 8 + 9, 1.7, false, 0);
  CHECK(emulator::reports().empty());
}

void test_statuses() {
  RowUpdate update;
  CHECK(update_rows(update, nullptr).ok());  // nothing to do
  update.rows = update.columns = 1, update.update = WeightUpdate::kSplitFirst;
  CHECK(!update_rows(update, nullptr).ok());
  update.dtype = DType::kBFloat16;
  CHECK(!update_rows(update, nullptr).ok());
  uint16_t remainder = 0;
  update.dtype = DType::kFloat16, update.split.remainder = &remainder;
  CHECK(!update_rows(update, nullptr).ok());
  update.update = WeightUpdate::kAccumulate;
  CHECK(!update_rows(update, nullptr).ok());
  update.update = WeightUpdate::kSplitFirst;
  uint8_t exponent = 0;
  update.dtype = DType::kFloat32, update.split = {}, update.split.exponents = &exponent;
  CHECK(!update_rows(update, nullptr).ok());
  RowCopy copy;
  copy.columns = 1;
  CHECK(copy_rows(copy, nullptr).ok());
  copy.rows = 1, copy.to_dtype = DType::kBFloat16;
  CHECK(!copy_rows(copy, nullptr).ok());
  CHECK(scale_gradient(nullptr, nullptr, DType::kFloat32, 0, nullptr, nullptr).ok());
  CHECK(add_bias_gradient({}, nullptr, 0, DType::kFloat32, nullptr, nullptr).ok());
  CHECK(!add_bias_gradient({0, 1, 1}, nullptr, 1, DType::kBFloat16, nullptr, nullptr).ok());
  CHECK(multiply_rows(RowProduct{}, nullptr).ok());
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_stored_gradients();
  test_stored_special_values();
  test_rows();
  test_statuses();
  CHECK(emulator::reports().empty());
  emulator::print_reports();
  std::printf("largest error: %.2f of the tolerance\n", emulator::worst_error);
  return emulator::finish("test_generic_gradient_kernels");
}
