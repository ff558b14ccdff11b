// Products straight from stored scores on sm_90a, emulated. The same bits as stored_gradient followed
// by the product of what it wrote; and double precision, in case both are wrong.
#include <algorithm>
#include <cstring>
#include <memory>

#include "cuda/generic_kernels.h"
#include "cuda/sm90/kernels.h"
#include "kernels/compact_gradient.h"
#include "kernels/linear_case.h"
#include "kernels/work_list.h"

using namespace memeff;
using namespace memeff::cuda;

namespace {

struct ScoreCase {
  int64_t classes, tokens, features;
  int64_t first_class = 0;
  int64_t padding = 0;  // between rows of everything in 16 bits
  bool marks = false;
  bool targets = true;
  bool nan_row = false;
};

template <class T>
struct Scores {
  explicit Scores(const ScoreCase& c, bool of_weight)
      : c(c),
        random(41),
        e("E", c.classes, c.tokens, (8 - c.tokens % 8) % 8 + c.padding, 0, BufferAccess::kReadOnly),
        gradient("G", c.classes, c.tokens, (8 - c.tokens % 8) % 8, 0, BufferAccess::kReadWrite),
        maxima("maxima", ceil_128(c.classes), c.tokens, 3, 0, BufferAccess::kReadOnly),
        other("W or x", of_weight ? c.tokens : c.classes, c.features, c.padding, 0,
              BufferAccess::kReadOnly),
        shift("shift", c.tokens),
        softmax("softmax", c.tokens),
        coefficient("target coefficient", c.tokens),
        entry("target_gradient", c.tokens),
        target("target", c.tokens),
        factors("factors", c.tokens),
        mask_needed("whether rows are masked", 1),
        tiles("tiles", ceil_128(c.classes) * tiles_stride()),
        product(of_weight ? ProductOfGradient::kGradWeight : ProductOfGradient::kGradInput) {
    for (int64_t v = 0; v < c.classes; ++v)
      for (int64_t n = 0; n < c.tokens; ++n)
        e.at(v, n) = random() % 8 == 0 ? __half(0.f) : __half(std::exp(-3 * std::abs(normal())));
    for (int64_t i = 0; i < maxima.rows; ++i)
      for (int64_t n = 0; n < c.tokens; ++n) maxima.at(i, n) = 2 * normal();
    for (int64_t i = 0; i < other.rows; ++i)
      for (int64_t d = 0; d < c.features; ++d) other.at(i, d) = T(normal());
    for (int64_t n = 0; n < c.tokens; ++n) {
      shift[n] = 3 + normal();
      softmax[n] = normal();
      coefficient[n] = normal();
      entry[n] = 4 * normal();
      target[n] = n % 7 == 3   ? -1
                  : n % 7 == 5 ? c.first_class - 1
                  : n % 7 == 6 ? c.first_class + c.classes
                               : c.first_class + static_cast<int64_t>(random() % c.classes);
    }
    target[0] = c.first_class + c.classes - 1;
    if (c.tokens > 9) {
      // A token whose softmax has no share in the gradient; one left out, with and without a target
      // in the block, whose logits may be anything.
      softmax[2] = 0;
      for (const int64_t n : {8, 9}) {
        softmax[n] = coefficient[n] = 0;
        shift[n] = NAN;
        maxima.at(0, n) = NAN;
        for (int64_t v = 0; v < c.classes; v += 3) e.at(v, n) = __half(NAN);
      }
      if (of_weight) {  // and their hidden states, too
        mask_needed[0] = 1;
        for (int64_t n = 0; n < c.tokens; ++n) factors[n] = n == 8 || n == 9 ? 0.f : 1.f;
        for (const int64_t n : {8, 9})
          for (int64_t d = 0; d < c.features; ++d) other.at(n, d) = T(NAN);
      }
      for (int64_t v = 0; v < std::min<int64_t>(128, c.classes); ++v) e.at(v, 1) = __half(0.f);
      maxima.at(0, 1) = -INFINITY;
      if (c.nan_row) {
        shift[4] = NAN;
        for (int64_t v = 0; v < c.classes; v += 2) e.at(v, 4) = __half(NAN);
      }
    }
    for (int64_t i = 0; i < maxima.rows; ++i)
      for (int64_t j = 0; j < tiles_stride(); ++j)
        // Also rows and columns of tiles none of which counts.
        tiles[i * tiles_stride() + j] = random() % 3 == 0 && i != 1 && j != 1;
    if (c.marks)
      work.reset(new ListedWork(product, c.classes, c.tokens, tiles.data(), tiles_stride()));
  }

  static int64_t ceil_128(int64_t n) { return (n + 127) / 128; }
  int64_t tiles_stride() const { return ceil_128(c.tokens) + 1; }
  float normal() { return std::normal_distribution<float>()(random); }

