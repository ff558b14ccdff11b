// The kernels that work on tokens, emulated, against the formulas of core/problem.h: every option,
// ragged numbers of tokens, many ranges of classes, and what only special values show.
#include <cmath>
#include <vector>

#include "kernels/token_experiment.h"

using namespace memeff;
using namespace memeff::cuda;
using namespace memeff::cuda::test;

namespace {

std::vector<Case> cases() {
  std::vector<Case> list;
  const auto add = [&](int64_t tokens, int64_t vocab, int64_t range, auto change) {
    Case c{tokens, vocab, range};
    change(c);
    list.push_back(c);
  };
  add(1, 1, 1, [](Case&) {});
  add(5, 40, 64, [](Case& c) { c.ignored = 2; });
  add(33, 67, 2, [](Case& c) { c.ignored = 5, c.class_weight = true, c.statistics = true; });
  add(70, 33, 1, [](Case& c) { c.reduction = Reduction::kSum, c.z_loss = 0.1, c.upstream = true; });
  add(98, 50, 3, [](Case& c) {
    c.reduction = Reduction::kNone, c.upstream = c.token_weight = true, c.smoothing = 0.2;
    c.logit_scale = 0.7, c.ignored = 7, c.z_loss = 0.01;
  });
  add(40, 90, 5, [](Case& c) {
    c.class_weight = c.token_weight = c.statistics = c.upstream = true;
    c.softcap = 20, c.smoothing = 0.1, c.z_loss = 0.05, c.ignored = 6, c.logit_scale = 0.8;
    c.num_items = 17;
  });
  add(35, 60, 7, [](Case& c) {
    c.class_weight = c.token_weight = c.statistics = true;
    c.smoothing = 1, c.z_loss = 0.05, c.ignored = 6;
  });
  add(34, 45, 4, [](Case& c) { c.probabilities = true; });
  add(37, 41, 2, [](Case& c) {
    c.probabilities = c.class_weight = c.token_weight = c.statistics = c.upstream = true;
    c.probabilities_dtype = DType::kBFloat16, c.smoothing = 0.1, c.z_loss = 0.05;
    c.logit_scale = 1.3;
  });
  add(36, 300, 17, [](Case& c) {
    c.probabilities = c.class_weight = c.upstream = true, c.reduction = Reduction::kNone;
    c.probabilities_dtype = DType::kFloat64;
  });
  return list;
}

template <class A>
void test_case(const Case& c, DType dtype) {
  Experiment<A> e(c, dtype);
  e.forward();
  e.check_forward();
  e.check_backward();
}

void test_every_case() {
  for (const Case& c : cases()) {
    test_case<float>(c, DType::kBFloat16);
    test_case<float>(c, DType::kFloat32);
    test_case<double>(c, DType::kFloat64);
  }
}

// Orders of execution, on the two cases that use everything there is.
void test_every_schedule() {
  emulator::for_every_schedule([&](const char* variant) {
    for (const Case& c : cases())
      if (c.class_weight && c.statistics && c.smoothing == 0.1)
        test_case<float>(c, DType::kFloat32);
    if (emulator::reports().empty()) return;
    ++emulator::failed_checks;
    std::printf("FAILED: reports under %s\n", variant);
    emulator::print_reports();
  });
}

// More tokens and classes than one step of the single-block kernels, and no tokens at all.
void test_sizes() {
  Case many{2500, 3, 2};
  many.class_weight = true, many.ignored = 3;
  test_case<float>(many, DType::kFloat32);
  Case wide{3, 2600, 64};
  wide.class_weight = true, wide.smoothing = 0.3;
  test_case<double>(wide, DType::kFloat64);

  Case none{0, 4, 4};
  Experiment<float> mean(none, DType::kBFloat16);
  mean.forward();
  CHECK(std::isnan(mean.loss[0]) && mean.scalars[0].output_scale == 0);
  none.reduction = Reduction::kSum;
  Experiment<float> sum(none, DType::kBFloat16);
  sum.forward();
  CHECK(restore_statistics(sum.problem, sum.tokens, 0, 0, nullptr).ok());
  CHECK(sum.loss[0] == 0);
}

void test_all_ignored() {
  Case c{6, 9, 4, 1};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    Experiment<float> e(c, dtype);
    e.forward();
    CHECK(std::isnan(e.loss[0]));
    CHECK(e.scalars[0].output_scale == (dtype == DType::kBFloat16 ? 0 : 1));
    for (int64_t n = 0; n < c.tokens; ++n) CHECK(e.softmax[n] == 0 && e.rest[n] == 0);
  }
  c.num_items = 5;
  Experiment<float> e(c, DType::kBFloat16);
  e.forward();
  CHECK(e.loss[0] == 0 && e.scalars[0].output_scale == 0);
}

