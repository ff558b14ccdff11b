// linear_gradient and the products that follow it, of sm_80, emulated, against double precision.
#include <algorithm>
#include <memory>

#include "core/math.h"
#include "cuda/sm80/kernels.h"
#include "kernels/linear_case.h"
#include "kernels/work_list.h"

using namespace memeff;
using namespace memeff::cuda;

namespace {

// One of the schedules sees everything, the others what is likely to depend on them.
bool thorough() { return emulator::config().schedule == emulator::Schedule::kInOrder; }

// ---- linear_gradient ----

struct TokenCoefficients {
  explicit TokenCoefficients(int64_t tokens)
      : shift("shift", tokens),
        softmax("softmax", tokens),
        entropy("entropy", tokens),
        centre("centre", tokens),
        target("target", tokens),
        target_rest("target_rest", tokens),
        weighted("weighted", tokens) {}
  GuardedArray<float> shift, softmax, entropy, centre, target, target_rest, weighted;
};

struct GradientOptions {
  bool entropy = false, weighted = false, target = true;
  int64_t padding = 0, offset = 0;  // of the gradient
};

template <class T>
void fill(TokenCoefficients& coefficients, LinearCase<T>& c) {
  for (int64_t n = 0; n < c.shape.tokens; ++n) {
    double top = -INFINITY, total = 0;
    for (int64_t v = 0; v < c.shape.classes; ++v) top = std::max(top, c.logit(n, v));
    for (int64_t v = 0; v < c.shape.classes; ++v) total += std::exp(c.logit(n, v) - top);
    const double lse = top + std::log(total), upstream = 0.5 + std::abs(c.normal());
    coefficients.shift[n] = static_cast<float>(lse);
    const double softmax = upstream * std::exp(coefficients.shift[n] - lse);
    coefficients.softmax[n] = static_cast<float>(softmax);
    const double target = c.target[n] < 0 ? 0 : -upstream;
    coefficients.target[n] = static_cast<float>(target);
    coefficients.target_rest[n] = static_cast<float>(softmax + target);
    coefficients.entropy[n] = 0.1f * c.normal();
    coefficients.centre[n] = c.normal();
    coefficients.weighted[n] = -0.01f * std::abs(c.normal());
  }
}

template <class T>
Coefficients pass(TokenCoefficients& coefficients, const GradientOptions& options) {
  Coefficients result;
  result.shift = coefficients.shift.data();
  result.softmax = coefficients.softmax.data();
  if (options.entropy) {
    result.entropy = coefficients.entropy.data();
    result.centre = coefficients.centre.data();
  }
  if (options.target) {
    result.target = coefficients.target.data();
    result.target_rest = coefficients.target_rest.data();
  }
  if (options.weighted) result.weighted = coefficients.weighted.data();
  return result;
}

// Written as the mathematics is, not as the kernel computes it.
template <class T>
double wanted_gradient(LinearCase<T>& c, TokenCoefficients& coefficients,
                       const GradientOptions& options, int64_t n, int64_t v, double* tolerance) {
  const double softmax = coefficients.softmax[n];
  const double entropy = options.entropy ? coefficients.entropy[n] : 0;
  const double weighted = options.weighted ? coefficients.weighted[n] : 0;
  const double target = options.target ? coefficients.target[n] : 0;
  *tolerance = 0;
  if (softmax == 0 && entropy == 0 && weighted == 0 && target == 0) return 0;
  const double z = c.logit(n, v), p = std::exp(z - coefficients.shift[n]);
  double dz = p * softmax + weighted * c.class_weight(v);
  const double centre = coefficients.centre[n];
  if (p > 0) dz += p * entropy * (z - centre);
  if (c.target_of(n) == v) dz += target;
  const double t = c.shape.softcap == 0 ? 0 : z / c.shape.softcap;
  const double wanted = dz * (1 - t * t);
  // Errors of z: of its sum in fp32, enlarged by exp and by the slope.
  const double size = p > 0 ? p * (std::abs(softmax) + std::abs(entropy * (z - centre))) : 0;
  const double error =
      std::isinf(z) ? 0 : 4e-6 * (1 + std::abs(z)) * (size + (t == 0 ? 0 : std::abs(dz)));
  *tolerance = error + std::abs(wanted) * (rounding<T>() + 1e-6) + kSmallestHalf;
  return wanted;
}

template <class T>
void check_gradient(LinearCase<T>& c, const GradientOptions& options) {
  TokenCoefficients coefficients(c.shape.tokens);
  fill(coefficients, c);
  // A token that takes no part, with a logit that is not a number; one whose loss is not a number.
  for (auto* values : {&coefficients.softmax, &coefficients.entropy, &coefficients.weighted,
                       &coefficients.target, &coefficients.target_rest})
    (*values)[c.shape.tokens / 2] = 0;
  GuardedMatrix<T> gradient("gradient", c.shape.classes, c.shape.tokens, options.padding,
                            options.offset, BufferAccess::kReadWrite);
  // The gradient of the bias, from gradients before they are rounded; fp16 has factors of tokens.
  constexpr bool kHasFactors = std::is_same_v<T, __half>;
  const int64_t parts = ceil_div(c.shape.tokens, kBiasTokens);
  GuardedMatrix<float> partials("partials", c.shape.classes, parts, 1, 0, BufferAccess::kReadWrite);
  GuardedArray<float> factors("factors", c.shape.tokens);
  for (int64_t n = 0; n < c.shape.tokens; ++n)
    factors[n] = kHasFactors ? static_cast<float>(1 << n % 3) : 1.f;
  const Status status = sm80::linear_gradient(
      {c.block(),
       c.operands(),
       c.terms(),
       c.targets(),
       pass<T>(coefficients, options),
       gradient.data(),
       gradient.stride,
       {},
       {partials.data(), partials.stride, kHasFactors ? factors.data() : nullptr}},
      nullptr);
  CHECK(status.ok());
  for (int64_t v = 0; v < c.shape.classes; ++v)
    for (int64_t part = 0; part < parts; ++part) {
      double sum = 0, sum_tolerance = 0;
      for (int64_t n = part * kBiasTokens; n < std::min(c.shape.tokens, (part + 1) * kBiasTokens);
           ++n) {
        double tolerance = 0;
        const double wanted = wanted_gradient(c, coefficients, options, n, v, &tolerance);
        const double found = to_double(gradient.at(v, n));
        CHECK(std::isnan(wanted) ? std::isnan(found) : std::abs(found - wanted) <= tolerance);
        sum += factors[n] * wanted;
        const double unrounded = tolerance - std::abs(wanted) * rounding<T>() - kSmallestHalf;
        sum_tolerance += factors[n] * std::max(0.0, unrounded);  // a token left out has none
      }
      const double found = partials.at(v, part);
      CHECK(std::isnan(sum) ? std::isnan(found) : std::abs(found - sum) <= sum_tolerance);
    }
  CHECK(gradient.padding_is_untouched() && partials.padding_is_untouched());
}

template <class T>
void test_gradient_shapes(unsigned seed) {
  const struct {
    LinearShape shape;
    GradientOptions options;
  } cases[] = {
      {{1, 8, 5}, {}},
      {{136, 72, 259, 40, 0, 0, true, true, 0.7, 9.0}, {true, true, true, 8}},
      {{131, 40, 129, 0, 8, 0, true}, {false, true, true, 0}},
      {{5, 33, 131, 1}, {true, false, true, 3}},                        // odd rows: unaligned
      {{129, 40, 128, 0, 3, 0, false, true}, {false, true, false, 7}},  // odd strides
      {{9, 64, 70, 7, 0, 1}, {false, false, true, 7, 8}},               // odd addresses
      {{9, 32, 70, 7}, {false, false, true, 7, 1}},
  };
  for (const auto& test : cases) {
    LinearCase<T> c(test.shape, seed++);
    if (test.shape.tokens > 4) c.x.at(test.shape.tokens / 2, 0) = T(NAN);
    if (test.shape.tokens > 4) c.x.at(1, 1) = T(NAN);
    if (test.shape.bias) c.bias[test.shape.first_class + 4] = -INFINITY;
    c.compute_logits();
    check_gradient(c, test.options);
  }
}

template <class T>
void test_gradient_targets() {
  for (const int64_t shift : {0, 61, 100}) {
    LinearCase<T> c({139, 8, 139, 1000}, 5);
    for (int64_t n = 0; n < 139; ++n) c.target[n] = 1000 + (n + shift) % 139;
    c.compute_logits();
    check_gradient(c, {});
  }
}

// A softmax close to 1: the digits of p - 1 come from target_rest, not from a difference.
void test_peaked_target() {
  LinearCase<__nv_bfloat16> c({16, 8, 128}, 1);
  for (int64_t n = 0; n < 16; ++n)
    for (int64_t k = 0; k < 8; ++k) c.x.at(n, k) = __nv_bfloat16(k == 0 ? 20.f : 0.f);
  for (int64_t v = 0; v < 128; ++v) c.w.at(v, 0) = __nv_bfloat16(v == 77 ? 1.f : 0.f);
  for (int64_t n = 0; n < 16; ++n) c.target[n] = 77;
  c.compute_logits();
  TokenCoefficients coefficients(16);
  fill(coefficients, c);
  GuardedMatrix<__nv_bfloat16> gradient("gradient", 128, 16, 0, 0, BufferAccess::kReadWrite);
  CHECK(sm80::linear_gradient({c.block(),
                               c.operands(),
                               c.terms(),
                               c.targets(),
                               pass<float>(coefficients, {}),
                               gradient.data(),
                               16,
                               {}},
                              nullptr)
            .ok());
  const double rest = 127 * std::exp(-20.0), miss = -rest / (1 + rest);  // p - 1
  for (int64_t n = 0; n < 16; ++n) {
    const double wanted = -coefficients.target[n] * miss;
    CHECK(std::abs(to_double(gradient.at(77, n)) / wanted - 1) < 0x1p-8);
  }
}

// ---- which tiles may be skipped ----

template <class T>
void test_marks() {
  LinearCase<T> c({300, 8, 300, 128, 0, 0, true}, 9);
  for (int64_t n = 0; n < 300; ++n) c.target[n] = n % 2 == 0 ? 128 + n % 100 : -1;
  for (int64_t n = 0; n < 300; ++n)
    for (int64_t k = 1; k < 8; ++k) c.x.at(n, k) = T(0.f);
  for (int64_t n = 0; n < 300; ++n) c.x.at(n, 0) = T(1.f + 0.01f * static_cast<float>(n));
  // Classes of tile 1 carry little mass, more for the last tokens; those of tile 2 none but for the
  // last token, which is the target's there.
  for (int64_t v = 0; v < 300; ++v) c.w.at(v, 0) = T(v < 128 ? 4.f : 0.1f);
  for (int64_t v = 0; v < 300; ++v) c.bias[128 + v] = v < 128 ? 0.f : v < 256 ? -2.f : -30.f;
  c.target[290] = 128 + 299;
  c.x.at(37, 0) = T(NAN);
  c.compute_logits();
  TokenCoefficients coefficients(300);
  fill(coefficients, c);
  // The token with mass everywhere takes no part, and neither does its mass.
  for (int64_t k = 0; k < 1; ++k) c.x.at(200, k) = T(-9.f);
  for (auto* values : {&coefficients.softmax, &coefficients.target, &coefficients.target_rest})
    (*values)[200] = 0;
  c.target[200] = -1;
  c.compute_logits();

  const double skip_mass = 0.02;
  const int64_t vocab = 428;
  GuardedMatrix<T> gradient("gradient", 300, 300, 4, 0, BufferAccess::kReadWrite);
  GuardedArray<uint8_t> tiles("tiles", 3 * 5, BufferAccess::kReadWrite);
  std::fill(tiles.begin(), tiles.end(), 99);
  CHECK(sm80::linear_gradient({c.block(),
                               c.operands(),
                               c.terms(),
                               c.targets(),
                               pass<T>(coefficients, {}),
                               gradient.data(),
                               gradient.stride,
                               {tiles.data(), 5, skip_mass, vocab}},
                              nullptr)
            .ok());
  int marked[2] = {};
  for (int64_t class_tile = 0; class_tile < 3; ++class_tile)
    for (int64_t token_tile = 0; token_tile < 3; ++token_tile) {
      const int64_t begin = class_tile * 128, end = std::min<int64_t>(300, begin + 128);
      const double limit = skip_mass * static_cast<double>(end - begin) / vocab;
      bool wanted = false, unsure = false;
      for (int64_t n = token_tile * 128; n < std::min<int64_t>(300, token_tile * 128 + 128); ++n) {
        if (coefficients.softmax[n] == 0) continue;
        double mass = 0;
        for (int64_t v = begin; v < end; ++v)
          mass += std::exp(c.logit(n, v) - coefficients.shift[n]);
        const bool has_target = c.target_of(n) >= begin && c.target_of(n) < end;
        wanted = wanted || has_target || std::isnan(mass) || mass >= limit;
        unsure = unsure || std::abs(mass / limit - 1) < 1e-4;
      }
      const uint8_t mark = tiles[class_tile * 5 + token_tile];
      CHECK(!unsure);
      CHECK(mark == (wanted ? 1 : 0));
      ++marked[wanted ? 1 : 0];
      CHECK(token_tile != 2 || tiles[class_tile * 5 + 3] == 99);
    }
  CHECK(marked[0] >= 2 && marked[1] >= 3);
  for (int64_t v = 0; v < 300; ++v) {  // the gradient itself is whole
    double tolerance = 0;
    const double wanted = wanted_gradient(c, coefficients, {}, 100, v, &tolerance);
    CHECK(std::abs(to_double(gradient.at(v, 100)) - wanted) <= tolerance);
  }
}

// ---- products ----

enum class Product { kGradInput, kGradWeight };

template <class T>
struct ProductCase {
  ProductCase(Product product, int64_t classes, int64_t tokens, int64_t features, int64_t padding,
              int64_t offset, unsigned seed)
      : product(product),
        classes(classes),
        tokens(tokens),
        features(features),
        rows(product == Product::kGradInput ? tokens : classes),
        depth(product == Product::kGradInput ? classes : tokens),
        gradient("G", classes, tokens, padding, offset, BufferAccess::kReadOnly),
        other("other", depth, features, padding, offset, BufferAccess::kReadOnly),
        tiles("tiles", tile_count(classes) * (tile_count(tokens) + 1)),
        factors("factors", depth),
        mask_needed("whether rows are masked", 1),
        random(seed) {
    std::normal_distribution<float> normal;
    for (int64_t v = 0; v < classes; ++v)
      for (int64_t n = 0; n < tokens; ++n) gradient.at(v, n) = T(normal(random));
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t d = 0; d < features; ++d) other.at(k, d) = T(normal(random));
    std::fill(tiles.begin(), tiles.end(), 1);
    std::fill(factors.begin(), factors.end(), 0.f);  // of no effect: the mask is not needed
  }
  static int64_t tile_count(int64_t size) { return (size + 127) / 128; }

