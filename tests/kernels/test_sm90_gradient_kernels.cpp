// linear_gradient and the products that follow it, of sm_90a, emulated, against double precision: both
// dtypes, ragged shapes, every output, without and with clusters. Two blocks, or clusters, share the
// work, so that each computes several tiles and its ring of stages wraps.
#include <type_traits>

#include "kernels/sm90_case.h"
#include "kernels/work_list.h"

using namespace memeff;
using namespace memeff::cuda;
using namespace memeff::cuda::sm90_test;

namespace {

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
  // The gradient of the bias, from gradients before they are rounded; fp16 has factors of tokens.
  constexpr bool kHasFactors = std::is_same_v<T, __half>;
  const int64_t parts = ceil_div(c.tokens, kBiasTokens);
  Matrix<float> partials(c.classes, parts, 1), factors(1, c.tokens, 0, kInput);
  for (int64_t n = 0; n < c.tokens; ++n)
    factors.at(0, n) = kHasFactors ? static_cast<float>(1 << n % 3) : 1.f;
  const Status status = family.kernels.linear_gradient(
      {linear.block(),
       linear.operands(),
       linear.terms(),
       linear.targets(),
       coefficients,
       gradient.data,
       gradient.stride,
       {marks ? tiles.data : nullptr, tiles.stride, skip_mass, kVocab},
       {partials.data, partials.stride, kHasFactors ? factors.data : nullptr}},
      nullptr);
  CHECK(status.ok());
  CHECK(gradient.padding_is_intact() && tiles.padding_is_intact() && partials.padding_is_intact());

  std::vector<double> sums(c.classes * parts), sum_tolerances(c.classes * parts);
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
      CHECK(std::abs(got - wanted) <= std::abs(wanted) * rounding<T>() + terms * 3e-5 + 0x1p-25);
      sums[v * parts + n / kBiasTokens] += factors.at(0, n) * wanted;
      sum_tolerances[v * parts + n / kBiasTokens] += factors.at(0, n) * terms * 3e-5;
    }
  for (int64_t i = 0; i < c.classes * parts; ++i)
    CHECK(std::abs(partials.at(i / parts, i % parts) - sums[i]) <= sum_tolerances[i] + 1e-7);
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
  test_gradient<__nv_bfloat16>({130, 72, 700, 8, 0, true, true}, true, true, 0);
  // Four tokens: most tiles have no target, and a generous bound leaves some of them out.
  test_gradient<__half>({4, 72, 1500, 0, 1000}, true, false, 30);
  if (!thorough) return;
  test_gradient<__half>({77, 200, 389, 0, 1000}, false, false);
  test_gradient<__nv_bfloat16>({1, 8, 5}, false, false);
  test_gradient<__nv_bfloat16>({150, 64, 2300, 8, 128}, true, false, 40);
  test_gradient<__half>({20, 72, 600, 8, 128, false, true, false, true}, true, true, 0);
}

// ---- G^T W and G x ----

struct ProductCase {
  int64_t classes, tokens, features;
  int64_t padding = 0;  // between rows of everything
  bool marks = false;
  bool masks = false;  // rows of hidden states that must not be looked at
};