// num_items is not checked here: the loss is what the division gives.
void test_num_items_of_any_sign() {
  Case c{3, 5, 2};
  c.num_items = -2;
  Experiment<float> negative(c, DType::kFloat32);
  negative.forward();
  CHECK(negative.loss[0] < 0 && negative.scalars[0].denominator == -2);
  Experiment<float> zero(c, DType::kFloat32);
  zero.num_items[0] = 0;
  zero.forward();
  CHECK(zero.loss[0] == kInf);
}

void test_nan_and_infinite_logits() {
  Case c{7, 12, 3};
  c.class_weight = c.statistics = true, c.reduction = Reduction::kNone;
  Experiment<float> e(c, DType::kFloat32);
  for (int64_t v = 0; v < c.vocab; ++v) {
    e.z(0, v) = v == 7 ? 1 : -kInf;            // all probability in one class
    e.z(1, v) = -kInf;                         // none anywhere
    if (v == 4) e.z(2, v) = e.z(3, v) = kNaN;  // visible, unless left out
    if (v == 5) e.z(4, v) = -kInf;             // the target, of weight 0
    if (v == 5) e.z(5, v) = -kInf;             // the target
  }
  for (int64_t n = 0; n < c.tokens; ++n) e.target[n] = n == 3 ? -100 : n == 0 ? 7 : n == 1 ? 2 : 5;
  e.weights[5] = e.class_weight[5] = 0;
  e.target[5] = 6, e.z(5, 5) = 0, e.z(5, 6) = -kInf, e.weights[6] = e.class_weight[6] = 1;
  e.forward();
  CHECK(e.token_lse[0] == 1 && e.loss[0] == 0 && e.argmax[0] == 7);
  CHECK(e.statistics[2 * c.tokens] == 0);
  CHECK(e.token_lse[1] == -kInf && std::isnan(e.loss[1]) && e.argmax[1] == 0);
  CHECK(std::isnan(e.token_lse[2]) && std::isnan(e.softmax[2]));
  CHECK(e.loss[2] == 0);  // weight 0 of the target: nothing of this row counts
  CHECK(std::isnan(e.token_lse[3]) && e.loss[3] == 0 && e.softmax[3] == 0 && e.rest[3] == 0);
  CHECK(e.loss[4] == 0 && std::isfinite(e.token_lse[4]));
  CHECK(e.loss[5] == kInf && std::isfinite(e.token_lse[5]));
  CHECK(std::isfinite(e.softmax[5]) && e.target_gradient[5] == e.rest[5] - e.softmax[5]);
}

// All weight on smoothing: 0 times the target's -inf is not NaN, the mean over classes is infinite.
void test_target_without_weight() {
  Case c{2, 6, 2};
  c.smoothing = 1, c.reduction = Reduction::kNone;
  Experiment<float> e(c, DType::kFloat32);
  e.z(0, e.target[0]) = -kInf;
  e.forward();
  CHECK(e.loss[0] == kInf && std::isfinite(e.loss[1]));
}

// Nobody can raise an error on a GPU: NaN, in this token alone.
void test_target_out_of_range() {
  for (const int64_t bad : {int64_t{12}, int64_t{-1}, int64_t{1} << 40}) {
    Case c{4, 12, 3};
    c.statistics = c.class_weight = true;
    Experiment<float> e(c, DType::kFloat32);
    e.target[2] = bad;
    e.forward();
    CHECK(e.token_target[2] == kBadTarget && std::isnan(e.loss[0]));
    for (int64_t n = 0; n < c.tokens; ++n) {
      CHECK(std::isnan(e.statistics[n]) == (n == 2));
      CHECK(std::isnan(e.statistics[c.tokens + n]) == (n == 2));
      for (auto* array : {&e.softmax, &e.coefficient, &e.rest})
        CHECK(std::isnan((*array)[n]) == (n == 2));
      CHECK(std::isfinite(e.token_lse[n]));
    }
  }
  // An ignore_index that is also a class leaves tokens out.
  Case c{4, 12, 3};
  Experiment<float> e(c, DType::kFloat32);
  e.problem.ignore_index = 3;
  e.target[1] = 3;
  e.forward();
  CHECK(e.token_target[1] == kNoTarget && e.softmax[1] == 0);
}