  // Skipped tiles hold NaN, which shows when they are read.
  void skip_tile(int64_t class_tile, int64_t token_tile) {
    tiles[class_tile * (tile_count(tokens) + 1) + token_tile] = 0;
    for (int64_t v = class_tile * 128; v < std::min(classes, class_tile * 128 + 128); ++v)
      for (int64_t n = token_tile * 128; n < std::min(tokens, token_tile * 128 + 128); ++n)
        gradient.at(v, n) = T(NAN);
  }

  // Some tokens have no gradient and, for their hidden states, nothing but NaN.
  void mask_rows() {
    mask_needed[0] = 1;
    for (int64_t k = 0; k < depth; ++k) {
      factors[k] = k % 5 == 1 || k + 1 == depth ? 0.f : 1.f;
      if (factors[k] != 0) continue;
      for (int64_t v = 0; v < classes; ++v) gradient.at(v, k) = T(0.f);
      for (int64_t d = 0; d < features; ++d) other.at(k, d) = T(NAN);
    }
  }

  Status run(const ProductOutput& output, bool use_tiles) {
    GradientOperands operands;
    operands.gradient = gradient.data();
    operands.gradient_stride = gradient.stride;
    operands.other = other.data();
    operands.other_stride = other.stride;
    operands.features = features;
    operands.dtype = dtype_of<T>();
    if (product == Product::kGradWeight) operands.mask = {factors.data(), mask_needed.data()};
    std::unique_ptr<ListedWork> work;
    if (use_tiles) {
      work.reset(new ListedWork(product == Product::kGradInput ? ProductOfGradient::kGradInput
                                                               : ProductOfGradient::kGradWeight,
                                classes, tokens, tiles.data(), tile_count(tokens) + 1));
      operands.list = work->list;
    }
    return product == Product::kGradInput
               ? sm80::grad_input_product({{0, classes, tokens}, operands, output}, nullptr)
               : sm80::grad_weight_product({{0, classes, tokens}, operands, output}, nullptr);
  }

