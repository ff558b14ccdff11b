// Conversions of 16-bit numbers: decoding by the definition of the formats, rounding by searching all
// numbers of the format.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/number.h"
#include "memory.h"

namespace {

using namespace memeff;

struct Format {
  const char* name;
  int mantissa_bits;
  int exponent_bias;
  uint16_t infinity;
  uint16_t (*encode)(float);
  float (*decode)(uint16_t);
};

const Format kFormats[] = {
    {"bf16", 7, 127, 0x7f80, bf16_bits,
     [](uint16_t bits) { return to_arithmetic(BFloat16{bits}); }},
    {"fp16", 10, 15, 0x7c00, fp16_bits, [](uint16_t bits) { return to_arithmetic(Float16{bits}); }},
};

/// Value of a non-negative number, where infinity counts as the number that would come next.
double magnitude(const Format& format, uint16_t bits) {
  const int exponent = bits >> format.mantissa_bits;
  const int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  const int whole = exponent == 0 ? mantissa : mantissa + (1 << format.mantissa_bits);
  return std::ldexp(whole, std::max(exponent, 1) - format.exponent_bias - format.mantissa_bits);
}

bool is_nan(const Format& format, uint16_t bits) { return (bits & 0x7fff) > format.infinity; }

class Rounding {
 public:
  explicit Rounding(const Format& format) {
    for (uint32_t bits = 0; bits <= format.infinity; ++bits) {
      values_.push_back(magnitude(format, static_cast<uint16_t>(bits)));
    }
  }

  /// The nearest number, ties to the even one.
  uint16_t round(float value) const {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double wanted = std::abs(static_cast<double>(value));
    const auto above = std::lower_bound(values_.begin(), values_.end(), wanted);
    if (above == values_.end()) return static_cast<uint16_t>(sign | (values_.size() - 1));
    auto index = static_cast<size_t>(above - values_.begin());
    if (index > 0) {
      const double up = values_[index] - wanted, down = wanted - values_[index - 1];
      if (down < up || (down == up && index % 2 == 1)) --index;
    }
    return static_cast<uint16_t>(sign | index);
  }

 private:
  std::vector<double> values_;
};

void test_decoding(const Format& format) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float value = format.decode(bits);
    test::context() = test::describe(format.name, " bits ", i);
    CHECK_EQ(std::signbit(value), (bits & 0x8000) != 0);
    if (is_nan(format, bits)) {
      CHECK(std::isnan(value));
      CHECK(is_nan(format, format.encode(value)));
      continue;
    }
    const auto positive = static_cast<uint16_t>(bits & 0x7fff);
    const double expected = positive == format.infinity ? std::numeric_limits<double>::infinity()
                                                        : magnitude(format, positive);
    CHECK_EQ(std::abs(static_cast<double>(value)), expected);
    CHECK_EQ(format.encode(value), bits);
  }
}

void test_rounding(const Format& format) {
  const Rounding rounding(format);
  const float infinity = std::numeric_limits<float>::infinity();
  const auto check = [&](float value) {
    for (const float signed_value : {value, -value}) {
      const uint16_t expected = rounding.round(signed_value);
      if (format.encode(signed_value) == expected) continue;  // a context costs more than the check
      test::context() = test::describe(format.name, " of ", signed_value);
      CHECK_EQ(format.encode(signed_value), expected);
    }
  };
  // Every number, the ties between neighbours, and what lies next to both.
  for (uint32_t bits = 0; bits < format.infinity; ++bits) {
    const double here = magnitude(format, static_cast<uint16_t>(bits));
    const double next = magnitude(format, static_cast<uint16_t>(bits + 1));
    for (const double value : {here, here + (next - here) / 2}) {
      const auto single = static_cast<float>(value);
      check(single);
      check(std::nextafter(single, infinity));
      check(std::nextafter(single, 0.0f));
    }
  }
  for (const float value :
       {65504.0f, 65519.996f, 65520.0f, 1e30f, 3.4028235e38f, infinity, 1e-45f}) {
    check(value);
  }
  test::Random random(1);
  for (int i = 0; i < 500000; ++i) {
    const float value = float_from_bits(random.bits());
    if (!std::isnan(value)) check(value);
  }
  for (const uint32_t nan : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    test::context() = test::describe(format.name, " of NaN ", nan);
    CHECK(is_nan(format, format.encode(float_from_bits(nan))));
  }
}

void test_dispatch() {
  test::context() = "load and store by dtype";
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64}) {
    test::GuardedBuffer buffer(3 * size_of(dtype));
    for (int i = 0; i < 3; ++i) store(dtype, buffer.as<void>(), i, 0.375 - i);
    for (int i = 0; i < 3; ++i) CHECK_EQ(load(dtype, buffer.as<void>(), i), 0.375 - i);
    CHECK(buffer.intact());
  }
}

}  // namespace

int main() {
  for (const Format& format : kFormats) {
    test_decoding(format);
    test_rounding(format);
  }
  test_dispatch();
  return test::result();
}
