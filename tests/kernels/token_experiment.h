// A problem's tokens for tests of csrc/cuda/tokens.h: inputs, arrays of tokens, partial statistics
// as other kernels would leave them, and what must come out, by the formulas of core/problem.h.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/tokens.h"
#include "emulator/check.h"

namespace memeff::cuda::test {

using emulator::BufferAccess;
using emulator::GlobalBuffer;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// An array that kernels may touch, of outputs NaN (or a number nobody expects) at first.
template <class T>
class Buffer {
 public:
  Buffer(int64_t count, const char* name, BufferAccess access = BufferAccess::kReadWrite)
      : values_(static_cast<std::size_t>(count), poison()),
        guard_(values_.data(), values_.size() * sizeof(T), name, access,
               sizeof(T) < 8 ? sizeof(T) : 8) {}
  T* data() { return values_.data(); }
  T* data_if(bool wanted) { return wanted ? values_.data() : nullptr; }
  T& operator[](int64_t i) { return values_[static_cast<std::size_t>(i)]; }

 private:
  static T poison() {
    if constexpr (std::is_floating_point_v<T>) return std::numeric_limits<T>::quiet_NaN();
    if constexpr (std::is_integral_v<T>) return T(77);
    return T{};
  }
  std::vector<T> values_;
  GlobalBuffer guard_;
};

struct Case {
  int64_t tokens, vocab, range;  // range: classes per partial statistic
  int ignored = 0;               // every so-manieth token; 0: none, 1: all
  Reduction reduction = Reduction::kMean;
  double smoothing = 0, z_loss = 0, softcap = 0, logit_scale = 1, num_items = 0;
  bool class_weight = false, token_weight = false, statistics = false, upstream = false;
  bool probabilities = false;
  DType probabilities_dtype = DType::kFloat32;
};

inline double worst_error = 0;  // relative to the tolerance, of everything compared so far

inline void compare(double got, double expected, double tolerance, const char* what,
                    const Case& c) {
  if (std::isnan(expected) ? std::isnan(got) : got == expected) return;
  const double error = std::abs(got - expected) / tolerance;
  if (error > worst_error) worst_error = error;
  if (error <= 1) return;
  ++emulator::failed_checks;
  std::printf("FAILED %s: %.17g instead of %.17g (%lld tokens, %lld classes)\n", what, got,
              expected, static_cast<long long>(c.tokens), static_cast<long long>(c.vocab));
}

// What the kernels must find about one token, from its row of logits.
struct Expected {
  double lse = 0, max = -kInf, entropy = 0, spread = 0;  // spread: sum p (max - z)
  double logit = 0, loss = 0, z_term = 0;
  double target_mass = 0, dot = 0, smooth = 0, smooth_size = 0;  // size: of the absolute terms
  int64_t argmax = 0;
  std::vector<double> gradient, gradient_size;  // with respect to z, times logit_scale; its terms
};

// Data of a problem, with the arrays of all tokens. A: float, or double for double inputs.
template <class A>
struct Experiment {
  Case c;
  Problem problem;
  std::vector<double> logits;  // [tokens, vocab], values of A
  std::vector<double> weights, q;
  Buffer<int64_t> target, token_target, token_argmax, argmax;
  Buffer<double> class_weight, token_weight, num_items, grad_loss, lse;
  Buffer<unsigned char> probabilities;
  Buffer<A> loss, statistics, target_logit, shift, softmax, coefficient, rest, weighted;
  Buffer<double> token_lse, dot, mass, plain, smooth, entropy, maximum;
  Buffer<float> target_gradient;
  Buffer<CallScalars> scalars;
  TokenArrays tokens;
  std::mt19937 random{17};

