#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "core/planning.h"
#include "cpu/number.h"
#include "cpu/parallel.h"
#include "cpu/row_update.h"

namespace memeff {
namespace {

/// Rows of a task: enough numbers that handing it to a thread does not take longer.
int64_t row_grain(int64_t columns) {
  constexpr int64_t kLeastRows = 8, kLeastNumbers = 1 << 14;
  return std::max(kLeastRows, kLeastNumbers / std::max<int64_t>(1, columns));
}

}  // namespace

template <class T>
CpuBackend<T>::CpuBackend(const CpuContext& context)
    : context_(context),
      problem_(*context.problem),
      plan_(*context.plan),
      layout_(layout_workspace(*context.request, *context.plan)),
      tokens_(context, layout_) {
  if (problem_.grad_bias != nullptr) {
    bias_sum_ = at<double>(layout_.bias_sum);
    std::fill_n(bias_sum_, problem_.vocab, 0.0);
  }
  sums_of_all_tokens_ = plan_.kind == PlanKind::kVocabSlices && !plan_.separate_sweeps &&
                        problem_.grad_weight != nullptr;
}

template <class T>
ScoreTransform<T> CpuBackend<T>::score_transform(Range classes, T (&bias)[kTileVocab]) const {
  ScoreTransform<T> transform;
  transform.scale = static_cast<T>(problem_.logit_scale);
  transform.softcap = static_cast<T>(problem_.softcap);
  transform.class_weight = tokens_.class_weight(classes.begin);
  if (problem_.bias != nullptr) {
    for (int64_t v = 0; v < classes.size(); ++v)
      bias[v] = static_cast<T>(load(problem_.dtype, problem_.bias, classes.begin + v));
    transform.bias = bias;
  }
  return transform;
}

template <class T>
T* CpuBackend<T>::input_sum(Range tokens) const {
  // Rows of the gradient are first filled densely, in order of the processed tokens, and moved to
  // their places by finish_gradients().
  if (!is_16_bit(problem_.dtype)) {
    return static_cast<T*>(problem_.grad_input) + tokens.begin * input_sum_stride();
  }
  // Blocks of kept chunks are finished one by one, before the sums of all other tokens begin.
  const int64_t kept = stored_tokens(*context_.request, plan_);
  const bool one_block = !sums_of_all_tokens_ || tokens.begin < kept;
  return at<T>(layout_.input_step.sum) +
         (one_block ? 0 : (tokens.begin - kept) * input_sum_stride());
}

template <class T>
int64_t CpuBackend<T>::input_sum_stride() const {
  return is_16_bit(problem_.dtype) ? sum_stride(problem_.features) : problem_.features;
}

template <class T>
InputSums CpuBackend<T>::input_sums(Range tokens) {
  T* const sums = input_sum(tokens);
  const int64_t count = tokens.size() * input_sum_stride();
  if (problem_.vocab == 0) std::fill_n(sums, count, T{0});
  if (!rounds_sums()) return {sums, accumulation_dtype(problem_.dtype), count};
  // In place: number i never lands on one that is still to be read.
  auto* const bytes = reinterpret_cast<char*>(sums);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t rounded = bf16_bits(static_cast<float>(sums[i]));
    std::memcpy(bytes + i * 2, &rounded, 2);
  }
  return {sums, DType::kBFloat16, count};
}

template <class T>
void CpuBackend<T>::widen_sums(Range tokens) {
  T* const sums = input_sum(tokens);
  const auto* const bytes = reinterpret_cast<const char*>(sums);
  for (int64_t i = tokens.size() * input_sum_stride() - 1; i >= 0; --i) {
    BFloat16 rounded;
    std::memcpy(&rounded, bytes + i * 2, 2);
    sums[i] = to_arithmetic(rounded);
  }
}

template <class T>
void CpuBackend<T>::finish_grad_input(Range tokens) {
  if (rounds_sums()) widen_sums(tokens);
  if (!is_16_bit(problem_.dtype)) return;
  const T* sums = input_sum(tokens);
  const int64_t* rows = tokens_.rows() + tokens.begin;
  const T scale = static_cast<T>(tokens_.output_scale());
  dispatch(problem_.dtype, [&](auto* type) {
    auto* gradient = static_cast<decltype(type)>(problem_.grad_input);
    parallel_for(tokens.size(), row_grain(problem_.features), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = sums + i * input_sum_stride();
        auto* to = gradient + rows[i] * problem_.features;
        for (int64_t d = 0; d < problem_.features; ++d) store(to + d, from[d] * scale);
      }
    });
  });
}

