// Errors and special values of exp and tanh in every version of the column kernels: to_gradient() of
// z with shift 0 and factor 1 is exp z, finish_scores() with a soft cap of 1 is tanh z.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "kernel_variants.h"
#include "memory.h"

namespace {

using namespace memeff;

template <class T>
std::vector<T> exp_of(const ColumnKernels<T>& kernels, std::vector<T> x) {
  const std::vector<T> zeros(x.size(), T{0}), ones(x.size(), T{1});
  const auto count = static_cast<int64_t>(x.size());
  GradientTransform<T> transform;
  transform.shift = zeros.data();
  transform.scale_p = ones.data();
  kernels.to_gradient(x.data(), count, 1, count, transform);
  return x;
}

template <class T>
std::vector<T> tanh_of(const ColumnKernels<T>& kernels, std::vector<T> x) {
  const auto count = static_cast<int64_t>(x.size());
  ScoreTransform<T> transform;
  transform.softcap = 1;
  kernels.finish_scores(x.data(), count, 1, count, transform, {});
  for (T& kept : x) kept = score_of(kept, transform.softcap);
  return x;
}

template <class T>
std::vector<T> samples(T low, T high) {
  std::vector<T> x = {low, high, T{0}, -T{0}, T{1}, T{-1}};
  test::Random random(2);
  const int count = 100000;
  for (int i = 0; i < count; ++i) {
    const double even = static_cast<double>(low) + (static_cast<double>(high) - low) * i / count;
    x.push_back(static_cast<T>(even));
    x.push_back(static_cast<T>(std::ldexp(random.uniform(-1, 1), -static_cast<int>(i % 40))));
  }
  return x;
}

template <class T>
void test_variant(const test::KernelVariant<T>& variant) {
  using Traits = VectorTraits<T>;
  const double ulp = std::numeric_limits<T>::epsilon();
  const T infinity = std::numeric_limits<T>::infinity();
  const T nan = std::numeric_limits<T>::quiet_NaN();

  const std::vector<T> x = samples(Traits::kLeast, Traits::kMost);
  const std::vector<T> e = exp_of(variant.kernels, x);
  for (size_t i = 0; i < x.size(); ++i) {
    const long double exact = std::exp(static_cast<long double>(x[i]));
    const auto error = static_cast<double>((e[i] - exact) / exact);
    if (test::near(error, 0, 2 * ulp)) continue;  // a context costs more than the check
    test::context() = test::describe(variant.name, ", ", sizeof(T), " bytes, exp ", x[i]);
    CHECK_NEAR(error, 0, 2 * ulp);
  }
  test::context() = test::describe(variant.name, ", ", sizeof(T), " bytes, special values");
  const std::vector<T> special = exp_of<T>(
      variant.kernels, {T{0}, -infinity, std::nextafter(Traits::kLeast, -infinity), nan, infinity,
                        std::numeric_limits<T>::max(), std::numeric_limits<T>::lowest()});
  CHECK_EQ(special[0], 1);
  CHECK_EQ(special[1], 0);
  CHECK_EQ(special[2], 0);
  CHECK(std::isnan(special[3]));
  CHECK(std::isfinite(special[4]) && special[4] > 1e38);
  CHECK_EQ(special[5], special[4]);
  CHECK_EQ(special[6], 0);

  const std::vector<T> t = samples<T>(-30, 30);
  const std::vector<T> h = tanh_of(variant.kernels, t);
  for (size_t i = 0; i < t.size(); ++i) {
    const double exact = std::tanh(static_cast<double>(t[i]));
    if (test::near(h[i], exact, 4 * ulp) && std::abs(h[i]) <= 1) continue;
    test::context() = test::describe(variant.name, ", ", sizeof(T), " bytes, tanh ", t[i]);
    CHECK_NEAR(h[i], exact, 4 * ulp);
    CHECK(std::abs(h[i]) <= 1);
  }
  test::context() = test::describe(variant.name, ", ", sizeof(T), " bytes, tanh of special values");
  const std::vector<T> limits = tanh_of<T>(variant.kernels, {T{0}, infinity, -infinity, nan});
  CHECK_EQ(limits[0], 0);
  CHECK_EQ(limits[1], 1);
  CHECK_EQ(limits[2], -1);
  CHECK(std::isnan(limits[3]));
}

void test_log() {
  // Scores' exponentials come as fp16 numbers of (0, 1]; and beyond them, all exponents.
  std::vector<float> x = {1.0f, std::sqrt(0.5f), std::sqrt(2.0f), std::ldexp(1.0f, -24)};
  test::Random random(4);
  for (int exponent = -125; exponent < 127; ++exponent) {
    for (int i = 0; i < 40; ++i) {
      x.push_back(std::ldexp(static_cast<float>(random.uniform(1, 2)), exponent));
    }
  }
  for (const float value : x) {
    const double exact = std::log(static_cast<double>(value));
    const float result = log_vector(broadcast<float>(value))[0];
    test::context() = test::describe("log ", value);
    CHECK_NEAR(result, exact, std::ldexp(1 + std::abs(exact), -22));
  }
  CHECK_EQ(log_vector(broadcast<float>(1.0f))[0], 0);
}

}  // namespace

int main() {
  test_log();
  for (const auto& variant : test::kernel_variants<float>()) test_variant(variant);
  for (const auto& variant : test::kernel_variants<double>()) test_variant(variant);
  return test::result();
}