  static constexpr auto kInput = BufferAccess::kReadOnly;
  Experiment(const Case& shape, DType dtype)
      : c(shape),
        logits(shape.tokens * shape.vocab),
        weights(shape.vocab, 1.0),
        q(shape.tokens * shape.vocab),
        target(c.tokens, "target", kInput),
        token_target(c.tokens, "token targets"),
        token_argmax(c.tokens, "token argmax"),
        argmax(c.tokens, "argmax"),
        class_weight(c.vocab, "class_weight", kInput),
        token_weight(c.tokens, "token_weight", kInput),
        num_items(1, "num_items", kInput),
        grad_loss(c.reduction == Reduction::kNone ? c.tokens : 1, "grad_loss", kInput),
        lse(c.tokens, "lse"),
        probabilities(c.tokens * c.vocab * size_of(c.probabilities_dtype), "probabilities", kInput),
        loss(c.reduction == Reduction::kNone ? c.tokens : 1, "loss"),
        statistics(4 * c.tokens, "statistics"),
        target_logit(c.tokens, "target logit"),
        shift(c.tokens, "shift"),
        softmax(c.tokens, "softmax"),
        coefficient(c.tokens, "target coefficient"),
        rest(c.tokens, "target rest"),
        weighted(c.tokens, "weighted"),
        token_lse(c.tokens, "token lse"),
        dot(c.tokens, "target dot"),
        mass(c.tokens, "target mass"),
        plain(c.tokens, "target plain"),
        smooth(c.tokens, "smooth"),
        entropy(c.tokens, "entropy"),
        maximum(c.tokens, "maximum"),
        target_gradient(c.tokens, "target gradient"),
        scalars(1, "scalars") {
    fill();
    describe(dtype);
    tokens.vocab = c.vocab;
    tokens.scalars = scalars.data();
    tokens.target = token_target.data();
    tokens.lse = token_lse.data();
    tokens.target_logit = target_logit.data_if(!c.probabilities);
    tokens.target_dot = dot.data_if(c.probabilities);
    tokens.target_mass = mass.data();
    tokens.target_plain = plain.data_if(c.probabilities);
    tokens.smooth = smooth.data_if(c.smoothing > 0);
    tokens.entropy = entropy.data_if(c.statistics);
    tokens.maximum = maximum.data_if(c.statistics);
    tokens.argmax = token_argmax.data_if(c.statistics);
    tokens.shift = shift.data();
    tokens.softmax = softmax.data();
    tokens.target_coefficient = coefficient.data();
    tokens.target_rest = rest.data_if(!c.probabilities);
    tokens.weighted = weighted.data_if(c.smoothing > 0);
    tokens.target_gradient = target_gradient.data_if(!c.probabilities);
  }

  double& z(int64_t n, int64_t v) { return logits[n * c.vocab + v]; }
  bool ignored(int64_t n) { return !c.probabilities && target[n] == problem.ignore_index; }

  // Weights and probabilities are multiples of 1/16, exact in every type.
  void fill() {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.5, 1.5);
    const double most = c.softcap > 0 ? c.softcap : 30;
    for (double& value : logits)
      value = static_cast<A>(std::max(-0.99 * most, std::min(0.99 * most, 4 * normal(random))));
    for (int64_t v = 0; v < c.vocab; ++v) {
      class_weight[v] = static_cast<double>(random() % 32) / 16;
      if (c.class_weight) weights[v] = class_weight[v];
    }
    for (int64_t n = 0; n < c.tokens; ++n) {
      const bool left_out = c.ignored > 0 && n % c.ignored == 0;
      target[n] = left_out ? -100 : static_cast<int64_t>(random() % c.vocab);
      token_weight[n] = uniform(random);
      for (int64_t v = 0; v < c.vocab; ++v) set_probability(n, v);
    }
    num_items[0] = c.num_items;
    for (int64_t i = 0; i < (c.reduction == Reduction::kNone ? c.tokens : 1); ++i)
      grad_loss[i] = normal(random);
  }

  // Class-major, so that both strides are used.
  void set_probability(int64_t n, int64_t v) {
    const double value = static_cast<double>(random() % 16) / 16;
    if (c.probabilities)
      q[n * c.vocab + v] = value;
    else
      q[n * c.vocab + v] = target[n] == v ? 1 : 0;
    void* all = probabilities.data();
    const int64_t at = v * c.tokens + n;
    switch (c.probabilities_dtype) {
      case DType::kBFloat16:
        static_cast<__nv_bfloat16*>(all)[at] = __float2bfloat16(static_cast<float>(value));
        break;
      case DType::kFloat32: static_cast<float*>(all)[at] = static_cast<float>(value); break;
      default: static_cast<double*>(all)[at] = value;
    }
  }

