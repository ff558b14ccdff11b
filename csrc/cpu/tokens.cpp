#include "cpu/tokens.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/number.h"
#include "cpu/parallel.h"
#include "cpu/tiling.h"

namespace memeff {
namespace {

constexpr int64_t kTokenGrain = 16;
constexpr int64_t kNoClass = -1 - (int64_t{1} << 62);  // also of no other rank

}  // namespace

template <class T>
CpuTokens<T>::CpuTokens(const CpuContext& context, const CpuLayout& layout)
    : problem_(*context.problem),
      statistics_(problem_.token_statistics),
      statistics_known_(context.request->statistics_known),
      token_block_(context.plan->token_block),
      tiles_(ceil_div(problem_.vocab, kTileVocab)),
      partials_(reinterpret_cast<T*>(context.workspace + layout.score_step.partials)),
      rank_numbers_(rank_numbers(problem_, statistics_known_)),
      own_numbers_(reinterpret_cast<double*>(context.workspace + layout.score_step.own_numbers)),
      all_numbers_(reinterpret_cast<double*>(context.workspace + layout.score_step.all_numbers)) {
  char* next = context.workspace + layout.token_arrays;
  const auto take = [&](auto** array, int64_t per_token = 1) {
    *array = reinterpret_cast<std::remove_pointer_t<decltype(array)>>(next);
    next += problem_.tokens * per_token * 8;
  };
  const int64_t targets = std::max<int64_t>(1, problem_.targets);
  take(&rows_), take(&target_, targets), take(&lse_), take(&target_logit_, targets);
  take(&target_slope_, targets);
  take(&target_plain_), take(&scale_entropy_);
  take(&target_mass_), take(&smooth_), take(&entropy_), take(&maximum_), take(&argmax_);
  take(&scale_p_), take(&scale_target_), take(&scale_w_);

  class_weight_total_ = static_cast<double>(total_vocab(problem_));
  if (problem_.class_weight != nullptr) {
    class_weight_ = reinterpret_cast<T*>(context.workspace + layout.class_weight);
    class_weight_total_ = 0;
    for (int64_t v = 0; v < problem_.vocab; ++v) {
      class_weight_[v] = static_cast<T>(problem_.class_weight[v]);
      class_weight_total_ += problem_.class_weight[v];
    }
  }
  int used = 0;
  const auto wanted = [&](Partial which, bool want) {
    partial_offset_[which] = want ? used++ : -1;
  };
  wanted(kMaximum, true), wanted(kSum, true), wanted(kSmooth, wants_logit_sum(problem_));
  wanted(kWeighted, wants_entropy(problem_)), wanted(kArgmax, wants_argmax(problem_));
  const bool soft = problem_.probabilities != nullptr;
  wanted(kTargetDot, soft), wanted(kTargetMass, soft), wanted(kTargetPlain, soft);
}

template <class T>
bool CpuTokens<T>::takes_part(int64_t n) const {
  // All tokens, or those with a target; of these, in the backward op, tokens with an upstream gradient.
  const TokenStatistics& s = *statistics_;
  bool has_target = false, wanted = false;
  for (int64_t k = 0; k < problem_.targets; ++k) {
    const int64_t at = n * problem_.targets + k;
    if (problem_.target[at] == problem_.ignore_index) continue;
    has_target = true;
    wanted |= s.grad_logprob != nullptr && s.grad_logprob[at] != 0;
  }
  if (s.skip_ignored && !has_target) return false;
  return !statistics_known_ || wanted || (s.grad_lse != nullptr && s.grad_lse[n] != 0) ||
         (s.grad_entropy != nullptr && s.grad_entropy[n] != 0) ||
         (s.grad_logit_sum != nullptr && s.grad_logit_sum[n] != 0);
}

template <class T>
void CpuTokens<T>::list_token(int64_t n) {
  rows_[count_] = n;
  int64_t* classes = target_ + count_ * problem_.targets;
  for (int64_t k = 0; k < problem_.targets; ++k) {
    const int64_t y = problem_.target == nullptr ? problem_.ignore_index
                                                 : problem_.target[n * problem_.targets + k];
    const bool seen = std::find(classes, classes + k, y - first_class(problem_)) != classes + k;
    classes[k] = problem_.target == nullptr || y == problem_.ignore_index || seen
                     ? kNoClass
                     : y - first_class(problem_);
  }
  ++count_;
}

template <class T>
int64_t CpuTokens<T>::select() {
  count_ = 0;
  if (statistics_ != nullptr) {
    for (int64_t n = 0; n < problem_.tokens; ++n) {
      if (takes_part(n)) list_token(n);
    }
    const double* scales = statistics_->inverse_temperature;
    for (int64_t token = 0; scales != nullptr && token < count_; ++token)
      token_scale_.push_back(static_cast<T>(scales[rows_[token]]));
    if (is_16_bit(problem_.dtype)) output_scale_ = problem_.logit_scale;
    if (!statistics_known_) clear_token_statistics();
    return count_;
  }
  target_weight_total_ = 0;
  for (int64_t n = 0; n < problem_.tokens; ++n) {
    const bool ignored = problem_.target != nullptr && problem_.target[n] == problem_.ignore_index;
    if (ignored) continue;
    list_token(n);
    const int64_t y = target_[count_ - 1];
    if (problem_.target == nullptr || problem_.class_weight == nullptr) {
      target_weight_total_ += 1;
    } else if (is_here(y)) {
      target_weight_total_ += problem_.class_weight[y];
    }
  }
  set_denominators();
  return count_;
}

template <class T>
void CpuTokens<T>::set_denominators() {
  if (problem_.reduction == Reduction::kMean) {
    const double* num_items = problem_.num_items;
    denominator_ = num_items != nullptr ? *num_items : target_weight_total_;
    z_denominator_ = num_items != nullptr ? *num_items : static_cast<double>(count_);
  }
  if (is_16_bit(problem_.dtype)) {
    output_scale_ =
        count_ > 0 ? problem_.logit_scale / denominator_ : 0;  // 0, not 0/0, as in torch
    if (problem_.grad_loss != nullptr && problem_.reduction != Reduction::kNone) {
      output_scale_ *= problem_.grad_loss[0];
    }
  }
}

template <class T>
T* CpuTokens<T>::partial(Partial which, int64_t tile) const {
  if (partial_offset_[which] < 0) return nullptr;
  return partials_ + (partial_offset_[which] * tiles_ + tile) * token_block_;
}

template <class T>
TilePartials<T> CpuTokens<T>::tile_partials(int64_t tile, int64_t token) const {
  const auto shifted = [&](Partial which) {
    T* values = partial(which, tile);
    return values == nullptr ? nullptr : values + token;
  };
  TilePartials<T> partials;
  partials.maximum = shifted(kMaximum);
  partials.sum = shifted(kSum);
  partials.smooth = shifted(kSmooth);
  partials.weighted = shifted(kWeighted);
  partials.argmax = shifted(kArgmax);
  return partials;
}

template <class T>
void CpuTokens<T>::merge(Range tokens) {
  // Tile by tile in order: the result does not depend on the number of threads.
  parallel_for(tokens.size(), kTokenGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = tokens.begin + i;
      const auto read = [&](Partial which, int64_t tile) {
        const T* values = partial(which, tile);
        return values == nullptr ? 0.0 : static_cast<double>(values[i]);
      };
      double maximum = -std::numeric_limits<double>::infinity();
      int64_t argmax = 0;
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const double value = read(kMaximum, tile);
        if (value > maximum) {
          maximum = value;
          argmax = tile * kTileVocab + static_cast<int64_t>(read(kArgmax, tile));
        }
      }
      // sum exp(z - maximum), and the same weighted by z - maximum.
      double sum = 0, weighted = 0, smooth = 0, dot = 0, mass = 0, plain = 0;
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const double value = read(kMaximum, tile);
        // A tile of -inf or +inf scores adds nothing, but a NaN in it must stay visible.
        const double scale = std::isinf(value) ? 0.0 : std::exp(value - maximum);
        const double tile_sum = read(kSum, tile);
        if (std::isnan(tile_sum)) sum = tile_sum;
        if (scale > 0) {
          sum += scale * tile_sum;
          weighted += scale * (read(kWeighted, tile) + (value - maximum) * tile_sum);
        }
        smooth += read(kSmooth, tile);
        dot += read(kTargetDot, tile);
        mass += read(kTargetMass, tile);
        plain += read(kTargetPlain, tile);
      }
      // With a score of NaN all of them are NaN; with one of +inf lse is +inf, as in torch.
      const bool infinite = maximum == std::numeric_limits<double>::infinity();
      if (std::isnan(sum)) maximum = sum;
      lse_[token] = infinite ? maximum : maximum + std::log(sum);
      smooth_[token] = smooth;
      entropy_[token] = infinite ? std::nan("") : std::log(sum) - weighted / sum;
      maximum_[token] = maximum;
      argmax_[token] = argmax;
      if (problem_.probabilities != nullptr) {
        target_logit_[token] = dot;
        target_mass_[token] = mass;
        target_plain_[token] = plain;
      }
      if (!is_sharded()) set_coefficients(token);
    }
  });
}

