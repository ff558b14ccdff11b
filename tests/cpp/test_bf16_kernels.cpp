// The bf16 kernels, portable and AVX512-BF16, against plain loops: packings element by element, products
// for every height of the micro-tile and odd inner sizes, epilogues, and no byte written beyond the result.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/bf16_kernels.h"
#include "cpu/compact_sum.h"
#include "cpu/features.h"
#include "cpu/layout.h"
#include "cpu/number.h"
#include "memory.h"

namespace {

using namespace memeff;
using test::GuardedBuffer;

Bf16Kernels kernels;  // the version under test
constexpr int64_t kMostInner = 2 * kInnerBlock + 5;

double from_bf16(uint16_t bits) { return to_arithmetic(BFloat16{bits}); }
double from_fp16(uint16_t bits) { return to_arithmetic(Float16{bits}); }

/// Rows of bf16 numbers `stride` apart; the last row ends the memory.
struct Matrix {
  Matrix(int64_t row_count, int64_t column_count, int64_t row_stride, uint64_t seed)
      : rows(row_count),
        columns(column_count),
        stride(row_stride),
        buffer(((row_count - 1) * row_stride + column_count) * 2) {
    test::Random random(seed);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j)
        at(i, j) = bf16_bits(static_cast<float>(random.uniform(-1, 1)));
    }
  }

  uint16_t* data() { return buffer.as<uint16_t>(); }
  uint16_t& at(int64_t i, int64_t j) { return data()[i * stride + j]; }

  int64_t rows, columns, stride;
  GuardedBuffer buffer;
};

std::vector<int64_t> some_rows(int64_t count, int64_t of) {
  test::Random random(5);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < count; ++i) rows.push_back(random.below(of));
  return rows;
}

void test_pack_transposed() {
  for (const int64_t inner : {1, 2, 7, 31, 32, 33, 64, 95}) {
    for (const int64_t count : {1, 15, 16, 17, 31, 32}) {
      test::context() = test::describe("pack_transposed ", count, " rows of ", inner);
      Matrix source(40, inner, inner + 3, 1);
      const std::vector<int64_t> rows = some_rows(count, source.rows);
      const int64_t pairs = ceil_div(inner, 2);
      GuardedBuffer panel(pairs * kPanel * 4);
      kernels.pack_transposed(source.data(), source.stride, rows.data(), count, inner,
                              panel.as<uint16_t>());
      for (int64_t k = 0; k < 2 * pairs; ++k) {
        for (int64_t i = 0; i < kPanel; ++i) {
          const bool inside = k < inner && i < count;
          const int expected = inside ? source.at(rows[static_cast<size_t>(i)], k) : 0;
          CHECK_EQ(int{panel.as<uint16_t>()[(k / 2 * kPanel + i) * 2 + k % 2]}, expected);
        }
      }
      CHECK(panel.intact() && source.buffer.intact());
    }
  }
}

void test_interleave_rows() {
  for (const int64_t width : {kMicroRows, kPanel}) {
    for (const int64_t inner : {1, 2, 5, 20}) {
      for (int64_t columns = 1; columns <= width; ++columns) {
        for (const bool listed : {false, true}) {
          test::context() =
              test::describe("interleave_rows ", inner, " x ", columns, " of ", width);
          Matrix source(inner, columns, columns + 1, 2);
          const std::vector<int64_t> rows = some_rows(inner, inner);
          const int64_t pairs = ceil_div(inner, 2);
          GuardedBuffer out(pairs * width * 4);
          kernels.interleave_rows(source.data(), source.stride, listed ? rows.data() : nullptr,
                                  inner, columns, width, out.as<uint16_t>());
          for (int64_t k = 0; k < 2 * pairs; ++k) {
            for (int64_t j = 0; j < width; ++j) {
              const bool inside = k < inner && j < columns;
              const int64_t row = inside && listed ? rows[static_cast<size_t>(k)] : k;
              const int expected = inside ? source.at(row, j) : 0;
              CHECK_EQ(int{out.as<uint16_t>()[(k / 2 * width + j) * 2 + k % 2]}, expected);
            }
          }
          CHECK(out.intact());
        }
      }
    }
  }
}