  void describe(DType dtype) {
    Problem& p = problem;
    p.tokens = c.tokens, p.features = 1, p.vocab = c.vocab, p.dtype = dtype;
    if (c.probabilities) {
      p.probabilities = probabilities.data();
      p.probabilities_dtype = c.probabilities_dtype;
      p.probabilities_token_stride = 1, p.probabilities_class_stride = c.tokens;
    } else {
      p.target = target.data();
    }
    p.class_weight = class_weight.data_if(c.class_weight);
    p.token_weight = token_weight.data_if(c.token_weight);
    p.num_items = num_items.data_if(c.num_items != 0);
    p.grad_loss = grad_loss.data_if(c.upstream);
    p.reduction = c.reduction, p.label_smoothing = c.smoothing, p.softcap = c.softcap;
    p.logit_scale = c.logit_scale, p.z_loss = c.z_loss, p.statistics = c.statistics;
    p.loss = loss.data(), p.lse = lse.data();
    p.statistics_out = statistics.data_if(c.statistics);
    p.argmax = argmax.data_if(c.statistics);
  }

  // Partial statistics of tokens [begin, end), as other kernels would leave them, and target_logit.
  // Between the rows lies NaN.
  struct Partials {
    int64_t count, max_stride, stride;
    Buffer<A> max, sum, entropy, smooth, dot, mass, plain;
    Buffer<int32_t> argmax;
    PartialStatistics pointers;