template <class T>
double CpuTokens<T>::probability(int64_t token, int64_t v) const {
  return load(
      problem_.probabilities_dtype, problem_.probabilities,
      rows_[token] * problem_.probabilities_token_stride + v * problem_.probabilities_class_stride);
}

template <class T>
void CpuTokens<T>::restore() {
  // The mass of a probability target is needed before its coefficients: one pass over the targets.
  parallel_for(count_, kTokenGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      lse_[token] = problem_.lse[rows_[token]];
      if (has_entropy_gradient()) entropy_[token] = statistics_->known_entropy[rows_[token]];
      if (problem_.probabilities != nullptr) {
        double mass = 0;
        for (int64_t v = 0; v < problem_.vocab; ++v) {
          mass += probability(token, v) * (class_weight_ != nullptr ? class_weight_[v] : 1);
        }
        target_mass_[token] = mass;
      }
      // In a shard it may be a part of it, or unknown.
      if (!is_sharded() || rank_numbers_.target_weight < 0) set_coefficients(token);
    }
  });
}

template <class T>
double CpuTokens<T>::statistics_scale(int64_t token) const {
  const double* scales = statistics_->inverse_temperature;
  return (is_16_bit(problem_.dtype) ? 1 : problem_.logit_scale) *
         (scales == nullptr ? 1 : scales[rows_[token]]);
}

