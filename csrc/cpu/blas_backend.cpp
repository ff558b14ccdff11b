#include "cpu/blas_backend.h"

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/number.h"
#include "cpu/parallel.h"
#include "cpu/tiling.h"

namespace memeff {
namespace {

/// Copies `rows` rows of `columns` numbers of any dtype to dense rows of T.
template <class T, class RowIndex>
void convert_rows(DType dtype, const void* from, int64_t stride, int64_t rows, int64_t columns,
                  const RowIndex& row_index, T* to) {
  dispatch(dtype, [&](auto* type) {
    const auto* source = static_cast<decltype(type)>(const_cast<void*>(from));
    parallel_for(rows, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* row = source + row_index(i) * stride;
        for (int64_t d = 0; d < columns; ++d)
          to[i * columns + d] = static_cast<T>(to_arithmetic(row[d]));
      }
    });
  });
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace

template <class T>
int64_t BlasBackend<T>::enough_tokens() const {
  return std::max(16, 4 * this->context_.request->threads);
}

template <class T>
int64_t BlasBackend<T>::product_columns(Range tokens, bool kept) const {
  const int64_t enough = enough_tokens();
  const bool never = this->context_.request->fixed_order || this->problem_.tokens < enough ||
                     this->problem_.vocab < kEnoughClasses || this->plan_.token_block < enough;
  if (never || (kept && tokens.size() < enough)) return 0;
  return std::max(tokens.size(), enough);
}

template <class T>
ScoreBlock BlasBackend<T>::part(const ScoreBlock& block, int64_t classes, int64_t tokens) const {
  ScoreBlock result = block;
  result.data = static_cast<T*>(block.data) + classes * block.stride + tokens;
  return result;
}

template <class T>
typename BlasBackend<T>::Rows BlasBackend<T>::input_rows(Range tokens, int64_t workspace_offset,
                                                         int64_t padding) {
  const Problem& p = this->problem_;
  const int64_t* rows = this->tokens_.rows() + tokens.begin;
  const bool dense = tokens.size() > 0 && this->tokens_.contiguous_rows(tokens);
  if (p.dtype == dtype_of<T>() && dense && padding == 0) {
    return {static_cast<const T*>(p.input) + rows[0] * p.input_stride, p.input_stride};
  }
  T* gathered = this->template at<T>(workspace_offset);
  convert_rows(
      p.dtype, p.input, p.input_stride, tokens.size(), p.features,
      [&](int64_t i) { return rows[i]; }, gathered);
  std::fill_n(gathered + tokens.size() * p.features, padding * p.features, T{0});
  return {gathered, p.features};
}

template <class T>
const T* BlasBackend<T>::input_panels(Range tokens) {
  const Problem& p = this->problem_;
  const int64_t* rows = this->tokens_.rows() + tokens.begin;
  T* const panels = this->template at<T>(this->layout_.score_step.input_block);
  dispatch(p.dtype, [&](auto* type) {
    const auto* input = static_cast<decltype(type)>(const_cast<void*>(p.input));
    parallel_for(ceil_div(tokens.size(), kPanel), 1, [&](int64_t panel, int64_t end, int) {
      for (; panel < end; ++panel) {
        T* const to = panels + panel * p.features * kPanel;
        const int64_t first = panel * kPanel, count = std::min(kPanel, tokens.size() - first);
        std::fill_n(to, p.features * kPanel, T{0});
        for (int64_t i = 0; i < count; ++i) {
          const auto* row = input + rows[first + i] * p.input_stride;
          for (int64_t d = 0; d < p.features; ++d)
            to[d * kPanel + i] = static_cast<T>(to_arithmetic(row[d]));
        }
      }
    });
  });
  return panels;
}

template <class T>
void BlasBackend<T>::multiply_panels(const Rows& w, const T* panels, int64_t classes,
                                     int64_t tokens, T* z, int64_t stride) {
  const int64_t columns = ceil_div(tokens, kPanel);
  parallel_for(ceil_div(classes, kTileVocab) * columns, 1, [&](int64_t task, int64_t end, int) {
    for (; task < end; ++task) {
      const int64_t v = task / columns * kTileVocab, t = task % columns * kPanel;
      column_kernels<T>().multiply(
          w.data + v * w.stride, w.stride, 1, std::min(kTileVocab, classes - v),
          panels + t * this->problem_.features, kPanel, this->problem_.features,
          std::min(kPanel, tokens - t), false, z + v * stride + t, stride);
    }
  });
}

template <class T>
typename BlasBackend<T>::Rows BlasBackend<T>::weight_rows(Range classes, int64_t workspace_offset) {
  const Problem& p = this->problem_;
  if (p.dtype == dtype_of<T>()) {
    return {static_cast<const T*>(p.weight) + classes.begin * p.weight_stride, p.weight_stride};
  }
  T* upcast = this->template at<T>(workspace_offset);
  convert_rows(
      p.dtype, p.weight, p.weight_stride, classes.size(), p.features,
      [&](int64_t i) { return classes.begin + i; }, upcast);
  return {upcast, p.features};
}

template <class T>
void BlasBackend<T>::scores(Range tokens, const ScoreBlock* block) {
  compute_scores({0, this->problem_.vocab}, tokens, block, true);
}

template <class T>
void BlasBackend<T>::fresh_gradient(Range classes, Range tokens, const ScoreBlock& block,
                                    bool add_bias) {
  compute_scores(classes, tokens, &block, false);
  to_gradient(classes, tokens, block, add_bias);
}

template <class T>
void BlasBackend<T>::compute_scores(Range classes, Range tokens, const ScoreBlock* block,
                                    bool statistics) {
  const Problem& p = this->problem_;
  const int64_t columns_of_blas = product_columns(tokens, statistics && block != nullptr);
  const bool fixed_order = columns_of_blas == 0;
  const T* const panels = fixed_order ? input_panels(tokens) : nullptr;
  const Rows x = fixed_order ? Rows{}
                             : input_rows(tokens, this->layout_.score_step.input_block,
                                          columns_of_blas - tokens.size());
  const ScoreBlock discarded = this->slice_block(tokens.size());
  for (int64_t begin = classes.begin; begin < classes.end; begin += this->plan_.slice_vocab) {
    const Range slice{begin, std::min(begin + this->plan_.slice_vocab, classes.end)};
    const Rows w = weight_rows(slice, this->layout_.score_step.weight_block);
    T* z = block == nullptr
               ? static_cast<T*>(discarded.data)
               : static_cast<T*>(block->data) + (begin - classes.begin) * block->stride;
    const int64_t stride = block == nullptr ? discarded.stride : block->stride;
    if (fixed_order) {
      multiply_panels(w, panels, slice.size(), tokens.size(), z, stride);
    } else {
      gemm<T>(false, true, slice.size(), columns_of_blas, p.features, w.data, w.stride, x.data,
              x.stride, false, z, stride);
    }
    // One task is a tile of classes by a range of tokens: enough of them for many threads.
    const int64_t tiles = ceil_div(slice.size(), kTileVocab);
    const int64_t columns = 4 * kPanel;
    const int64_t strips = ceil_div(tokens.size(), columns);
    parallel_for(tiles * strips, 1, [&](int64_t task, int64_t end, int) {
      for (; task < end; ++task) {
        const int64_t first = task / strips * kTileVocab;
        const Range tile{slice.begin + first,
                         std::min(slice.begin + first + kTileVocab, slice.end)};
        const int64_t t = task % strips * columns;
        finish_tile(z + first * stride, stride, tile, tokens,
                    {t, std::min(t + columns, tokens.size())}, statistics);
      }
    });
    if (statistics && this->tokens_.wants_top()) this->tokens_.update_top(z, stride, slice, tokens);
  }
}

template <class T>
void BlasBackend<T>::finish_tile(T* z, int64_t stride, Range classes, Range tokens, Range columns,
                                 bool statistics) {
  const Problem& p = this->problem_;
  T bias[kTileVocab];
  ScoreTransform<T> transform = this->score_transform(classes, bias);
  transform.token_scale = this->tokens_.token_scale(tokens.begin + columns.begin);
  TilePartials<T> partials;
  const int64_t tile = classes.begin / kTileVocab;
  if (statistics) partials = this->tokens_.tile_partials(tile, columns.begin);
  T* part = z + columns.begin;
  column_kernels<T>().finish_scores(part, stride, classes.size(), columns.size(), transform,
                                    partials);
  const Range range{tokens.begin + columns.begin, tokens.begin + columns.end};
  if (p.probabilities != nullptr) {
    if (statistics) probability_partials(part, stride, classes, range, columns.begin);
    return;
  }
  this->tokens_.for_each_target(classes, range, [&](int64_t row, int64_t i, int64_t k) {
    this->tokens_.set_target_logit(range.begin + i, k, part[row * stride + i]);
  });
}

template <class T>
void BlasBackend<T>::probability_partials(const T* z, int64_t stride, Range classes, Range tokens,
                                          int64_t at) {
  const int64_t tile = classes.begin / kTileVocab;
  const T* w = this->tokens_.class_weight(classes.begin);
  for (int64_t i = 0; i < tokens.size(); ++i) {
    double dot = 0, mass = 0, plain = 0;
    for (int64_t v = 0; v < classes.size(); ++v) {
      const double q = this->tokens_.probability(tokens.begin + i, classes.begin + v);
      const double weighted = w == nullptr ? q : q * w[v];
      const double score = score_of(z[v * stride + i], static_cast<T>(this->problem_.softcap));
      mass += weighted;
      // A probability of 0 times a score of -inf is NaN, as in torch.
      dot += weighted * score;
      plain += q * score;
    }
    this->tokens_.partial(kTargetDot, tile)[at + i] = static_cast<T>(dot);
    this->tokens_.partial(kTargetMass, tile)[at + i] = static_cast<T>(mass);
    this->tokens_.partial(kTargetPlain, tile)[at + i] = static_cast<T>(plain);
  }
}

template <class T>
void BlasBackend<T>::to_gradient(Range classes, Range tokens, const ScoreBlock& block,
                                 bool add_bias) {
  const Problem& p = this->problem_;
  const auto& coefficients = this->tokens_.coefficients(tokens);
  T* z = static_cast<T*>(block.data);
  double* bias_sum = add_bias ? this->bias_sum() : nullptr;
  constexpr int64_t kRows = 32;
  parallel_for(ceil_div(classes.size(), kRows), 1, [&](int64_t task, int64_t end, int) {
    std::vector<T> slope;  // of the soft cap: what the probability targets still need of the scores
    for (; task < end; ++task) {
      const int64_t first = task * kRows;
      const Range rows{classes.begin + first, std::min(classes.begin + first + kRows, classes.end)};
      T* part = z + first * block.stride;
      GradientTransform<T> transform;
      transform.softcap = static_cast<T>(p.softcap);
      transform.token_scale = this->tokens_.token_scale(tokens.begin);
      transform.shift = coefficients.shift.data();
      transform.scale_p = coefficients.scale_p.data();
      if (this->tokens_.has_entropy_gradient()) {
        transform.scale_p_rest = coefficients.scale_p_rest.data();
        transform.scale_entropy = coefficients.scale_entropy.data();
      }
      transform.scale_w = this->tokens_.scale_w(coefficients);
      transform.class_weight = this->tokens_.class_weight(rows.begin);
      if (p.probabilities != nullptr) {
        slope.assign(static_cast<size_t>(rows.size() * tokens.size()), T{1});
        if (p.softcap > 0) {
          for (int64_t v = 0; v < rows.size(); ++v) {
            for (int64_t i = 0; i < tokens.size(); ++i) {
              slope[static_cast<size_t>(v * tokens.size() + i)] =
                  cap_slope(part[v * block.stride + i]);
            }
          }
        }
      }
      column_kernels<T>().to_gradient(part, block.stride, rows.size(), tokens.size(), transform);
      if (p.probabilities != nullptr) {
        for (int64_t v = 0; v < rows.size(); ++v) {
          const double w = transform.class_weight == nullptr ? 1.0 : transform.class_weight[v];
          for (int64_t i = 0; i < tokens.size(); ++i) {
            const double q = this->tokens_.probability(tokens.begin + i, rows.begin + v);
            const double change = w * q * coefficients.scale_target[static_cast<size_t>(i)] *
                                  slope[static_cast<size_t>(v * tokens.size() + i)];
            part[v * block.stride + i] -= static_cast<T>(change);
          }
        }
      } else {
        this->tokens_.for_each_target(rows, tokens, [&](int64_t row, int64_t i, int64_t k) {
          part[row * block.stride + i] =
              static_cast<T>(this->tokens_.target_gradient(tokens.begin + i, k));
        });
      }
      if (bias_sum != nullptr) {
        column_kernels<T>().add_row_sums(part, block.stride, rows.size(), tokens.size(),
                                         bias_sum + rows.begin);
      }
    }
  });
}

template <class T>
void BlasBackend<T>::add_grad_input(Range classes, Range tokens, const ScoreBlock& block,
                                    bool first) {
  const Rows w = weight_rows(classes, this->layout_.input_step.weight_block);
  if (this->problem_.features <= kFewFeatures) {
    const T* gradient = static_cast<const T*>(block.data);
    constexpr int64_t kTokens = 16;
    parallel_for(tokens.size(), kTokens, [&](int64_t begin, int64_t end, int) {
      column_kernels<T>().add_few_features(
          gradient + begin, block.stride, classes.size(), end - begin, w.data, w.stride,
          this->problem_.features, !first,
          this->input_sum(tokens) + begin * this->input_sum_stride(), this->input_sum_stride());
    });
    return;
  }
  if (tokens.size() < enough_tokens()) {
    constexpr int64_t kColumns = 64;
    const int64_t features = this->problem_.features;
    parallel_for(ceil_div(features, kColumns), 1, [&](int64_t task, int64_t end, int) {
      for (; task < end; ++task) {
        const int64_t d = task * kColumns;
        column_kernels<T>().multiply(static_cast<const T*>(block.data), 1, block.stride,
                                     tokens.size(), w.data + d, w.stride, classes.size(),
                                     std::min(kColumns, features - d), !first,
                                     this->input_sum(tokens) + d, this->input_sum_stride());
      }
    });
    return;
  }
  gemm<T>(true, false, tokens.size(), this->problem_.features, classes.size(),
          static_cast<const T*>(block.data), block.stride, w.data, w.stride, !first,
          this->input_sum(tokens), this->input_sum_stride());
}

template <class T>
void BlasBackend<T>::grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first,
                                 bool last, WeightUpdate update) {
  const Rows x = input_rows(tokens, this->layout_.weight_step.input_block);
  gemm<T>(false, false, classes.size(), this->problem_.features, tokens.size(),
          static_cast<const T*>(block.data), block.stride, x.data, x.stride, !first,
          this->weight_sum(), sum_stride(this->problem_.features));
  if (last) this->update_grad_weight(classes, update);
}

template class BlasBackend<float>;
template class BlasBackend<double>;

}  // namespace memeff
