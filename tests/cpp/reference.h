// What csrc/core/problem.h says, computed token by token in double from the whole matrix of scores.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "cpu/number.h"

namespace memeff::test {

struct Reference {
  double loss = 0;
  std::vector<double> token_loss, lse, target_logit, entropy, maximum;
  std::vector<int64_t> argmax;
  std::vector<double> grad_input, grad_weight, grad_bias;
};

class ReferenceRun {
 public:
  explicit ReferenceRun(const Problem& problem)
      : p_(problem),
        vocab_(size(p_.vocab)),
        features_(size(p_.features)),
        score_(vocab_),
        mass_(vocab_) {
    input_ = rows_of(p_.input, p_.tokens, p_.input_stride);
    weight_ = rows_of(p_.weight, p_.vocab, p_.weight_stride);
  }

  Reference run() {
    const size_t tokens = size(p_.tokens);
    for (auto* values :
         {&out_.token_loss, &out_.lse, &out_.target_logit, &out_.entropy, &out_.maximum}) {
      values->assign(tokens, 0);
    }
    out_.argmax.assign(tokens, 0);
    out_.grad_input.assign(tokens * features_, 0);
    out_.grad_weight.assign(vocab_ * features_, 0);
    out_.grad_bias.assign(vocab_, 0);
    count();
    double total = 0, z_total = 0;
    for (size_t n = 0; n < tokens; ++n) {
      if (ignored(n)) continue;
      statistics(n);
      double cross_entropy = 0;
      for (size_t v = 0; v < vocab_; ++v) cross_entropy += mass_[v] * (out_.lse[n] - score_[v]);
      const double weight = p_.token_weight == nullptr ? 1 : p_.token_weight[n];
      const double z_term = p_.z_loss * out_.lse[n] * out_.lse[n];
      out_.token_loss[n] = weight * (cross_entropy + z_term);
      total += weight * cross_entropy;
      z_total += weight * z_term;
      add_gradients(n, weight);
    }
    out_.loss = total / denominator_ + (p_.z_loss == 0 ? 0 : z_total / z_denominator_);
    return out_;
  }

 private:
  static size_t size(int64_t n) { return static_cast<size_t>(n); }

  bool ignored(size_t n) const { return p_.target != nullptr && p_.target[n] == p_.ignore_index; }
  double class_weight(size_t v) const {
    return p_.class_weight == nullptr ? 1 : p_.class_weight[v];
  }

  /// A matrix with rows of D features, dense.
  std::vector<double> rows_of(const void* data, int64_t rows, int64_t stride) const {
    std::vector<double> values;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < p_.features; ++d)
        values.push_back(load(p_.dtype, data, i * stride + d));
    }
    return values;
  }

  void count() {
    if (p_.reduction != Reduction::kMean) return;
    denominator_ = z_denominator_ = 0;
    for (size_t n = 0; n < size(p_.tokens); ++n) {
      if (ignored(n)) continue;
      denominator_ += p_.target != nullptr ? class_weight(size(p_.target[n])) : 1;
      z_denominator_ += 1;
    }
    if (p_.num_items != nullptr) denominator_ = z_denominator_ = *p_.num_items;
  }

  /// Scores, their statistics, and the mass that the target gives to each class.
  void statistics(size_t n) {
    out_.maximum[n] = -INFINITY;
    for (size_t v = 0; v < vocab_; ++v) {
      double u = p_.bias == nullptr ? 0 : load(p_.dtype, p_.bias, static_cast<int64_t>(v));
      const double* x = &input_[n * features_];
      const double* w = &weight_[v * features_];
      for (size_t d = 0; d < features_; ++d) u += x[d] * w[d];
      u *= p_.logit_scale;
      score_[v] = p_.softcap > 0 ? p_.softcap * std::tanh(u / p_.softcap) : u;
      if (score_[v] > out_.maximum[n]) {
        out_.maximum[n] = score_[v];
        out_.argmax[n] = static_cast<int64_t>(v);
      }
    }
    double sum = 0;
    for (const double z : score_) sum += std::exp(z - out_.maximum[n]);
    out_.lse[n] = out_.maximum[n] + std::log(sum);
    out_.entropy[n] = 0;
    for (const double z : score_) out_.entropy[n] += std::exp(z - out_.lse[n]) * (out_.lse[n] - z);
    for (size_t v = 0; v < vocab_; ++v) {
      double q = p_.target != nullptr && size(p_.target[n]) == v ? 1 : 0;
      if (p_.probabilities != nullptr) {
        q = load(p_.probabilities_dtype, p_.probabilities,
                 static_cast<int64_t>(n) * p_.probabilities_token_stride +
                     static_cast<int64_t>(v) * p_.probabilities_class_stride);
      }
      if (q != 0) out_.target_logit[n] += q * score_[v];
      const double smoothed =
          (1 - p_.label_smoothing) * q + p_.label_smoothing / static_cast<double>(vocab_);
      mass_[v] = class_weight(v) * smoothed;
    }
  }

  void add_gradients(size_t n, double token_weight) {
    double upstream = token_weight;
    if (p_.grad_loss != nullptr) upstream *= p_.grad_loss[p_.reduction == Reduction::kNone ? n : 0];
    double total_mass = 0;
    for (const double mass : mass_) total_mass += mass;
    for (size_t v = 0; v < vocab_; ++v) {
      const double probability = std::exp(score_[v] - out_.lse[n]);
      double dlogit = upstream * (total_mass * probability - mass_[v]) / denominator_;
      if (p_.z_loss != 0)
        dlogit += upstream * 2 * p_.z_loss * out_.lse[n] * probability / z_denominator_;
      if (p_.softcap > 0) dlogit *= 1 - (score_[v] / p_.softcap) * (score_[v] / p_.softcap);
      dlogit *= p_.logit_scale;
      out_.grad_bias[v] += dlogit;
      const double* x = &input_[n * features_];
      const double* w = &weight_[v * features_];
      double* grad_x = &out_.grad_input[n * features_];
      double* grad_w = &out_.grad_weight[v * features_];
      for (size_t d = 0; d < features_; ++d) {
        grad_x[d] += dlogit * w[d];
        grad_w[d] += dlogit * x[d];
      }
    }
  }

  const Problem& p_;
  const size_t vocab_, features_;
  double denominator_ = 1, z_denominator_ = 1;
  std::vector<double> input_, weight_, score_, mass_;
  Reference out_;
};

}  // namespace memeff::test