template <class T>
void CpuTokens<T>::set_statistics_coefficients(int64_t token) {
  const TokenStatistics& s = *statistics_;
  const int64_t n = rows_[token];
  const double scale = statistics_scale(token);
  double p = s.grad_lse != nullptr ? s.grad_lse[n] : 0;
  const bool certain = is_certain(token);
  for (int64_t k = 0; s.grad_logprob != nullptr && !certain && k < problem_.targets; ++k) {
    const int64_t at = n * problem_.targets + k;
    if (problem_.target[at] != problem_.ignore_index) p -= s.grad_logprob[at];
  }
  const double entropy = s.grad_entropy != nullptr && !certain ? s.grad_entropy[n] : 0;
  if (entropy != 0) p -= entropy * entropy_[token];
  scale_p_[token] = scale * p;
  scale_entropy_[token] = -scale * entropy;
  scale_target_[token] = 0;
  scale_w_[token] = s.grad_logit_sum != nullptr ? -scale * s.grad_logit_sum[n] : 0;
}

template <class T>
void CpuTokens<T>::set_coefficients(int64_t token) {
  if (statistics_ != nullptr) {
    if (statistics_known_) set_statistics_coefficients(token);
    return;
  }
  scale_entropy_[token] = 0;
  if (problem_.probabilities == nullptr && !(is_sharded() && class_weight_ != nullptr))
    target_mass_[token] = class_weight_ != nullptr ? class_weight_[target_[token]] : 1;
  const bool scales_sums = is_16_bit(problem_.dtype);
  const double weight =
      problem_.token_weight == nullptr ? 1.0 : problem_.token_weight[rows_[token]];
  double g = weight;
  if (problem_.grad_loss != nullptr && problem_.reduction == Reduction::kNone) {
    g *= problem_.grad_loss[rows_[token]];
  } else if (problem_.grad_loss != nullptr && !scales_sums) {
    g *= problem_.grad_loss[0];
  }
  if (!scales_sums) g *= problem_.logit_scale / denominator_;
  const double z_share = denominator_ / z_denominator_;
  const double eps = problem_.label_smoothing;
  const double cross_entropy = is_certain(token) ? 0 : g;
  scale_target_[token] = cross_entropy * (1 - eps);
  scale_w_[token] = cross_entropy * eps / static_cast<double>(total_vocab(problem_));
  scale_p_[token] = scale_target_[token] * target_mass_[token] +
                    scale_w_[token] * class_weight_total_ +
                    g * 2 * problem_.z_loss * lse_[token] * z_share;
}