  // The sum and the sum of magnitudes.
  void compute() {
    sum.assign(static_cast<std::size_t>(rows * features), 0);
    size = sum;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t class_of = product == Product::kGradInput ? k : i;
        const int64_t token_of = product == Product::kGradInput ? i : k;
        if (tiles[class_of / 128 * (tile_count(tokens) + 1) + token_of / 128] == 0) continue;
        const double g = to_double(gradient.at(class_of, token_of));
        if (mask_needed[0] != 0 && factors[k] == 0) continue;
        for (int64_t d = 0; d < features; ++d) {
          const double term = g * to_double(other.at(k, d));
          sum[static_cast<std::size_t>(i * features + d)] += term;
          size[static_cast<std::size_t>(i * features + d)] += std::abs(term);
        }
      }
  }
  double wanted(int64_t i, int64_t d) const {
    return sum[static_cast<std::size_t>(i * features + d)];
  }
  double error(int64_t i, int64_t d) const {
    return 1e-6 * size[static_cast<std::size_t>(i * features + d)];
  }

  Product product;
  int64_t classes, tokens, features, rows, depth;
  GuardedMatrix<T> gradient, other;
  GuardedArray<uint8_t> tiles;
  GuardedArray<float> factors;
  GuardedArray<int32_t> mask_needed;
  std::mt19937 random;
  std::vector<double> sum, size;
};