// Two ranks with 6 of 12 classes each: one of them knows the logit of a token's target. Where both know
// one, or neither, they have other targets, which nobody compares on GPUs: NaN on both.
void test_targets_of_ranks() {
  constexpr int64_t kTokens = 5, kClasses = 6, kRanks = 2;
  const int64_t targets[kRanks][kTokens] = {{1, 7, -100, 2, 8}, {1, 7, -100, 9, 3}};
  const double expected[kTokens] = {10, 11, 0, kNaN, kNaN};
  Case c{kTokens, kClasses, 3};
  Experiment<float> first(c, DType::kFloat32), second(c, DType::kFloat32);
  Experiment<float>* const ranks[kRanks] = {&first, &second};
  const RankNumbers places = rank_numbers(first.problem, false);
  const int64_t count = places.count * kTokens;
  Buffer<double> all(kRanks * count, "numbers of all ranks");
  for (int64_t rank = 0; rank < kRanks; ++rank) {
    Experiment<float>& e = *ranks[rank];
    e.tokens.vocab = kRanks * kClasses, e.tokens.first_class = rank * kClasses;
    e.tokens.shared = true;
    for (int64_t n = 0; n < kTokens; ++n) e.target[n] = targets[rank][n];
    CHECK(prepare_tokens(e.problem, e.tokens, nullptr).ok());
    for (int64_t n = 0; n < kTokens; ++n) {
      e.token_lse[n] = 20;
      if (e.token_target[n] >= 0) e.target_logit[n] = static_cast<float>(10 + n);
    }
    double* own = all.data() + rank * count;
    CHECK(say_tokens(e.problem, e.tokens, places, 0, kTokens, own, nullptr).ok());
  }
  for (Experiment<float>* e : ranks) {
    CHECK(merge_ranks(e->problem, e->tokens, places, 0, kTokens, all.data(), kRanks, nullptr).ok());
    for (int64_t n = 0; n < kTokens; ++n)
      compare(e->target_logit[n], expected[n], 1e-300, "target of two ranks", c);
  }
}

// Equal maxima: the first class, whichever warp found it.
void test_first_of_equal_maxima() {
  Case c{3, 100, 1};
  c.statistics = true;
  Experiment<float> e(c, DType::kFloat32);
  for (int64_t v : {99, 35, 18, 50}) e.z(0, v) = e.z(2, v) = 29;
  for (int64_t v : {99, 64, 32}) e.z(1, v) = 29;
  e.forward();
  CHECK(e.argmax[0] == 18 && e.argmax[1] == 32 && e.argmax[2] == 18);
}

// A softmax of 1 - 2e-9: the target's gradient keeps its digits, although 1 - p does not in float.
void test_confident_token() {
  Case c{1, 2, 1};
  Experiment<float> e(c, DType::kBFloat16);
  e.target[0] = 0;
  e.q[0] = 1, e.q[1] = 0;
  // 1 - p of a lse that float rounds, and of one that it does not
  for (const double logit : {20.0, 30.0 + std::ldexp(1.0, -18)}) {
    e.z(0, 0) = logit, e.z(0, 1) = logit - 20;
    e.forward();
    const double gradient = -1 / (1 + std::exp(20.0));
    const double away = e.z(0, 0) - static_cast<double>(e.shift[0]);
    compare(e.softmax[0] * std::expm1(away) + static_cast<double>(e.rest[0]), gradient,
            1e-6 * -gradient, "gradient of a confident token", c);
    compare(e.target_gradient[0], gradient, 1e-6 * -gradient, "its target gradient", c);
  }
  // Half of the probability: lse is log 2 more than the logit, which float rounds.
  e.z(0, 0) = e.z(0, 1) = 8;
  e.forward();
  CHECK(static_cast<double>(e.shift[0]) != e.token_lse[0]);
  const double p = e.softmax[0] * std::exp(8 - static_cast<double>(e.shift[0]));
  compare(p, 0.5, std::ldexp(1.0, -24), "probability despite the rounding of lse", c);
}

void test_bitwise_repeatable() {
  const Case c = cases()[5];
  Experiment<float> first(c, DType::kFloat32), second(c, DType::kFloat32);
  first.forward();
  emulator::config().schedule = emulator::Schedule::kRandom;
  second.forward();
  emulator::config().schedule = emulator::Schedule::kInOrder;
  CHECK(first.loss[0] == second.loss[0]);
  for (int64_t n = 0; n < c.tokens; ++n)
    CHECK(first.token_lse[n] == second.token_lse[n] && first.softmax[n] == second.softmax[n] &&
          first.entropy[n] == second.entropy[n] && first.smooth[n] == second.smooth[n]);
}