void test_copy_rows() {
  for (const int64_t inner : {1, 2, 31, 32, 33, 64, 97}) {
    test::context() = test::describe("copy_rows of ", inner);
    Matrix source(5, inner, inner + 2, 3);
    const int64_t written = round_up(inner, 2);
    GuardedBuffer out((4 * copy_stride(inner) + written) * 2);
    kernels.copy_rows(source.data(), source.stride, 5, inner, out.as<uint16_t>());
    for (int64_t i = 0; i < 5; ++i) {
      for (int64_t k = 0; k < written; ++k) {
        const int expected = k < inner ? source.at(i, k) : 0;
        CHECK_EQ(int{out.as<uint16_t>()[i * copy_stride(inner) + k]}, expected);
      }
    }
    CHECK(out.intact());
  }
}

/// A [rows, inner] times B [inner, columns], both kinds of A, stored and added.
void test_product(int64_t rows, int64_t inner, int64_t columns) {
  Matrix a(rows, inner, inner, 4);
  Matrix b(inner, columns, columns, 5);
  const int64_t pairs = ceil_div(inner, 2);
  const int64_t panel_stride = pairs * 2 * kPanel + 64;
  const int64_t panels = ceil_div(columns, kPanel);
  GuardedBuffer packed_b(panels * panel_stride * 2);
  for (int64_t j = 0; j < panels; ++j) {
    kernels.interleave_rows(b.data() + j * kPanel, b.stride, nullptr, inner,
                            std::min(kPanel, columns - j * kPanel), kPanel,
                            packed_b.as<uint16_t>() + j * panel_stride);
  }
  GuardedBuffer copy(rows * copy_stride(inner) * 2);
  kernels.copy_rows(a.data(), a.stride, rows, inner, copy.as<uint16_t>());
  const int64_t group_stride = pairs * 2 * kMicroRows;
  GuardedBuffer packed_a(ceil_div(rows, kMicroRows) * group_stride * 2);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < 2 * pairs; ++k) {
      packed_a.as<uint16_t>()[i / kMicroRows * group_stride +
                              (k / 2 * kMicroRows + i % kMicroRows) * 2 + k % 2] =
          k < inner ? a.at(i, k) : 0;
    }
  }

  const int64_t written = panels * kPanel;
  const int64_t c_stride = written + 16;
  for (const bool pairs_of_a : {false, true}) {
    test::context() =
        test::describe(pairs_of_a ? "pairs " : "rows ", rows, " x ", inner, " x ", columns);
    GuardedBuffer c(((rows - 1) * c_stride + written) * 4);
    Product product;
    product.a = pairs_of_a ? packed_a.as<uint16_t>() : copy.as<uint16_t>();
    product.a_stride = pairs_of_a ? group_stride : copy_stride(inner);
    product.rows = rows;
    product.panels = packed_b.as<uint16_t>();
    product.panel_stride = panel_stride;
    product.columns = columns;
    product.inner = inner;
    product.c = c.as<float>();
    product.c_stride = c_stride;
    for (const int times : {1, 2}) {
      product.accumulate = times == 2;
      (pairs_of_a ? kernels.multiply_pairs : kernels.multiply_rows)(product);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          double expected = 0;
          for (int64_t k = 0; k < inner; ++k)
            expected += from_bf16(a.at(i, k)) * from_bf16(b.at(k, j));
          const double rounding = 1e-6 * times * (1 + std::sqrt(static_cast<double>(inner)));
          CHECK_NEAR(product.c[i * c_stride + j], times * expected, rounding);
        }
        for (int64_t j = written; j < c_stride && i + 1 < rows; ++j) {
          CHECK_EQ(bits_of(product.c[i * c_stride + j]), 0xffffffffu);
        }
      }
    }
    CHECK(c.intact());
  }
}

void test_products() {
  for (int64_t rows = 1; rows <= kMicroRows; ++rows) {
    for (const int64_t inner : {1, 2, 3, 34}) test_product(rows, inner, kPanel);
  }
  test_product(15, 33, 40);
  test_product(29, kInnerBlock, 2 * kPanel);
  test_product(30, kInnerBlock + 1, kPanel);
  test_product(3, kMostInner, 3 * kPanel - 1);
}