template <class T>
void check_sums(ProductCase<T>& c, int64_t padding, int64_t offset, bool use_tiles) {
  GuardedMatrix<float> sums("sums", c.rows, c.features, padding, offset, BufferAccess::kReadWrite);
  ProductOutput output;
  output.sums = sums.data();
  output.sums_stride = sums.stride;
  for (int calls = 1; calls <= 2; ++calls) {
    CHECK(c.run(output, use_tiles).ok());
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t d = 0; d < c.features; ++d)
        CHECK(std::abs(sums.at(i, d) - calls * c.wanted(i, d)) <= calls * c.error(i, d));
    output.accumulate = true;
  }
  CHECK(sums.padding_is_untouched());
}

template <class T>
void check_rounded(ProductCase<T>& c, int64_t padding, int64_t offset, bool use_tiles = false) {
  GuardedMatrix<T> gradient("result", c.rows, c.features, padding, offset,
                            BufferAccess::kReadWrite);
  // One scale for all rows, or each its own, as grad_input of fp16 has.
  const int64_t scale_stride = c.product == Product::kGradInput ? 1 : 0;
  GuardedArray<float> scale("scale", scale_stride == 0 ? 1 : c.rows);
  for (int64_t i = 0; i < (scale_stride == 0 ? 1 : c.rows); ++i)
    scale[i] = i % 3 == 0 ? 0.37f : 0.21f;
  ProductOutput output;
  output.gradient = gradient.data();
  output.gradient_stride = gradient.stride;
  const auto check = [&](int64_t i, int64_t d, double wanted, double error) {
    CHECK(std::abs(to_double(gradient.at(i, d)) - wanted) <=
          error + std::abs(wanted) * rounding<T>());
  };
  CHECK(c.run(output, use_tiles).ok());  // no scale: 1
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t d = 0; d < c.features; ++d) check(i, d, c.wanted(i, d), c.error(i, d));
  output.scale = scale.data();
  output.scale_stride = scale_stride;
  CHECK(c.run(output, use_tiles).ok());
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t d = 0; d < c.features; ++d)
      check(i, d, static_cast<double>(scale[i * scale_stride]) * c.wanted(i, d), c.error(i, d));
  CHECK(gradient.padding_is_untouched());
}