template <class T>
double CpuTokens<T>::token_loss(int64_t token, double* z_term) const {
  *z_term = 0;
  const double eps = problem_.label_smoothing;
  const double weight =
      problem_.token_weight == nullptr ? 1.0 : problem_.token_weight[rows_[token]];
  const double lse = lse_[token];
  if (lse == std::numeric_limits<double>::infinity()) return std::nan("");  // as in torch
  const bool soft = problem_.probabilities != nullptr;
  const double mass = target_mass_[token];
  const double dot = soft ? target_logit_[token] : mass * target_logit_[token];
  // A class of weight 0 contributes nothing, even at a target logit of -inf.
  double loss = eps == 1 || (!soft && mass == 0) ? 0.0 : (1 - eps) * (mass * lse - dot);
  if (eps > 0) {
    loss += eps / static_cast<double>(total_vocab(problem_)) *
            (class_weight_total_ * lse - smooth_[token]);
  }
  if (problem_.z_loss != 0) *z_term = weight * problem_.z_loss * lse * lse;
  return weight * loss;
}

template <class T>
void CpuTokens<T>::write_token_statistics(Range tokens) {
  const TokenStatistics& s = *statistics_;
  const int64_t targets = problem_.targets;
  T* logprob = static_cast<T*>(s.logprob);
  T* max_logit = static_cast<T*>(s.max_logit);
  T* logit_sum = static_cast<T*>(s.logit_sum);
  T* top = static_cast<T*>(s.top_logprobs);
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    const int64_t row = rows_[token];
    problem_.lse[row] = lse_[token];
    if (s.entropy != nullptr) s.entropy[row] = entropy_[token];
    if (logit_sum != nullptr) logit_sum[row] = static_cast<T>(smooth_[token]);
    if (max_logit != nullptr) max_logit[row] = static_cast<T>(maximum_[token]);
    if (s.argmax != nullptr) s.argmax[row] = argmax_[token];
    for (int64_t k = 0; logprob != nullptr && k < targets; ++k) {
      const int64_t y = problem_.target[row * targets + k];
      if (y == problem_.ignore_index) continue;
      const int64_t* classes = target_ + token * targets;
      const int64_t first = std::find(classes, classes + k, y - first_class(problem_)) - classes;
      logprob[row * targets + k] = static_cast<T>(target_logit(token, first) - lse_[token]);
    }
    for (int64_t j = 0; j < s.top; ++j) {
      top[row * s.top + j] = static_cast<T>(top[row * s.top + j] - lse_[token]);
    }
  }
}