void test_update_rows() {
  enum Mode { kWrite, kAdd, kSplitFirst, kSplitNext, kSplitLast };
  for (const Mode mode : {kWrite, kAdd, kSplitFirst, kSplitNext, kSplitLast}) {
    for (const int64_t columns : {1, 15, 16, 17, 50}) {
      test::context() =
          test::describe("update_rows mode ", static_cast<int>(mode), ", ", columns, " columns");
      const int64_t rows = 3, stride = columns + 2, sums_stride = columns + 7;
      Matrix gradient(rows, columns, stride, 6);
      Matrix low(rows, columns, stride, 7);
      Matrix gradient_before = gradient, low_before = low;
      GuardedBuffer sums(((rows - 1) * sums_stride + columns) * 4);
      test::Random random(8);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t d = 0; d < columns; ++d) {
          sums.as<float>()[i * sums_stride + d] = static_cast<float>(random.uniform(-1, 1));
        }
      }
      const bool split = mode >= kSplitFirst;
      RowUpdate update = {};
      update.sums = sums.as<float>();
      update.sums_stride = sums_stride;
      update.rows = rows;
      update.columns = columns;
      update.scale = 0.25f;  // a power of two: the product is exact, and so is the expectation
      update.gradient = gradient.data();
      update.gradient_stride = stride;
      update.low = split ? low.data() : nullptr;
      update.read = mode != kWrite && mode != kSplitFirst;
      update.round = !split || mode == kSplitLast;
      kernels.update_rows(update);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t d = 0; d < columns; ++d) {
          float expected = 0.25f * update.sums[i * sums_stride + d];
          const uint32_t low_bits = split ? low_before.at(i, d) : 0;
          if (update.read)
            expected += float_from_bits(uint32_t{gradient_before.at(i, d)} << 16 | low_bits);
          if (update.round) {
            CHECK_EQ(int{gradient.at(i, d)}, int{bf16_bits(expected)});
          } else {
            CHECK_EQ(uint32_t{gradient.at(i, d)} << 16 | low.at(i, d), bits_of(expected));
          }
        }
        for (int64_t d = columns; d < stride && i + 1 < rows; ++d)
          CHECK_EQ(int{gradient.at(i, d)}, 0xffff);
      }
      CHECK(gradient.buffer.intact() && low.buffer.intact());
    }
  }
}