// The same product added up three times: fp32 in two halves, then rounded once.
void check_split(ProductCase<__nv_bfloat16>& c, int64_t padding, int64_t offset,
                 bool use_tiles = false) {
  GuardedMatrix<__nv_bfloat16> gradient("result", c.rows, c.features, padding, offset,
                                        BufferAccess::kReadWrite);
  GuardedMatrix<__half> remainder("remainder", c.rows, c.features, padding, offset,
                                  BufferAccess::kReadWrite);  // as raw bits
  GuardedArray<float> scale("scale", 1);
  scale[0] = 0.37f;
  ProductOutput output;
  output.gradient = gradient.data();
  output.gradient_stride = gradient.stride;
  output.split.remainder = reinterpret_cast<uint16_t*>(remainder.data());
  output.split.remainder_stride = remainder.stride;
  output.scale = scale.data();  // of no effect before the last
  const WeightUpdate updates[] = {WeightUpdate::kSplitFirst, WeightUpdate::kSplitNext,
                                  WeightUpdate::kSplitLast};
  for (int call = 1; call <= 3; ++call) {
    output.update = updates[call - 1];
    CHECK(c.run(output, use_tiles).ok());
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t d = 0; d < c.features; ++d) {
        uint16_t halves[2];
        std::memcpy(&halves[0], &remainder.at(i, d), 2);
        std::memcpy(&halves[1], &gradient.at(i, d), 2);
        float sum;
        std::memcpy(&sum, halves, 4);
        const double wanted = call * c.wanted(i, d);
        if (call < 3)
          CHECK(std::abs(sum - wanted) <= call * c.error(i, d));
        else
          CHECK(std::abs(to_double(gradient.at(i, d)) - static_cast<double>(scale[0]) * wanted) <=
                3 * c.error(i, d) + std::abs(wanted) * 0.37 * 0x1.001p-8);
      }
  }
  CHECK(gradient.padding_is_untouched() && remainder.padding_is_untouched());
}