    Partials(Experiment& e, int64_t begin, int64_t end)
        : count((e.c.vocab + e.c.range - 1) / e.c.range),
          max_stride(end - begin + 5),
          stride(end - begin + 3),
          max(count * max_stride, "partial max", kInput),
          sum(count * stride, "partial sum", kInput),
          entropy(count * stride, "partial entropy", kInput),
          smooth(count * stride, "partial smooth", kInput),
          dot(count * stride, "partial dot", kInput),
          mass(count * stride, "partial mass", kInput),
          plain(count * stride, "partial plain", kInput),
          argmax(count * stride, "partial argmax", kInput) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t n = begin; n < end; ++n) fill(e, r, n, r * stride + n - begin, n - begin);
      const bool soft = e.c.probabilities;
      pointers.max = max.data(), pointers.max_stride = max_stride, pointers.stride = stride;
      pointers.sum = sum.data();
      pointers.entropy = entropy.data_if(e.c.statistics);
      pointers.argmax = argmax.data_if(e.c.statistics);
      pointers.smooth = smooth.data_if(e.c.smoothing > 0);
      pointers.target_dot = dot.data_if(soft), pointers.target_mass = mass.data_if(soft);
      pointers.target_plain = plain.data_if(soft);
    }

    void fill(Experiment& e, int64_t r, int64_t n, int64_t at, int64_t column) {
      const int64_t first = r * e.c.range, last = std::min(first + e.c.range, e.c.vocab);
      double m = -kInf, s = 0, h = 0, w = 0, d = 0, all = 0, p = 0;
      for (int64_t v = first; v < last; ++v)
        if (e.z(n, v) > m) m = e.z(n, v), argmax[at] = static_cast<int32_t>(v);
      for (int64_t v = first; v < last; ++v) {
        const double z = e.z(n, v), q = e.q[n * e.c.vocab + v], weight = e.weights[v];
        if (z != -kInf) s += std::exp(z - m), h += std::exp(z - m) * (z - m);
        if (weight != 0) w += weight * z;
        if (q != 0) d += weight * q * z, p += q * z;
        all += weight * q;
      }
      max[r * max_stride + column] = static_cast<A>(m), sum[at] = static_cast<A>(s);
      entropy[at] = static_cast<A>(h), smooth[at] = static_cast<A>(w), dot[at] = static_cast<A>(d);
      mass[at] = static_cast<A>(all), plain[at] = static_cast<A>(p);
    }
  };

  void merge(int64_t begin, int64_t end) {
    Partials partials(*this, begin, end);
    if (!c.probabilities)
      for (int64_t n = begin; n < end; ++n)
        if (token_target[n] >= 0) target_logit[n] = static_cast<A>(z(n, token_target[n]));
    CHECK(merge_statistics(problem, tokens, begin, end, partials.pointers, partials.count, nullptr)
              .ok());
  }

  void forward() {
    CHECK(prepare_tokens(problem, tokens, nullptr).ok());
    const int64_t middle = c.tokens / 3;
    merge(0, middle), merge(middle, c.tokens);
    CHECK(write_loss(problem, tokens, nullptr).ok());
  }

  double denominator(bool of_z) {
    if (c.reduction != Reduction::kMean) return 1;
    if (c.num_items != 0) return c.num_items;
    double total = 0;
    for (int64_t n = 0; n < c.tokens; ++n)
      if (!ignored(n)) total += of_z || c.probabilities ? 1 : weights[target[n]];
    return total;
  }

  Expected expected(int64_t n) {
    Expected e;
    double sum = 0;
    for (int64_t v = 0; v < c.vocab; ++v)
      if (z(n, v) > e.max) e.max = z(n, v), e.argmax = v;
    for (int64_t v = 0; v < c.vocab; ++v) sum += std::exp(z(n, v) - e.max);
    e.lse = e.max + std::log(sum);
    e.gradient.assign(c.vocab, 0), e.gradient_size.assign(c.vocab, 0);
    double total_mass = 0;
    std::vector<double> masses(c.vocab);
    for (int64_t v = 0; v < c.vocab; ++v) {
      const double p = std::exp(z(n, v) - e.lse), each = q[n * c.vocab + v];
      e.entropy += p * (e.lse - z(n, v)), e.spread += p * (e.max - z(n, v));
      e.smooth += weights[v] * z(n, v), e.smooth_size += std::abs(weights[v] * z(n, v));
      if (ignored(n)) continue;
      e.logit += each * z(n, v);
      e.dot += weights[v] * each * z(n, v), e.target_mass += weights[v] * each;
      masses[v] = weights[v] * ((1 - c.smoothing) * each + c.smoothing / c.vocab);
      total_mass += masses[v];
      e.loss += masses[v] * (e.lse - z(n, v));
    }
    if (ignored(n)) return e;
    const double token = c.token_weight ? token_weight[n] : 1;
    e.loss *= token, e.z_term = token * c.z_loss * e.lse * e.lse;
    const double g = (c.upstream ? grad_loss[c.reduction == Reduction::kNone ? n : 0] : 1) * token *
                     c.logit_scale;
    for (int64_t v = 0; v < c.vocab; ++v) {
      const double p = std::exp(z(n, v) - e.lse), share = 2 * c.z_loss * e.lse * p;
      const double part = g / denominator(false), z_part = g / denominator(true);
      e.gradient[v] = part * (total_mass * p - masses[v]) + z_part * share;
      e.gradient_size[v] = std::abs(part) * (total_mass * p + masses[v]) + std::abs(z_part * share);
    }
    return e;
  }

  double roundoff() { return std::numeric_limits<A>::epsilon() / 2; }

  // The gradient as kernels compute it from the coefficients.
  void check_coefficients(int64_t n, const Expected& e) {
    const bool zero = ignored(n);
    if (zero) {
      CHECK(softmax[n] == 0);
      CHECK(coefficient[n] == 0 && (c.probabilities || rest[n] == 0));
      CHECK(c.smoothing == 0 || weighted[n] == 0);
      return;
    }
    for (int64_t v = 0; v < c.vocab; ++v) {
      const double away = z(n, v) - static_cast<double>(shift[n]);
      double got = softmax[n] * std::exp(away);
      if (c.probabilities)
        got += coefficient[n] * weights[v] * q[n * c.vocab + v];
      else if (v == target[n])
        got = std::exp(away) < 0.5 ? got + coefficient[n]
                                   : softmax[n] * std::expm1(away) + static_cast<double>(rest[n]);
      if (c.smoothing > 0) got += weighted[n] * weights[v];
      // The error of p: of the sums and exponentials that made lse, and of lse itself, in fp64.
      const double fp64 = std::ldexp(1.0, -53) * (std::abs(e.lse) + std::abs(z(n, v)));
      compare(got * scalars[0].output_scale, e.gradient[v],
              (16 * roundoff() + 4 * fp64) * e.gradient_size[v], "gradient", c);
    }
  }

  void check_forward() {
    const double u = roundoff();
    double total = 0, z_total = 0, size = 0;
    for (int64_t n = 0; n < c.tokens; ++n) {
      const Expected e = expected(n);
      const double lse_error = 8 * u + 4e-16 * std::abs(e.lse);
      const bool skipped = ignored(n) && !c.statistics;
      compare(token_lse[n], e.lse, lse_error, "lse", c);
      compare(lse[n], skipped ? 0 : e.lse, lse_error, "lse of the problem", c);
      if (c.smoothing > 0) compare(smooth[n], e.smooth, 2 * u * e.smooth_size, "smooth", c);
      check_coefficients(n, e);
      const double y_slope = [&] {
        const double t = c.softcap > 0 ? e.logit / c.softcap : 0;
        return 1 - t * t;
      }();
      if (!c.probabilities && !ignored(n))
        compare(target_gradient[n] * scalars[0].output_scale, e.gradient[target[n]] * y_slope,
                (16 * std::max(u, std::ldexp(1.0, -24))) * e.gradient_size[target[n]],
                "target gradient", c);
      // Errors of lse weigh as much as lse does in the loss.
      const double weight = c.token_weight ? token_weight[n] : 1;
      const double loss_error =
          weight * (16 * u * (std::abs(e.lse) + 1) * (2 + c.z_loss * std::abs(e.lse)) +
                    4 * u * e.smooth_size / static_cast<double>(c.vocab) +
                    (c.probabilities ? 16 * u * 30 * static_cast<double>(c.vocab) : 0));
      total += e.loss, z_total += e.z_term, size += loss_error;
      if (c.reduction == Reduction::kNone)
        compare(loss[n], e.loss + e.z_term, loss_error, "loss of a token", c);
      if (!c.statistics) continue;
      compare(statistics[n], e.loss + e.z_term, loss_error, "statistics: loss", c);
      compare(statistics[c.tokens + n], e.logit, 2 * u * 30 * static_cast<double>(c.vocab),
              "statistics: target logit", c);
      compare(statistics[2 * c.tokens + n], e.entropy, 16 * u * (1 + e.spread + e.entropy),
              "statistics: entropy", c);
      CHECK(statistics[3 * c.tokens + n] == e.max);
      CHECK(argmax[n] == e.argmax);
    }
    if (c.reduction == Reduction::kNone) return;
    const double d = denominator(false), dz = denominator(true);
    compare(loss[0], total / d + (c.z_loss != 0 ? z_total / dz : 0), size / std::min(d, dz), "loss",
            c);
  }

  // The backward op: other arrays, lse known.
  void check_backward() {
    for (int64_t n = 0; n < c.tokens; ++n) {
      token_lse[n] = mass[n] = kNaN;
      shift[n] = softmax[n] = coefficient[n] = rest[n] = weighted[n] = static_cast<A>(kNaN);
      lse[n] = expected(n).lse;
    }
    scalars[0] = CallScalars{kNaN, kNaN, kNaN, kNaN, 0, 0, 0};
    CHECK(prepare_tokens(problem, tokens, nullptr).ok());
    tokens.target_gradient = nullptr;  // no scores are stored
    CHECK(restore_statistics(problem, tokens, 0, c.tokens, nullptr).ok());
    for (int64_t n = 0; n < c.tokens; ++n) {
      CHECK(token_lse[n] == lse[n]);
      check_coefficients(n, expected(n));
    }
  }
};

}  // namespace memeff::cuda::test