/// Compact sums in vectors: the same bits as the scalar code (test_compact_sum.cpp), block by block.
void test_update_compact_rows() {
  enum Mode { kFirst, kNext, kLast };
  for (const int64_t columns : {1, 16, 33, 63, 64, 65, 200}) {
    test::context() = test::describe("compact sums, ", columns, " columns");
    const int64_t rows = 4, stride = columns + 2, sums_stride = columns + 7;
    const int64_t blocks = ceil_div(columns, kCompactBlock), exponents_stride = blocks + 1;
    Matrix gradient(rows, columns, stride, 6);
    GuardedBuffer exponents((rows - 1) * exponents_stride + blocks);
    GuardedBuffer sums(((rows - 1) * sums_stride + columns) * 4);
    test::Random random(8);
    for (const Mode mode : {kFirst, kNext, kNext, kLast}) {
      for (int64_t i = 0; i < rows; ++i) {
        // Row 0 is ordinary, row 1 spans many magnitudes, row 2 is mostly 0, row 3 is not finite in part.
        for (int64_t d = 0; d < columns; ++d) {
          double value = random.uniform(-1, 1);
          if (i == 1) value = std::ldexp(value, static_cast<int>(random.below(60)) - 30);
          if (i == 2 && d % 5 != 0) value = 0;
          if (i == 3 && d == 3) value = std::numeric_limits<double>::infinity();
          if (i == 3 && d == 70 && mode == kNext) value = std::nan("");
          sums.as<float>()[i * sums_stride + d] = static_cast<float>(value);
        }
      }
      Matrix before = gradient;
      const std::vector<uint8_t> exponents_before(
          exponents.as<uint8_t>(),
          exponents.as<uint8_t>() + (rows - 1) * exponents_stride + blocks);
      RowUpdate update = {};
      update.sums = sums.as<float>(), update.sums_stride = sums_stride;
      update.rows = rows, update.columns = columns, update.scale = 0.25f;
      update.gradient = gradient.data(), update.gradient_stride = stride;
      update.exponents = exponents.as<uint8_t>(), update.exponents_stride = exponents_stride;
      update.read = mode != kFirst, update.round = mode == kLast;
      kernels.update_rows(update);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t at = i * exponents_stride + b, first = b * kCompactBlock;
          const int64_t count = std::min(kCompactBlock, columns - first);
          float values[kCompactBlock];
          for (int64_t k = 0; k < count; ++k) {
            values[k] = 0.25f * update.sums[i * sums_stride + first + k];
            if (update.read) {
              values[k] +=
                  load_compact(before.at(i, first + k), exponents_before[static_cast<size_t>(at)]);
            }
          }
          const uint8_t exponent = mode == kLast ? kPlainExponent : compact_exponent(values, count);
          CHECK_EQ(int{update.exponents[at]}, int{exponent});
          for (int64_t k = 0; k < count; ++k) {
            if (std::isnan(values[k])) {
              CHECK(std::isnan(load_compact(gradient.at(i, first + k), exponent)));
            } else {
              CHECK_EQ(int{gradient.at(i, first + k)}, int{compact_code(values[k], exponent)});
            }
          }
        }
      }
      CHECK(gradient.buffer.intact() && exponents.intact());
    }
  }
}