// Ten tiles of classes, the last one narrow, by three of tokens, the last one narrow.
void test_tiles() {
  constexpr double kSkipMass = 1e-3;
  Case c{300, 9 * kStoredTile + 37, kStoredTile};
  Experiment<float> e(c, DType::kBFloat16);
  constexpr int64_t begin = 40, columns = 3, ranges = 10, stride = 5;
  const int64_t count = c.tokens - begin;
  // Tokens are sure of a class in the first tile, where their targets are.
  for (int64_t n = 0; n < c.tokens; ++n) {
    for (int64_t v = 0; v < c.vocab; ++v)
      e.z(n, v) = static_cast<float>(e.z(n, v) / 8 + (v == n % 7 ? 25 : 0));
    e.target[n] = n % 7;
  }
  // A logit that adds the probability `p` next to the sure class.
  const auto plant = [&](int64_t column, int64_t v, double p) {
    e.z(begin + column, v) = e.z(begin + column, (begin + column) % 7) + std::log(p);
  };
  const double bound = kSkipMass * kStoredTile / static_cast<double>(c.vocab);
  e.target[begin + 5] = 3 * kStoredTile + 1;  // the one target in (3, 0)
  e.target[begin + 7] = -100;                 // left out, so its mass in (5, 0) is not missed
  plant(7, 5 * kStoredTile, 0.5);
  plant(130, 6 * kStoredTile + 2, 1.1 * bound);
  plant(131, 7 * kStoredTile + 2, 0.9 * bound);
  plant(259, c.vocab - 1, 1.1 * bound * 37 / kStoredTile);

  Buffer<uint8_t> tiles(ranges * stride, "tiles");
  const auto mark = [&](double skip_mass, const PartialStatistics& partials) {
    for (int64_t i = 0; i < ranges * stride; ++i) tiles[i] = 77;
    CHECK(mark_tiles(e.problem, e.tokens, begin, c.tokens, partials,
                     {tiles.data(), stride, skip_mass, e.problem.vocab}, nullptr)
              .ok());
    for (int64_t i = 0; i < ranges * stride; ++i)
      CHECK((tiles[i] == 77) == (i % stride >= columns));
  };
  CHECK(prepare_tokens(e.problem, e.tokens, nullptr).ok());
  e.merge(begin, c.tokens);
  Experiment<float>::Partials partials(e, begin, c.tokens);
  CHECK(partials.count == ranges && count == 2 * kTokenTile + 4);

  mark(kSkipMass, partials.pointers);
  for (int64_t r = 0; r < ranges; ++r)
    for (int64_t t = 0; t < columns; ++t) {
      const bool counts = r == 0 || (r == 3 && t == 0) || (r == 6 && t == 1) || (r == 9 && t == 2);
      CHECK(tiles[r * stride + t] == counts);
    }
  mark(0, partials.pointers);  // nothing is below nothing
  for (int64_t r = 0; r < ranges; ++r)
    for (int64_t t = 0; t < columns; ++t) CHECK(tiles[r * stride + t] == 1);

  // NaN in a tile, and a target out of range, whose NaN must reach every class.
  partials.sum[2 * partials.stride + 200] = static_cast<float>(kNaN);
  e.token_target[begin + 258] = kBadTarget;
  mark(kSkipMass, partials.pointers);
  for (int64_t r = 0; r < ranges; ++r) {
    CHECK(tiles[r * stride + 1] == (r == 0 || r == 2 || r == 6));
    CHECK(tiles[r * stride + 2] == 1);
  }

  e.problem.label_smoothing = 0.1;
  CHECK(!mark_tiles(e.problem, e.tokens, begin, c.tokens, partials.pointers,
                    {tiles.data(), stride, kSkipMass, e.problem.vocab}, nullptr)
             .ok());
}

// A caller's token statistics have no coefficients; statistics without partials are refused.
void test_statistics_alone() {
  Case c{5, 20, 4};
  c.statistics = true;
  Experiment<double> e(c, DType::kFloat64);
  e.tokens.for_statistics = true;
  e.forward();
  for (int64_t n = 0; n < c.tokens; ++n) {
    compare(e.token_lse[n], e.expected(n).lse, 1e-14, "lse alone", c);
    CHECK(std::isnan(e.softmax[n]) && std::isnan(e.target_gradient[n]));
  }
  Experiment<double>::Partials partials(e, 0, c.tokens);
  partials.pointers.argmax = nullptr;
  CHECK(!merge_statistics(e.problem, e.tokens, 0, c.tokens, partials.pointers, partials.count,
                          nullptr)
             .ok());
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_every_case();
  CHECK(emulator::reports().empty());
  emulator::print_reports();
  test_every_schedule();
  test_sizes();
  test_all_ignored();
  test_num_items_of_any_sign();
  test_nan_and_infinite_logits();
  test_target_without_weight();
  test_target_out_of_range();
  test_targets_of_ranks();
  test_first_of_equal_maxima();
  test_confident_token();
  test_bitwise_repeatable();
  test_tiles();
  test_statistics_alone();
  CHECK(emulator::reports().empty());
  emulator::print_reports();
  std::printf("largest error: %.2f of the tolerance\n", worst_error);
  return emulator::finish("test_token_kernels");
}