template <class T>
void test_products(unsigned seed) {
  const struct {
    int64_t classes, tokens, features, padding = 0, offset = 0;
  } shapes[] = {
      {5, 1, 8, 7},     // with padding of 7, rows of G are aligned
      {136, 264, 136},  // aligned, ragged
      {259, 40, 144, 8 - 40 % 8, 8},
      {131, 137, 33},        // nothing is aligned
      {40, 136, 264, 0, 1},  // odd addresses
      {300, 64, 8, 3},       // odd strides
      {70, 72, 75, 5},       // aligned operands of features that end in half a pair
  };
  for (const Product product : {Product::kGradInput, Product::kGradWeight})
    for (const auto& s : shapes) {
      if (!thorough() && s.classes * s.tokens < 128 * 40) continue;
      ProductCase<T> c(product, s.classes, s.tokens, s.features, s.padding, s.offset, seed++);
      c.compute();
      check_sums(c, s.padding, s.offset, false);
      if (!thorough()) continue;
      check_rounded(c, s.padding, s.offset);
      if constexpr (std::is_same_v<T, __nv_bfloat16>) check_split(c, s.padding, s.offset);
    }
}

// Also where rows are not aligned, and with tiles that are left out.
template <class T>
void test_masked_rows(unsigned seed) {
  for (const int64_t offset : {0, 1}) {
    ProductCase<T> c(Product::kGradWeight, 140, 264, 24, 0, offset, seed++);
    c.mask_rows();
    c.skip_tile(1, 1);
    c.compute();
    check_sums(c, 0, 0, true);
  }
}