template <class T>
void CpuTokens<T>::clear_token_statistics() {
  const TokenStatistics& s = *statistics_;
  const int64_t n = problem_.tokens;
  std::fill_n(problem_.lse, n, 0.0);
  if (s.logprob != nullptr) std::fill_n(static_cast<T*>(s.logprob), n * problem_.targets, T{0});
  if (s.entropy != nullptr) std::fill_n(s.entropy, n, 0.0);
  if (s.logit_sum != nullptr) std::fill_n(static_cast<T*>(s.logit_sum), n, T{0});
  if (s.max_logit != nullptr) std::fill_n(static_cast<T*>(s.max_logit), n, T{0});
  if (s.argmax != nullptr) std::fill_n(s.argmax, n, 0);
}

template <class T>
void CpuTokens<T>::differentiate(Range tokens) {
  if (statistics_ == nullptr || statistics_->differentiate == nullptr) return;
  write_token_statistics(tokens);
  // Rows in between that take no part have statistics of 0; their gradients are not read.
  statistics_->differentiate(statistics_->context, rows_[tokens.begin], rows_[tokens.end - 1] + 1);
  for (int64_t token = tokens.begin; token < tokens.end; ++token) {
    set_statistics_coefficients(token);
  }
}

template <class T>
void CpuTokens<T>::update_top(const T* z, int64_t stride, Range classes, Range tokens) {
  const int64_t top = statistics_->top;
  const T softcap = static_cast<T>(problem_.softcap);
  parallel_for(tokens.size(), kTokenGrain, [&](int64_t begin, int64_t end, int) {
    const auto update = [&](int64_t i, int64_t id, T score) {
      const int64_t row = rows_[tokens.begin + i];
      T* scores = static_cast<T*>(statistics_->top_logprobs) + row * top;
      int64_t* ids = statistics_->top_ids + row * top;
      // The first classes fill the list. Equal scores stay in the order of their classes.
      int64_t place = std::min(id, top - 1);
      if (id >= top && !(score > scores[place])) return;
      while (place > 0 && score > scores[place - 1]) {
        scores[place] = scores[place - 1];
        ids[place] = ids[place - 1];
        --place;
      }
      scores[place] = score;
      ids[place] = id;
    };
    for (int64_t v = 0; v < classes.size(); ++v) {
      for (int64_t i = begin; i < end; ++i) {
        update(i, classes.begin + v,
               score_of(z[v * stride + i], softcap) * scale_of(tokens.begin + i));
      }
    }
  });
}

template <class T>
void CpuTokens<T>::write_loss() {
  if (statistics_ != nullptr) {
    // With gradients in the forward pass they have been written chunk by chunk.
    if (statistics_->differentiate == nullptr) write_token_statistics({0, count_});
    return;
  }
  const DType dtype = accumulation_dtype(problem_.dtype);
  const int64_t n = problem_.tokens;
  T* statistics = static_cast<T*>(problem_.statistics_out);
  std::fill_n(problem_.lse, n, 0.0);
  if (statistics != nullptr) {
    std::fill_n(statistics, 4 * n, T{0});
    std::fill_n(problem_.argmax, n, 0);
  }
  if (problem_.reduction == Reduction::kNone) std::fill_n(static_cast<T*>(problem_.loss), n, T{0});
  double total = 0, z_total = 0;
  for (int64_t token = 0; token < count_; ++token) {
    const int64_t row = rows_[token];
    double z_term = 0;
    const double loss = token_loss(token, &z_term);
    problem_.lse[row] = lse_[token];
    if (problem_.reduction == Reduction::kNone) store(dtype, problem_.loss, row, loss + z_term);
    total += loss;
    z_total += z_term;
    if (statistics == nullptr) continue;
    const double logit =
        problem_.probabilities != nullptr ? target_plain_[token] : target_logit_[token];
    statistics[row] = static_cast<T>(loss + z_term);
    statistics[n + row] = static_cast<T>(logit);
    statistics[2 * n + row] = static_cast<T>(entropy_[token]);
    statistics[3 * n + row] = static_cast<T>(maximum_[token]);
    problem_.argmax[row] = argmax_[token];
  }
  if (problem_.reduction == Reduction::kNone) return;
  double loss = total / denominator_;
  if (problem_.z_loss != 0) loss += z_total / z_denominator_;
  store(dtype, problem_.loss, 0, loss);
}