  Block block() const { return {c.first_class, c.classes, c.tokens}; }
  ScoreGradient terms() {
    ScoreGradient terms;
    terms.maxima = maxima.data();
    terms.maxima_stride = maxima.stride;
    if (c.targets) terms.targets.index = target.data();
    terms.coefficients.shift = shift.data();
    terms.coefficients.softmax = softmax.data();
    terms.coefficients.target = coefficient.data();
    terms.target_gradient = entry.data();
    return terms;
  }
  GradientOperands operands() {
    GradientOperands operands{e.data(),     e.stride,   other.data(),
                              other.stride, c.features, dtype_of<T>()};
    if (work != nullptr) operands.list = work->list;
    if (product == ProductOfGradient::kGradWeight)
      operands.mask = {factors.data(), mask_needed.data()};
    return operands;
  }
  // The same, of the gradient that stored_gradient makes.
  GradientOperands written_gradient() {
    for (int64_t v = 0; v < c.classes; ++v)
      std::memcpy(static_cast<void*>(&gradient.at(v, 0)), &e.at(v, 0),
                  static_cast<std::size_t>(c.tokens) * 2);
    const ScoreGradient t = terms();
    StoredScores scores{gradient.data(), gradient.stride, maxima.data(), maxima.stride};
    CHECK(stored_gradient({block(), scores, dtype_of<T>(), t.terms, t.targets, t.coefficients,
                           t.target_gradient},
                          nullptr)
              .ok());
    GradientOperands written = operands();
    written.gradient = gradient.data();
    written.gradient_stride = gradient.stride;
    return written;
  }
  // G in double precision, unrounded.
  double exact(int64_t v, int64_t n) {
    if (c.marks && tiles[v / 128 * tiles_stride() + n / 128] == 0) return 0;
    if (softmax[n] == 0 && coefficient[n] == 0) return 0;
    if (c.targets && target[n] == c.first_class + v && target[n] >= 0) return entry[n];
    return to_double(e.at(v, n)) * std::exp(double{maxima.at(v / 128, n)} - double{shift[n]}) *
           double{softmax[n]};
  }

  ScoreCase c;
  std::mt19937 random;
  GuardedMatrix<__half> e;
  GuardedMatrix<T> gradient;
  GuardedMatrix<float> maxima;
  GuardedMatrix<T> other;
  GuardedArray<float> shift, softmax, coefficient, entry;
  GuardedArray<int64_t> target;
  GuardedArray<float> factors;
  GuardedArray<int32_t> mask_needed;
  GuardedArray<uint8_t> tiles;
  const ProductOfGradient product;
  std::unique_ptr<ListedWork> work;
};

// All of a matrix, NaN equal to NaN.
template <class T>
bool same(GuardedMatrix<T>& a, GuardedMatrix<T>& b) {
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t column = 0; column < a.columns; ++column) {
      const double x = to_double(a.at(row, column)), y = to_double(b.at(row, column));
      if (x != y && !(std::isnan(x) && std::isnan(y))) return false;
    }
  return a.padding_is_untouched();
}

