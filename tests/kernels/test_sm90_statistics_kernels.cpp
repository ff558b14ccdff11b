// linear_statistics of sm_90a, emulated, against double precision: both dtypes, ragged shapes, every
// output, equal maxima, without and with clusters; and the operands that the family refuses. Two
// blocks, or clusters, share the work, so that each computes several tiles and its ring of stages wraps.
#include "kernels/sm90_case.h"

using namespace memeff;
using namespace memeff::cuda;
using namespace memeff::cuda::sm90_test;

namespace {

constexpr int64_t kRange = kStoredTile;

template <class T>
void test_statistics(const Case& c) {
  Linear<T> linear(c);
  const int64_t ranges = (c.classes + kRange - 1) / kRange;
  Matrix<float> max(ranges, c.tokens, 5), sum(ranges, c.tokens, 3), entropy(ranges, c.tokens, 3),
      smooth(ranges, c.tokens, 3), hit(1, c.tokens);
  Matrix<int32_t> argmax(ranges, c.tokens, 3);
  Matrix<__half> kept(c.classes, c.tokens, (8 - c.tokens % 8) % 8 + c.padding,
                      BufferAccess::kReadWrite, RowEnd::kPiece);
  PartialStatistics partials;
  partials.max = max.data;
  partials.max_stride = max.stride;
  partials.stride = sum.stride;
  partials.sum = sum.data;
  if (c.full) {
    partials.entropy = entropy.data;
    partials.smooth = smooth.data;
    partials.argmax = argmax.data;
  }
  StoredScores scores;
  if (c.store) scores = {kept.data, kept.stride, max.data, max.stride};
  const Status status =
      family.kernels.linear_statistics({linear.block(), linear.operands(), linear.terms(),
                                        linear.targets(), partials, hit.data, scores},
                                       nullptr);
  CHECK(status.ok());
  CHECK(max.padding_is_intact() && sum.padding_is_intact() && kept.padding_is_intact());

  for (int64_t n = 0; n < c.tokens; ++n) {
    const auto& z = linear.z[n];
    const int64_t y = linear.target_of(n);
    const bool is_nan = c.infinities && n == c.tokens - 1;
    if (y < 0)
      CHECK(std::isnan(hit.at(0, n)));  // not touched
    else
      CHECK(is_nan ? std::isnan(hit.at(0, n))
                   : hit.at(0, n) == z[y] ||
                         std::abs(hit.at(0, n) - z[y]) < 1e-5 * (1 + std::abs(z[y])));
    for (int64_t range = 0; range < ranges; ++range) {
      if (is_nan) {
        CHECK(std::isnan(sum.at(range, n)));
        continue;
      }
      const int64_t begin = range * kRange, end = std::min(begin + kRange, c.classes);
      double top = -INFINITY, total = 0, wanted_entropy = 0, wanted_smooth = 0, magnitude = 0;
      for (int64_t v = begin; v < end; ++v) top = std::max(top, z[v]);
      if (top == -INFINITY) {
        CHECK(max.at(range, n) == -INFINITY && sum.at(range, n) == 0.f);
        if (c.full) CHECK(argmax.at(range, n) == c.first_class + begin);
        if (c.store) CHECK(to_double(kept.at(begin, n)) == 0.0);
        continue;
      }
      for (int64_t v = begin; v < end; ++v) {
        const double p = std::exp(z[v] - top);
        total += p;
        if (p > 0) wanted_entropy += p * (z[v] - top);
        const double term = (c.options ? linear.weight.at(0, c.first_class + v) : 1.0) * z[v];
        wanted_smooth += term;
        magnitude += std::abs(term);
      }
      const double tolerance = 1e-5 * (1 + std::abs(top));
      CHECK(std::abs(max.at(range, n) - top) < tolerance);
      CHECK(std::abs(sum.at(range, n) / total - 1) < tolerance);
      if (c.store) {
        for (int64_t v = begin; v < end; ++v) {
          const double wanted = std::exp(z[v] - max.at(range, n));
          CHECK(std::abs(to_double(kept.at(v, n)) - wanted) <
                wanted * (0x1p-11 + 2 * tolerance) + 0x1p-25);
        }
      }
      if (!c.full) continue;
      CHECK(std::abs(entropy.at(range, n) - wanted_entropy) < 4 * tolerance * total);
      CHECK(wanted_smooth < -std::numeric_limits<float>::max()
                ? smooth.at(range, n) == -INFINITY
                : std::abs(smooth.at(range, n) - wanted_smooth) < tolerance * (1 + magnitude));
      const int64_t best = argmax.at(range, n) - c.first_class;
      CHECK(best >= begin && best < end && z[best] > top - tolerance);
    }
  }
}

void test_linear_statistics(bool thorough) {
  test_statistics<__nv_bfloat16>({130, 72, 700, 8, 0, true, true});
  test_statistics<__half>({77, 200, 389, 0, 1000, false, false, true});
  if (!thorough) return;
  test_statistics<__nv_bfloat16>({1, 8, 5});
  test_statistics<__half>({300, 64, 1300, 8, 640, true, false});
  test_statistics<__nv_bfloat16>({129, 328, 512, 24, 0, true, true, true});
  test_statistics<__half>({20, 72, 600, 0, 128, false, true, false, true});
  test_statistics<__nv_bfloat16>({20, 72, 600, 0, 128, false, true, true, true});
  test_statistics<__nv_bfloat16>({40, 40, 530, 0, 0, false, true});
}

// The same bits whether scores are kept or not, and wherever a token stands among which others: all
// statistics of some tokens in one case, and of half of them, each elsewhere, in another.
void test_bits() {
  constexpr int64_t kTokens = 133, kFew = 60, kClasses = 390, kRanges = 4;
  Linear<__nv_bfloat16> linear({kTokens, 72, kClasses});
  const auto from = [](int64_t n) { return (n * 37 + 11) % kTokens; };
  Matrix<__nv_bfloat16> some(kFew, 72, 0, kInput);
  for (int64_t n = 0; n < kFew; ++n)
    for (int64_t k = 0; k < 72; ++k) some.at(n, k) = linear.x.at(from(n), k);
  struct Run {
    Matrix<float> max{kRanges, kTokens}, sum{kRanges, kTokens}, entropy{kRanges, kTokens},
        smooth{kRanges, kTokens};
    Matrix<int32_t> argmax{kRanges, kTokens};
    Matrix<__half> kept{kClasses, 136};
  };
  const auto run = [&](Run& out, const Matrix<__nv_bfloat16>& x, bool store) {
    LinearOperands operands = linear.operands();
    operands.input = x.data;
    Block block = linear.block();
    block.tokens = x.rows;
    PartialStatistics partials{out.max.data,     kTokens,         kTokens,        out.sum.data,
                               out.entropy.data, out.smooth.data, out.argmax.data};
    StoredScores scores;
    if (store) scores = {out.kept.data, 136, out.max.data, kTokens};
    CHECK(family.kernels
              .linear_statistics({block, operands, {}, {}, partials, nullptr, scores}, nullptr)
              .ok());
  };
  Run all, kept, few;
  run(all, linear.x, false), run(kept, linear.x, true), run(few, some, false);
  const auto same = [&](Run& one, int64_t i, Run& other, int64_t j) {
    for (int64_t range = 0; range < kRanges; ++range) {
      CHECK(one.max.at(range, i) == other.max.at(range, j));
      CHECK(one.sum.at(range, i) == other.sum.at(range, j));
      CHECK(one.entropy.at(range, i) == other.entropy.at(range, j));
      CHECK(one.smooth.at(range, i) == other.smooth.at(range, j));
      CHECK(one.argmax.at(range, i) == other.argmax.at(range, j));
    }
  };
  for (int64_t n = 0; n < kTokens; ++n) same(all, n, kept, n);
  for (int64_t n = 0; n < kFew; ++n) same(few, n, all, from(n));
}

// Equal logits: the first class is the largest, in every half, quad and register.
void test_argmax_of_equals() {
  constexpr int64_t kClasses = 384, kRanges = kClasses / kRange;
  Case c{9, 64, kClasses};
  Linear<__nv_bfloat16> linear(c);
  Matrix<__nv_bfloat16> w(kClasses, c.features, 0, kInput);
  Matrix<float> max(kRanges, c.tokens), sum(kRanges, c.tokens);
  Matrix<int32_t> argmax(kRanges, c.tokens);
  for (const int64_t first : {0, 1, 2, 9, 130, 255, 257, 383}) {
    for (int64_t v = 0; v < kClasses; ++v)
      for (int64_t k = 0; k < c.features; ++k)
        w.at(v, k) = k == 0 && v < first ? __nv_bfloat16(-1.f) : __nv_bfloat16(0.f);
    for (int64_t n = 0; n < c.tokens; ++n) linear.x.at(n, 0) = __nv_bfloat16(1.f);
    LinearOperands operands = linear.operands();
    operands.weight = w.data;
    operands.weight_stride = w.stride;
    PartialStatistics partials;
    partials.max = max.data;
    partials.sum = sum.data;
    partials.argmax = argmax.data;
    partials.max_stride = partials.stride = c.tokens;
    CHECK(family.kernels
              .linear_statistics({linear.block(), operands, {}, {}, partials, nullptr, {}}, nullptr)
              .ok());
    for (int64_t n = 0; n < c.tokens; ++n)
      for (int64_t range = 0; range < kRanges; ++range)
        CHECK(argmax.at(range, n) == std::max(range * kRange, range == first / kRange ? first : 0));
  }
}

void test_refusals() {
  Linear<__half> linear({8, 64, 16});
  Matrix<float> max(1, 8), sum(1, 8);
  PartialStatistics partials;
  partials.max = max.data;
  partials.sum = sum.data;
  partials.max_stride = partials.stride = 8;
  const auto accepted = [&](const LinearOperands& operands, const Targets& targets) {
    return family.kernels
        .linear_statistics({linear.block(), operands, {}, targets, partials, nullptr, {}}, nullptr)
        .ok();
  };
  const LinearOperands good = linear.operands();
  CHECK(sm90::accepts(good, nullptr, 0) && accepted(good, {}));
  Targets probabilities;
  probabilities.probabilities = max.data;
  CHECK(!accepted(good, probabilities));
  for (int defect = 0; defect < 4; ++defect) {
    LinearOperands bad = good;
    if (defect == 0) bad.input_stride += 4;
    if (defect == 1) bad.weight_stride += 4;
    if (defect == 2) bad.input = static_cast<const char*>(bad.input) + 8;
    if (defect == 3) bad.dtype = DType::kFloat32;
    CHECK(!sm90::accepts(bad, nullptr, 0) && !accepted(bad, {}));
  }
  CHECK(!sm90::accepts(good, max.data, 12));
}

}  // namespace

int main() {
  for_each_family([] {
    run_checked("linear_statistics", test_linear_statistics);
    test_bits();
    test_argmax_of_equals();
    test_refusals();
  });
  return emulator::finish("test_sm90_statistics_kernels");
}