template <class T>
const typename CpuTokens<T>::Coefficients& CpuTokens<T>::coefficients(Range tokens) {
  if (cached_ == tokens) return coefficients_;
  const auto size = static_cast<size_t>(tokens.size());
  const auto padded = static_cast<size_t>(round_up(tokens.size(), kPanel));
  for (auto* values :
       {&coefficients_.shift, &coefficients_.scale_p, &coefficients_.scale_p_rest,
        &coefficients_.scale_entropy, &coefficients_.scale_target, &coefficients_.scale_w}) {
    values->assign(padded, T{0});
  }
  for (size_t i = 0; i < size; ++i) {
    const size_t token = static_cast<size_t>(tokens.begin) + i;
    const T shift = static_cast<T>(lse_[token]);
    const double rounding =
        std::isfinite(lse_[token]) ? std::exp(static_cast<double>(shift) - lse_[token]) : 1;
    coefficients_.shift[i] = shift;
    double scale_p = scale_p_[token] * rounding;
    const double entropy = scale_entropy_[token];
    coefficients_.scale_entropy[i] = static_cast<T>(entropy * rounding);
    if (entropy != 0) {
      // scale_p contains entropy * entropy_; with the rounded coefficient instead, the two terms keep
      // cancelling. log p is z - shift here, not z - lse.
      const double rounded = coefficients_.scale_entropy[i];
      scale_p += rounded * (entropy_[token] + static_cast<double>(shift) - lse_[token]) -
                 rounding * entropy * entropy_[token];
    }
    coefficients_.scale_p[i] = static_cast<T>(scale_p);
    coefficients_.scale_p_rest[i] =
        static_cast<T>(scale_p - static_cast<double>(coefficients_.scale_p[i]));
    coefficients_.scale_target[i] = static_cast<T>(scale_target_[token]);
    coefficients_.scale_w[i] = static_cast<T>(scale_w_[token]);
  }
  cached_ = tokens;
  return coefficients_;
}

template <class T>
double CpuTokens<T>::target_gradient(int64_t token, int64_t k) const {
  const double t = target_logit(token, k);
  const double p = std::exp(t - lse_[token]);
  double gradient = scale_p_[token] * p;
  if (statistics_ != nullptr) {
    if (p > 0) gradient += scale_entropy_[token] * p * (t - lse_[token]);
    // All targets of this class: for_each_target sees the first of them only.
    const int64_t targets = problem_.targets, at = rows_[token] * targets;
    double sum = 0;
    const bool counts = statistics_->grad_logprob != nullptr && !is_certain(token);
    for (int64_t j = k; counts && j < targets; ++j) {
      if (problem_.target[at + j] == problem_.target[at + k])
        sum += statistics_->grad_logprob[at + j];
    }
    gradient += sum * statistics_scale(token);
    gradient -= scale_w_[token];
  } else {
    gradient -= scale_target_[token] * target_mass_[token] +
                scale_w_[token] * (class_weight_ != nullptr ? class_weight_[target_[token]] : 1);
  }
  return gradient * target_slope_[token * problem_.targets + k];
}

template <class T>
bool CpuTokens<T>::contiguous_rows(Range tokens) const {
  return tokens.size() == 0 || rows_[tokens.end - 1] - rows_[tokens.begin] == tokens.size() - 1;
}

template class CpuTokens<float>;
template class CpuTokens<double>;

}  // namespace memeff