/// Scores of a tile, then gradients from their exponentials.
void test_tile(int64_t classes, int64_t tokens, int64_t features, float softcap, bool smoothing) {
  test::context() =
      test::describe("tile ", classes, " x ", tokens, " x ", features, " softcap ", softcap);
  Matrix weight(classes, features, features + 1, 9);
  Matrix input(tokens, features, features, 10);
  const int64_t panel_stride = round_up(features, 2) * kPanel;
  GuardedBuffer panels(ceil_div(tokens, kPanel) * panel_stride * 2);
  std::vector<int64_t> rows(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t) rows[static_cast<size_t>(t)] = t;
  for (int64_t t = 0; t < tokens; t += kPanel) {
    kernels.pack_transposed(input.data(), input.stride, rows.data() + t,
                            std::min(kPanel, tokens - t), features,
                            panels.as<uint16_t>() + t / kPanel * panel_stride);
  }
  std::vector<float> bias(static_cast<size_t>(classes)), class_weight(static_cast<size_t>(classes));
  for (int64_t v = 0; v < classes; ++v) {
    bias[static_cast<size_t>(v)] = 0.01f * static_cast<float>(v % 7);
    class_weight[static_cast<size_t>(v)] = 0.5f + 0.1f * static_cast<float>(v % 5);
  }
  const int64_t stride = tokens + 3;
  GuardedBuffer exponentials(((classes - 1) * stride + tokens) * 2);
  GuardedBuffer scratch(kScoreScratchBytes), maximum(tokens * 4), sum(tokens * 4);
  ScoreTile tile;
  tile.weight = weight.data(), tile.weight_stride = weight.stride;
  tile.classes = classes, tile.features = features;
  tile.panels = panels.as<uint16_t>(), tile.panel_stride = panel_stride, tile.tokens = tokens;
  tile.transform.softcap = softcap, tile.transform.bias = bias.data();
  tile.partials.maximum = maximum.as<float>(), tile.partials.sum = sum.as<float>();
  tile.exponentials = exponentials.as<uint16_t>(), tile.exponentials_stride = stride;
  tile.scratch = scratch.as<float>();
  kernels.score_tile(tile);

  const auto score = [&](int64_t v, int64_t t) {
    double z = bias[static_cast<size_t>(v)];
    for (int64_t d = 0; d < features; ++d)
      z += from_bf16(weight.at(v, d)) * from_bf16(input.at(t, d));
    return softcap > 0 ? softcap * std::tanh(z / softcap) : z;
  };
  std::vector<double> z(static_cast<size_t>(classes * tokens));
  for (int64_t t = 0; t < tokens; ++t) {
    double largest = -INFINITY, total = 0;
    for (int64_t v = 0; v < classes; ++v) {
      largest = std::max(largest, z[static_cast<size_t>(v * tokens + t)] = score(v, t));
    }
    for (int64_t v = 0; v < classes; ++v) {
      const double value = z[static_cast<size_t>(v * tokens + t)];
      total += std::exp(value - largest);
      CHECK_NEAR(score_of(tile.scratch[v * kTileStride + t], softcap), value, 2e-5);
      double kept = std::exp(value - largest);
      if (softcap > 0) kept *= 1 - value / softcap * (value / softcap);
      CHECK_NEAR(from_fp16(tile.exponentials[v * stride + t]), kept, 6e-4 * kept + 1e-6);
    }
    CHECK_NEAR(maximum.as<float>()[t], largest, 2e-5);
    CHECK_NEAR(sum.as<float>()[t], total, 1e-4 * total);
  }
  CHECK(exponentials.intact() && scratch.intact() && maximum.intact() && sum.intact());

  const auto padded = static_cast<size_t>(round_up(tokens, kPanel));
  std::vector<float> shift(padded, 4.0f), scale_p(padded, 0.5f), scale_w(padded, 0.01f),
      factors(padded);
  GuardedBuffer before = exponentials;
  GuardedBuffer bias_sum(classes * 8);
  std::fill_n(bias_sum.as<double>(), classes, 1.0);
  GradientTile gradient = {};
  gradient.data = exponentials.as<uint16_t>(), gradient.stride = stride;
  gradient.classes = classes, gradient.tokens = tokens, gradient.maxima = maximum.as<float>();
  gradient.shift = shift.data(), gradient.scale_p = scale_p.data(),
  gradient.factors = factors.data();
  gradient.scale_w = smoothing ? scale_w.data() : nullptr;
  gradient.class_weight = smoothing ? class_weight.data() : nullptr;
  gradient.bias_sum = bias_sum.as<double>();
  kernels.gradient_tile(gradient);
  for (int64_t v = 0; v < classes; ++v) {
    double row_sum = 1;
    for (int64_t t = 0; t < tokens; ++t) {
      const double e = from_fp16(before.as<uint16_t>()[v * stride + t]);
      double expected = 0.5 * e * std::exp(static_cast<double>(maximum.as<float>()[t]) - 4.0);
      if (smoothing) expected -= 0.01 * class_weight[static_cast<size_t>(v)];
      row_sum += expected;
      CHECK_NEAR(from_bf16(gradient.data[v * stride + t]), expected,
                 0.004 * std::abs(expected) + 1e-7);
    }
    CHECK_NEAR(bias_sum.as<double>()[v], row_sum, 1e-4 * (1 + std::abs(row_sum)));
    for (int64_t t = tokens; t < stride && v + 1 < classes; ++t) {
      CHECK_EQ(int{gradient.data[v * stride + t]}, 0xffff);
    }
  }
  CHECK(exponentials.intact() && bias_sum.intact());
}

void test_kernels() {
  test_pack_transposed();
  test_interleave_rows();
  test_copy_rows();
  test_products();
  test_update_rows();
  test_update_compact_rows();
  test_tile(1, 1, 1, 0, false);
  test_tile(15, 17, 33, 0, true);
  test_tile(kTileVocab, 40, 7, 2, true);
  test_tile(30, kTileTokens, 64, 0, false);
  test_tile(kTileVocab, 33, kInnerBlock + 3, 30, true);
}

}  // namespace

int main() {
  kernels = bf16_kernels_portable();
  test_kernels();
  if (!cpu_features().avx512_bf16) {
    std::cout << "portable kernels only: this processor has no AVX512-BF16" << std::endl;
    return test::result();
  }
#if defined(__x86_64__)
  std::cout << "AVX512-BF16" << std::endl;
  kernels = bf16_kernels_avx512bf16();
  test_kernels();
#endif
  return test::result();
}