template <class T>
void CpuBackend<T>::update_grad_weight(Range classes, WeightUpdate update) {
  const int64_t features = problem_.features;
  const int64_t stride = sum_stride(features);
  const T scale = static_cast<T>(tokens_.output_scale());
  dispatch(problem_.dtype, [&](auto* type) {
    using U = std::remove_pointer_t<decltype(type)>;
    U* gradient = static_cast<U*>(problem_.grad_weight);
    parallel_for(classes.size(), row_grain(features), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const T* sum = weight_sum() + i * stride;
        U* row = gradient + (classes.begin + i) * features;
        if (update == WeightUpdate::kWrite) {
          for (int64_t d = 0; d < features; ++d) store(row + d, sum[d] * scale);
        } else if constexpr (std::is_same_v<U, T>) {  // WeightUpdate::kAccumulate
          for (int64_t d = 0; d < features; ++d) row[d] += sum[d] * scale;
        } else if constexpr (std::is_same_v<U, BFloat16>) {
          const int64_t v = classes.begin + i;
          const bool read = reads_gradient(update);
          const bool round = is_final(update);
          auto* const bits = reinterpret_cast<uint16_t*>(row);
          if (plan_.accumulation == Accumulation::kCompact) {
            const int64_t blocks = ceil_div(features, kCompactBlock);
            update_compact_row(sum, scale, features, read, round, bits,
                               at<uint8_t>(layout_.exponents) + v * blocks);
          } else {
            update_fp32_row(sum, scale, features, read, round, bits,
                            at<uint16_t>(layout_.remainder) + v * features);
          }
        }
      }
    });
  });
}

template <class T>
void CpuBackend<T>::finish_gradients() {
  if (problem_.grad_bias != nullptr) {
    // The bias is added before the scale of the logits, like the product: the same factor.
    for (int64_t v = 0; v < problem_.vocab; ++v) {
      store(problem_.dtype, problem_.grad_bias, v, bias_sum_[v] * tokens_.output_scale());
    }
  }
  if (problem_.grad_weight != nullptr && tokens_.count() == 0) {
    const int64_t bytes = problem_.vocab * problem_.features * size_of(problem_.dtype);
    std::memset(problem_.grad_weight, 0, static_cast<size_t>(bytes));
  }
  if (problem_.grad_input == nullptr || tokens_.count() == problem_.tokens) return;
  // Tokens left out get zeros. Dense rows move backwards: a row never lands before its source.
  const int64_t bytes = problem_.features * size_of(problem_.dtype);
  char* gradient = static_cast<char*>(problem_.grad_input);
  int64_t next = tokens_.count() - 1;
  for (int64_t n = problem_.tokens - 1; n >= 0; --n) {
    const bool processed = next >= 0 && tokens_.rows()[next] == n;
    if (!processed) {
      std::memset(gradient + n * bytes, 0, static_cast<size_t>(bytes));
    } else {
      if (!is_16_bit(problem_.dtype) && next != n) {
        std::memcpy(gradient + n * bytes, gradient + next * bytes, static_cast<size_t>(bytes));
      }
      --next;
    }
  }
}

template <class T>
ScoreBlock CpuBackend<T>::block_in_gradient() {
  ScoreBlock block;
  block.data = problem_.grad_weight;
  block.stride = tokens_in_gradient_row(*context_.request, score_bytes(*context_.request));
  if (context_.request->bf16_kernels) {
    block.maxima = at<T>(layout_.kept_maxima);
    block.maxima_stride = round_up(plan_.stored_in_gradient, kPanel);
  }
  return block;
}

template <class T>
ScoreBlock CpuBackend<T>::block_in_workspace() {
  ScoreBlock block;
  block.data = at<char>(layout_.scores);
  block.stride = round_up(plan_.chunk_tokens, kPanel);
  if (context_.request->bf16_kernels) {
    // Chunks take turns, but under vocab slices the one in grad_weight stays alive at the same time.
    const bool both_live = plan_.kind == PlanKind::kVocabSlices;
    block.maxima =
        at<T>(layout_.kept_maxima) + (both_live ? ceil_div(problem_.vocab, kTileVocab) *
                                                      round_up(plan_.stored_in_gradient, kPanel)
                                                : 0);
    block.maxima_stride = block.stride;
  }
  return block;
}

template <class T>
ScoreBlock CpuBackend<T>::slice_block(int64_t) {
  ScoreBlock block;
  block.data = at<char>(layout_.score_slice);
  block.stride = plan_.token_block;
  if (context_.request->bf16_kernels) {
    block.maxima = tokens_.partial(kMaximum, 0);
    block.maxima_stride = plan_.token_block;
  }
  return block;
}

template class CpuBackend<float>;
template class CpuBackend<double>;

}  // namespace memeff
