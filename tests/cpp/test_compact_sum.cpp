// The 16-bit code of compact sums (cpu/compact_sum.h), and how far sums of many chunks kept in it are from
// exact ones.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/compact_sum.h"
#include "memory.h"

namespace {

using namespace memeff;

constexpr int kMostCode = 28704;  // of 4 units

double unit_of(uint8_t exponent) { return std::ldexp(1.0, exponent - 128); }

/// Codes are numbers in order, each of which is rounded to itself, and neighbours are as close as promised.
void test_codes() {
  for (const int exponent : {2, 3, 100, 127, 200, 253}) {
    const auto e = static_cast<uint8_t>(exponent);
    test::context() = test::describe("codes, exponent ", exponent);
    CHECK_EQ(load_compact(0, e), 0.0f);
    for (int code = 0; code < kMostCode; ++code) {
      const auto bits = static_cast<uint16_t>(code);
      const auto next = static_cast<uint16_t>(code + 1);
      const double value = load_compact(bits, e);
      const double step = load_compact(next, e) - value;
      CHECK_EQ(int{compact_code(static_cast<float>(value), e)}, code);
      CHECK_EQ(static_cast<double>(load_compact(bits | 0x8000, e)), -value);
      // Half a step is the largest error of rounding.
      CHECK(step > 0 && step / 2 <= std::ldexp(value + unit_of(e) / 32, -13));
    }
    CHECK_EQ(static_cast<double>(load_compact(kMostCode, e)), 4 * unit_of(e));
  }
}

void test_rounding() {
  test::Random random(1);
  for (int i = 0; i < 20000; ++i) {
    // Blocks around every magnitude, smaller elements in them.
    const int scale = static_cast<int>(random.below(250)) - 124;
    float values[2];
    values[0] = static_cast<float>(std::ldexp(random.uniform(-1, 1), scale));
    values[1] = static_cast<float>(
        values[0] * std::ldexp(random.uniform(-1, 1), -static_cast<int>(random.below(20))));
    const uint8_t exponent = compact_exponent(values, 2);
    test::context() = test::describe("rounding of ", values[0], " and ", values[1]);
    CHECK(exponent >= kLeastCompactExponent && exponent < kPlainExponent);
    CHECK(exponent == kLeastCompactExponent || std::abs(values[0]) >= 2 * unit_of(exponent));
    for (const float value : values) {
      const double rounded = load_compact(compact_code(value, exponent), exponent);
      const double bound = std::ldexp(std::abs(value) + unit_of(exponent) / 32, -13);
      CHECK(std::abs(rounded - value) <= bound * (1 + 1e-3));  // the sum with 2^-5 is rounded too
    }
  }
}

void test_extremes() {
  test::context() = "extremes";
  const float infinity = std::numeric_limits<float>::infinity();
  const float zeros[] = {0.0f, -0.0f};
  const uint8_t least = compact_exponent(zeros, 2);
  CHECK_EQ(int{least}, int{kLeastCompactExponent});
  for (const float zero : zeros) CHECK_EQ(load_compact(compact_code(zero, least), least), 0.0f);
  const float largest = std::numeric_limits<float>::max();
  const uint8_t most = compact_exponent(&largest, 1);
  CHECK_EQ(int{most}, 254);
  CHECK_NEAR(load_compact(compact_code(-largest / 2, most), most) / -largest, 0.5, 1e-4);
  const float odd[] = {1.0f, -infinity, std::nanf(""), infinity};
  const uint8_t plain = compact_exponent(odd, 4);
  CHECK_EQ(int{plain}, int{kPlainExponent});
  CHECK_EQ(load_compact(compact_code(odd[0], plain), plain), 1.0f);
  CHECK_EQ(load_compact(compact_code(odd[1], plain), plain), -infinity);
  CHECK(std::isnan(load_compact(compact_code(odd[2], plain), plain)));
  CHECK_EQ(load_compact(compact_code(odd[3], plain), plain), infinity);
}

/// Sums of as many chunks as a plan may have: the errors of rounding after every chunk add up to little
/// next to that of the one rounding to bf16 at the end, where rounding to bf16 itself every time would
/// multiply it. Some columns are 1000 times larger than their neighbours, as in hidden states.
void test_sums() {
  constexpr int kRows = 100, kChunks = 256;
  test::Random random(2);
  double compact_error = 0, once_error = 0, native_error = 0;
  double small_compact_error = 0, small_norm = 0;
  for (int row = 0; row < kRows; ++row) {
    float values[kCompactBlock];
    uint16_t codes[kCompactBlock] = {};
    float native[kCompactBlock] = {};
    double exact[kCompactBlock] = {};
    const bool outliers = row % 2 == 1;
    uint8_t exponent = kLeastCompactExponent;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int64_t i = 0; i < kCompactBlock; ++i) {
        double term = random.uniform(-1, 1) + 0.05;
        if (outliers && i % 16 == 5) term *= 1000;
        const float rounded = static_cast<float>(term);
        exact[i] += rounded;
        values[i] = load_compact(codes[i], exponent) + rounded;
        native[i] = to_arithmetic(BFloat16{bf16_bits(native[i] + rounded)});
      }
      exponent = compact_exponent(values, kCompactBlock);
      for (int64_t i = 0; i < kCompactBlock; ++i) codes[i] = compact_code(values[i], exponent);
    }
    for (int64_t i = 0; i < kCompactBlock; ++i) {
      const double sum = load_compact(codes[i], exponent);
      const auto squared = [&](double value) { return (value - exact[i]) * (value - exact[i]); };
      if (!outliers) {
        compact_error += squared(sum);
        once_error += squared(to_arithmetic(BFloat16{bf16_bits(static_cast<float>(exact[i]))}));
        native_error += squared(native[i]);
      } else if (i % 16 != 5) {
        small_compact_error += squared(sum);
        small_norm += exact[i] * exact[i];
      }
    }
  }
  test::context() = test::describe(
      "sums of ", kChunks, " chunks: compact ", std::sqrt(compact_error / once_error), ", native ",
      std::sqrt(native_error / once_error), " of one rounding; ", "next to outliers ",
      std::sqrt(small_compact_error / small_norm));
  CHECK(std::sqrt(compact_error / once_error) < 0.5);
  CHECK(std::sqrt(native_error / once_error) > 4);
  // What shares a block with columns 1000 times larger is kept to 2^-18 of these after each chunk.
  CHECK(std::sqrt(small_compact_error / small_norm) < 0.03);
}

}  // namespace

int main() {
  test_codes();
  test_rounding();
  test_extremes();
  test_sums();
  return test::result();
}