template <class T>
void test_product(const ScoreCase& c, bool of_weight) {
  Scores<T> scores(c, of_weight);
  const GradientOperands operands = scores.operands(), written = scores.written_gradient();
  const auto from_scores = of_weight ? sm90::grad_weight_from_scores : sm90::grad_input_from_scores;
  const auto from_gradient = of_weight ? sm90::grad_weight_product<1> : sm90::grad_input_product<1>;
  const int64_t rows = of_weight ? c.classes : c.tokens;
  const auto run_both = [&](const ProductOutput& ours, const ProductOutput& theirs) {
    CHECK(from_scores({scores.block(), operands, ours}, scores.terms(), nullptr).ok());
    CHECK(from_gradient({scores.block(), written, theirs}, nullptr).ok());
  };

  GuardedMatrix<float> sums("sums", rows, c.features, c.padding, 0, BufferAccess::kReadWrite);
  GuardedMatrix<float> wanted("wanted", rows, c.features, c.padding, 0, BufferAccess::kReadWrite);
  ProductOutput ours, theirs;
  ours.sums = sums.data();
  theirs.sums = wanted.data();
  ours.sums_stride = theirs.sums_stride = sums.stride;
  run_both(ours, theirs);
  CHECK(same(sums, wanted));
  if (!c.nan_row) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t d = 0; d < c.features; ++d) {
        double sum = 0, tolerance = 0;
        for (int64_t k = 0; k < scores.other.rows; ++k) {
          if (of_weight && scores.mask_needed[0] != 0 && scores.factors[k] == 0) continue;
          const double g = of_weight ? scores.exact(row, k) : scores.exact(k, row);
          const double factor = to_double(scores.other.at(k, d));
          sum += g * factor;
          tolerance += (std::abs(g) * (rounding<T>() + 1e-5) + kSmallestHalf) * std::abs(factor);
        }
        CHECK(std::abs(sums.at(row, d) - sum) <= tolerance);
      }
  }
  ours.accumulate = theirs.accumulate = true;
  run_both(ours, theirs);
  CHECK(same(sums, wanted));

  GuardedArray<float> scale("scale", 1);
  scale[0] = 0.37f;
  GuardedMatrix<T> rounded("rounded", rows, c.features, c.padding, 0, BufferAccess::kReadWrite);
  GuardedMatrix<T> other("wanted", rows, c.features, c.padding, 0, BufferAccess::kReadWrite);
  ours = theirs = {};
  ours.gradient = rounded.data();
  theirs.gradient = other.data();
  ours.gradient_stride = theirs.gradient_stride = rounded.stride;
  ours.scale = theirs.scale = scale.data();
  ours.overlaps_previous = theirs.overlaps_previous = true;  // the products that add to the sums
  run_both(ours, theirs);
  CHECK(same(rounded, other));
  ours.overlaps_previous = theirs.overlaps_previous = false;
  // Split sums, whose steps through the ring have no factors. Halves are those of bf16.
  CompactGradient<T> codes(rows, c.features, c.padding, 0),
      wanted_codes(rows, c.features, c.padding, 0);
  GuardedMatrix<__half> halves("remainder", rows, c.features, c.padding, 0,
                               BufferAccess::kReadWrite);  // as raw bits
  GuardedMatrix<__half> wanted_halves("remainder", rows, c.features, c.padding, 0,
                                      BufferAccess::kReadWrite);
  for (const bool compact : {true, false}) {
    if (!compact && dtype_of<T>() != DType::kBFloat16) continue;
    if (compact) {
      ours.gradient = codes.gradient.data(), theirs.gradient = wanted_codes.gradient.data();
      ours.split = codes.split(), theirs.split = wanted_codes.split();
    } else {
      ours.gradient = rounded.data(), theirs.gradient = other.data();
      ours.split = theirs.split = {};
      ours.split.remainder = reinterpret_cast<uint16_t*>(halves.data());
      theirs.split.remainder = reinterpret_cast<uint16_t*>(wanted_halves.data());
      ours.split.remainder_stride = theirs.split.remainder_stride = halves.stride;
    }
    for (const WeightUpdate update :
         {WeightUpdate::kSplitFirst, WeightUpdate::kSplitNext, WeightUpdate::kSplitLast}) {
      ours.update = theirs.update = update;
      run_both(ours, theirs);
    }
    CHECK(compact ? same(codes.gradient, wanted_codes.gradient) : same(rounded, other));
  }
}

void test_products(bool thorough) {
  for (const bool of_weight : {false, true}) {
    test_product<__nv_bfloat16>({300, 264, 72, 256, 8, true}, of_weight);
    test_product<__half>({260, 141, 264}, of_weight);
    if (!thorough) continue;
    test_product<__half>({520, 136, 72, 128, 8, true}, of_weight);
    test_product<__nv_bfloat16>({5, 1, 8}, of_weight);
    test_product<__nv_bfloat16>({140, 200, 16, 0, 0, false, false}, of_weight);
    test_product<__half>({129, 40, 16, 0, 0, false, true, true}, of_weight);
    // Many tiles of k.
    test_product<__half>(
        {of_weight ? 20 : 33 * 128 + 5, of_weight ? 33 * 128 + 5 : 20, 8, 0, 0, true}, of_weight);
  }
}

void test_refusals() {
  Scores<__half> scores({140, 20, 16}, false);
  GuardedMatrix<float> sums("sums", 20, 16, 0, 0, BufferAccess::kReadWrite);
  ProductOutput output;
  output.sums = sums.data();
  output.sums_stride = sums.stride;
  const auto accepted = [&](const Block& block, const GradientOperands& operands,
                            const ScoreGradient& terms) {
    return sm90::grad_input_from_scores({block, operands, output}, terms, nullptr).ok();
  };
  const Block block = scores.block();
  const GradientOperands operands = scores.operands();
  CHECK(accepted(block, operands, scores.terms()));
  CHECK(sm90::accepts(scores.terms()));
  for (int defect = 0; defect < 4; ++defect) {
    ScoreGradient bad = scores.terms();
    if (defect == 0) bad.terms.softcap = 3;
    if (defect == 1) bad.coefficients.entropy = bad.coefficients.softmax;
    if (defect == 2) bad.coefficients.weighted = bad.coefficients.softmax;
    if (defect == 3) bad.targets.probabilities = bad.coefficients.softmax;
    CHECK(!sm90::accepts(bad) && !accepted(block, operands, bad));
  }
  ScoreGradient bad = scores.terms();
  bad.maxima = nullptr;
  CHECK(!accepted(block, operands, bad));
  bad = scores.terms();
  bad.target_gradient = nullptr;
  CHECK(!accepted(block, operands, bad));
  CHECK(!accepted({64, block.classes, block.tokens}, operands, scores.terms()));
  GradientOperands narrow = operands;
  narrow.gradient_stride += 4;
  CHECK(!accepted(block, narrow, scores.terms()));
}

}  // namespace

int main() {
  for_clean_schedules("products from scores", [] {
    test_products(emulator::config().schedule == emulator::Schedule::kInOrder);
  });
  test_refusals();
  CHECK(emulator::reports().empty());
  return emulator::finish("test_sm90_stored_kernels");
}