template <class T>
void test_skipped_tiles(unsigned seed) {
  for (const Product product : {Product::kGradInput, Product::kGradWeight}) {
    // 0: none, 1: some, also at the ragged end, 2: all
    for (int amount = 0; amount < 3; ++amount) {
      ProductCase<T> c(product, 300, 264, 24, 0, 0, seed++);
      for (int64_t v = 0; v < 3; ++v)
        for (int64_t n = 0; n < 3; ++n)
          if (amount == 2 || (amount == 1 && (v * 3 + n * 2) % 4 < 2)) c.skip_tile(v, n);
      c.compute();
      const auto copies = emulator::counters().cp_async;
      check_sums(c, 0, 0, true);
      if (amount == 2) CHECK(emulator::counters().cp_async == copies);
      if (!thorough()) continue;
      // Rows without work stay as they are where the others add to what is there, else are written.
      check_rounded(c, 0, 0, true);
      if constexpr (std::is_same_v<T, __nv_bfloat16>) check_split(c, 0, 0, true);
    }
    if (!thorough()) continue;
    // Few of many k tiles.
    ProductCase<T> deep(product, product == Product::kGradInput ? 128 * 41 + 3 : 16,
                        product == Product::kGradInput ? 16 : 128 * 41 + 8, 8, 0, 0, seed++);
    for (int64_t tile = 0; tile < 42; ++tile)
      if (tile != 31 && tile != 33 && tile != 41)
        deep.skip_tile(product == Product::kGradInput ? tile : 0,
                       product == Product::kGradInput ? 0 : tile);
    deep.compute();
    check_sums(deep, 0, 0, true);
  }
}

void test_no_depth_and_errors() {
  ProductCase<__half> c(Product::kGradWeight, 16, 0, 16, 0, 0, 1);
  c.compute();
  check_sums(c, 0, 0, false);  // a sum over no tokens is zero
  const auto refused = [](const Status& status, const char* part) {
    CHECK(!status.ok() && std::strstr(status.message, part) != nullptr);
  };
  ProductOutput output;
  refused(c.run(output, false), "sums or gradient");
  ProductCase<__nv_bfloat16> b(Product::kGradWeight, 16, 16, 16, 0, 0, 1);
  output.gradient = b.other.data();
  output.update = WeightUpdate::kSplitFirst;
  refused(c.run(output, false), "bfloat16");
  refused(b.run(output, false), "remainder");
}

}  // namespace

int main() {
  for_clean_schedules("gradients", [] {
    test_gradient_shapes<__nv_bfloat16>(11);
    if (thorough()) test_gradient_shapes<__half>(31);
  });
  for_clean_schedules("marks", [] {
    test_marks<__nv_bfloat16>();
    if (thorough()) test_marks<__half>();
  });
  for_clean_schedules("products", [] {
    test_products<__nv_bfloat16>(51);
    if (thorough()) test_products<__half>(71);
  });
  for_clean_schedules("skipped tiles", [] {
    test_skipped_tiles<__nv_bfloat16>(91);
    test_masked_rows<__nv_bfloat16>(91);
    if (thorough()) test_skipped_tiles<__half>(111);
    test_masked_rows<__half>(111);
  });
  test_gradient_targets<__nv_bfloat16>();
  test_gradient_targets<__half>();
  test_peaked_target();
  test_no_depth_and_errors();
  CHECK(emulator::counters().ldmatrix_conflicts == 0);
  CHECK(emulator::reports().empty());
  return emulator::finish("test_sm80_gradient_kernels");
}