struct Product {
  bool of_weight;
  ProductOfGradient kind() const {
    return of_weight ? ProductOfGradient::kGradWeight : ProductOfGradient::kGradInput;
  }
  Status operator()(int64_t classes, int64_t tokens, const GradientOperands& operands,
                    const ProductOutput& output) const {
    return (of_weight ? family.kernels.grad_weight_product : family.kernels.grad_input_product)(
        {{0, classes, tokens}, operands, output}, nullptr);
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
  // Some tokens have a G of zero and hidden states of NaN.
  Matrix<float> factors(1, k, 0, kInput);
  Matrix<int32_t> mask_needed(1, 1, 0, kInput);
  mask_needed.at(0, 0) = c.masks ? 1 : 0;
  const auto masked = [&](int64_t i) { return c.masks && of_weight && (i % 5 == 1 || i + 1 == k); };
  for (int64_t i = 0; i < k; ++i) {
    factors.at(0, i) = masked(i) || !c.masks ? 0.f : 1.f;
    if (!masked(i)) continue;
    for (int64_t v = 0; v < c.classes; ++v) g.at(v, i) = T(0.f);
    for (int64_t d = 0; d < c.features; ++d) other.at(i, d) = T(NAN);
  }
  for (int64_t i = 0; i < tiles.rows; ++i)
    for (int64_t j = 0; j < token_tiles; ++j)
      // Also rows and columns of tiles none of which counts.
      tiles.at(i, j) = random() % 3 == 0 && i != 1 && j != 1;

  std::vector<double> wanted(rows * c.features), magnitude(rows * c.features);
  for (int64_t v = 0; v < c.classes; ++v)
    for (int64_t n = 0; n < c.tokens; ++n) {
      if ((c.marks && tiles.at(v / 128, n / 128) == 0) || masked(n)) continue;
      const int64_t row = of_weight ? v : n, i = of_weight ? n : v;
      for (int64_t d = 0; d < c.features; ++d) {
        const double term = to_double(g.at(v, n)) * to_double(other.at(i, d));
        wanted[row * c.features + d] += term;
        magnitude[row * c.features + d] += std::abs(term);
      }
    }

  const Product product{of_weight};
  const ListedWork work(product.kind(), c.classes, c.tokens, tiles.data, tiles.stride);
  GradientOperands operands{g.data, g.stride, other.data, other.stride, c.features, dtype_of<T>()};
  if (c.marks) operands.list = work.list;
  if (of_weight) operands.mask = {factors.data, mask_needed.data};
  const auto expect_rows = [&](auto&& value, const auto& factor_of_row, double rounding) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t d = 0; d < c.features; ++d) {
        const double factor = factor_of_row(row);
        const double w = wanted[row * c.features + d] * factor;
        const double tolerance =
            std::abs(w) * rounding + magnitude[row * c.features + d] * factor * 1e-6;
        CHECK(std::abs(value(row, d) - w) <= tolerance);
      }
  };
  const auto expect = [&](auto&& value, double factor, double rounding) {
    expect_rows(value, [&](int64_t) { return factor; }, rounding);
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

  // One scale for all rows, or each its own, as grad_input of fp16 has.
  const int64_t scale_stride = of_weight ? 0 : 1;
  Matrix<float> scale(1, of_weight ? 1 : rows, 0, kInput);
  for (int64_t row = 0; row < scale.columns; ++row) scale.at(0, row) = row % 3 == 0 ? 0.37f : 0.21f;
  const auto factor_of = [&](int64_t row) { return scale.at(0, row * scale_stride); };
  Matrix<T> gradient(rows, c.features, c.padding);
  output = {};
  output.gradient = gradient.data;
  output.gradient_stride = gradient.stride;
  output.scale = scale.data;
  output.scale_stride = scale_stride;
  output.overlaps_previous = true;  // of the one that adds to the sums: other memory, more blocks
  CHECK(product(c.classes, c.tokens, operands, output).ok());
  output.overlaps_previous = false;
  const auto value = [&](int64_t row, int64_t d) { return to_double(gradient.at(row, d)); };
  expect_rows(value, factor_of, rounding<T>());

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
    expect_rows(value, [&](int64_t row) { return 3 * factor_of(row); }, rounding<T>());
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
    if (of_weight) test_product<__nv_bfloat16>({300, 290, 328, 8, false, true}, of_weight);
    if (!thorough) continue;
    test_product<__half>({300, 290, 264}, of_weight);
    test_product<__half>({200, 77, 328}, of_weight);
    test_product<__nv_bfloat16>({5, 1, 8}, of_weight);
    test_product<__half>({520, 136, 264, 8, true}, of_weight);
    if (of_weight) test_product<__half>({300, 264, 72, 0, true, true}, of_weight);
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

}  // namespace

int main() {
  for_each_family([] {
    run_checked("linear_gradient", test_linear_gradient);
    run_checked("gradient products", test_products);
    test_few_tiles();
  });
  return emulator::finish("test_sm90_gradient_kernels");
}
