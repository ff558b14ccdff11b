#include "cuda/call_memory.h"

#include <algorithm>

#include "core/compact_sum.h"
#include "core/math.h"
#include "core/planning.h"
#include "cuda/plan_sizes.h"

namespace memeff::cuda {

CallMemory::CallMemory(const Problem& problem, const GpuPlanRequest& request, const Plan& plan,
                       const PlanTraits& traits, char* workspace)
    : problem_(problem),
      request_(request),
      plan_(plan),
      traits_(traits),
      layout_(layout(request, traits, plan)),
      workspace_(workspace),
      keeps_16_bits_(traits.keeps_16_bits),
      sum_dtype_(accumulation_dtype(problem.dtype)) {
  place_token_arrays();
}

void CallMemory::place_token_arrays() {
  tokens_.vocab = total_vocab(problem_);
  tokens_.first_class = first_class(problem_);
  tokens_.shared = problem_.shard != nullptr;
  tokens_.scalars = place<CallScalars>(layout_.scalars);
  int64_t next = layout_.token_arrays;
  const auto take = [&](auto** array, bool wanted = true) {
    *array = nullptr;
    if (!wanted) return;
    *array = reinterpret_cast<std::remove_pointer_t<decltype(array)>>(workspace_ + next);
    next += problem_.tokens * 8;
  };
  const bool soft = problem_.probabilities != nullptr;
  take(&tokens_.target), take(&tokens_.lse), take(&tokens_.target_logit);
  take(&tokens_.target_dot, soft), take(&tokens_.target_mass), take(&tokens_.target_plain, soft);
  const TokenStatistics* wanted = problem_.token_statistics;
  tokens_.for_statistics = wanted != nullptr;
  if (wanted != nullptr) tokens_.wanted = *wanted;
  take(&tokens_.smooth, wants_logit_sum(problem_));
  take(&tokens_.entropy, wants_entropy(problem_));
  take(&tokens_.maximum, problem_.statistics || wanted != nullptr);
  take(&tokens_.argmax, wants_argmax(problem_));
  const bool entropy_has_gradient = wanted != nullptr && wanted->grad_entropy != nullptr;
  take(&tokens_.entropy_coefficient, entropy_has_gradient);
  take(&tokens_.centre, entropy_has_gradient);
  take(&tokens_.shift), take(&tokens_.softmax), take(&tokens_.target_coefficient);
  take(&tokens_.target_rest), take(&tokens_.weighted, reaches_all_classes(problem_));
  take(&tokens_.target_gradient, !request_.statistics_known);
  take(&tokens_.input_factor);
  take(&tokens_.input_scale, problem_.dtype == DType::kFloat16);
  tokens_.weighted_apart = traits_.smoothing_apart;
}

Targets CallMemory::targets(Range tokens) const {
  Targets targets;
  if (problem_.probabilities != nullptr) {
    const int64_t first = tokens.begin * problem_.probabilities_token_stride;
    targets.probabilities = static_cast<const char*>(problem_.probabilities) +
                            first * size_of(problem_.probabilities_dtype);
    targets.dtype = problem_.probabilities_dtype;
    targets.token_stride = problem_.probabilities_token_stride;
    targets.class_stride = problem_.probabilities_class_stride;
  } else {
    targets.index = tokens_.target + tokens.begin;
  }
  return targets;
}

Coefficients CallMemory::coefficients(Range tokens) const {
  Coefficients c;
  c.shift = from_token(tokens_.shift, tokens.begin);
  c.softmax = from_token(tokens_.softmax, tokens.begin);
  c.entropy = from_token(tokens_.entropy_coefficient, tokens.begin);
  c.centre = from_token(tokens_.centre, tokens.begin);
  c.target = from_token(tokens_.target_coefficient, tokens.begin);
  if (problem_.probabilities == nullptr)
    c.target_rest = from_token(tokens_.target_rest, tokens.begin);
  if (!traits_.smoothing_apart) c.weighted = from_token(tokens_.weighted, tokens.begin);
  return c;
}

void* CallMemory::target_logit(Range tokens) const {
  return problem_.probabilities != nullptr ? nullptr
                                           : from_token(tokens_.target_logit, tokens.begin);
}

PartialStatistics CallMemory::partial_statistics(Range tokens, const ScoreBlock* block,
                                                 int64_t range) const {
  const int64_t ranges = ceil_div(problem_.vocab, range);
  const int64_t stride = round_up(tokens.size(), kRowPadding);
  int64_t next = layout_.partials;
  const auto take = [&](int64_t bytes) {
    void* array = place<char>(next);
    next += round_up(ranges * stride * bytes, 256);
    return array;
  };
  const int64_t bytes = size_of(sum_dtype_);
  PartialStatistics partials;
  partials.stride = stride;
  if (keeps_16_bits_ && block != nullptr) {
    partials.max = block->maxima;
    partials.max_stride = block->maxima_stride;
  } else {
    partials.max = take(bytes);
    partials.max_stride = stride;
  }
  partials.sum = take(bytes);
  if (wants_entropy(problem_)) partials.entropy = take(bytes);
  if (wants_logit_sum(problem_)) partials.smooth = take(bytes);
  if (wants_argmax(problem_)) partials.argmax = static_cast<int32_t*>(take(4));
  if (problem_.probabilities != nullptr) {
    partials.target_dot = take(bytes);
    partials.target_mass = take(bytes);
    partials.target_plain = take(bytes);
  }
  return partials;
}

PartialStatistics CallMemory::advanced(PartialStatistics partials, int64_t first) const {
  const auto advance = [&](void* array, int64_t stride, int64_t bytes) -> void* {
    return array == nullptr ? nullptr : static_cast<char*>(array) + first * stride * bytes;
  };
  const int64_t bytes = size_of(sum_dtype_);
  partials.max = advance(partials.max, partials.max_stride, bytes);
  for (void** array : {&partials.sum, &partials.entropy, &partials.smooth, &partials.target_dot,
                       &partials.target_mass, &partials.target_plain})
    *array = advance(*array, partials.stride, bytes);
  partials.argmax = static_cast<int32_t*>(advance(partials.argmax, partials.stride, 4));
  return partials;
}

ScoreBlock CallMemory::block_in_gradient() const {
  ScoreBlock block;
  block.data = problem_.grad_weight;
  block.stride = tokens_in_gradient_row(request_, kept_score_bytes(request_, traits_));
  add_kept(&block, 0, plan_.stored_in_gradient);
  return block;
}

ScoreBlock CallMemory::block_in_workspace() const {
  const int64_t chunk = std::min(plan_.chunk_tokens, problem_.tokens - plan_.stored_in_gradient);
  ScoreBlock block;
  block.data = place<char>(layout_.scores);
  block.stride = round_up(chunk, kRowPadding);
  // Chunks take turns, but under vocab slices the one in grad_weight stays alive at the same time.
  const bool both_live = plan_.kind == PlanKind::kVocabSlices;
  add_kept(&block, both_live ? plan_.stored_in_gradient : 0, chunk);
  return block;
}

ScoreBlock CallMemory::slice_block(int64_t tokens) const {
  ScoreBlock block;
  block.data = place<char>(layout_.slice);
  block.stride = round_up(tokens, kRowPadding);
  if (traits_.skips) {
    block.tiles = place<uint8_t>(layout_.slice_tiles);
    block.tiles_stride = ceil_div(block.stride, kTokenTile);
  }
  return block;
}

ScoreBlock CallMemory::product_block(int64_t tokens) const {
  ScoreBlock block;
  block.data = place<char>(layout_.products);
  block.stride = round_up(tokens, kRowPadding);
  return block;
}

ScoreBlock CallMemory::part(const ScoreBlock& block, int64_t classes, int64_t tokens) const {
  ScoreBlock moved = block;
  moved.data = static_cast<char*>(block.data) +
               (classes * block.stride + tokens) * kept_score_bytes(request_, traits_);
  if (block.maxima != nullptr)
    moved.maxima =
        static_cast<float*>(block.maxima) + classes / kStoredTile * block.maxima_stride + tokens;
  if (block.tiles != nullptr)
    moved.tiles = static_cast<uint8_t*>(block.tiles) + classes / kStoredTile * block.tiles_stride +
                  tokens / kTokenTile;
  return moved;
}

/// Maxima and tiles of the kept scores of `count` tokens, `before` others before them.
void CallMemory::add_kept(ScoreBlock* block, int64_t before, int64_t count) const {
  const int64_t vocab_tiles = ceil_div(problem_.vocab, kStoredTile);
  if (keeps_16_bits_) {
    block->maxima = place<float>(layout_.kept_maxima) + vocab_tiles * round_up(before, kRowPadding);
    block->maxima_stride = round_up(count, kRowPadding);
  }
  if (traits_.skips) {
    block->tiles = place<uint8_t>(layout_.tiles) + vocab_tiles * ceil_div(before, kTokenTile);
    block->tiles_stride = ceil_div(count, kTokenTile);
  }
}

int64_t CallMemory::gradient_stride(const ScoreBlock& block) const {
  // Only scores that are kept in 16 bits have maxima.
  const bool products = !traits_.kernels.scores.fused() && block.maxima == nullptr;
  return products && is_16_bit(problem_.dtype)
             ? block.stride * size_of(sum_dtype_) / size_of(problem_.dtype)
             : block.stride;
}

bool CallMemory::in_gradient(const ScoreBlock& block) const {
  const auto* begin = static_cast<const char*>(problem_.grad_weight);
  const auto* data = static_cast<const char*>(block.data);
  return data >= begin &&
         data < begin + problem_.vocab * problem_.features * size_of(problem_.dtype);
}

LinearOperands CallMemory::linear_operands(Range tokens, int64_t first_class) const {
  LinearOperands operands;
  operands.input = at(problem_.input, tokens.begin * problem_.input_stride);
  operands.input_stride = problem_.input_stride;
  operands.weight = at(problem_.weight, first_class * problem_.weight_stride);
  operands.weight_stride = problem_.weight_stride;
  operands.features = problem_.features;
  operands.dtype = problem_.dtype;
  return operands;
}

GradientOperands CallMemory::gradient_operands(const ScoreBlock& block, const Matrix& other) const {
  GradientOperands operands;
  operands.gradient = block.data;
  operands.gradient_stride = gradient_stride(block);
  operands.other = other.data;
  operands.other_stride = other.row_stride;
  operands.features = problem_.features;
  operands.dtype = problem_.dtype;
  return operands;
}

SplitSums CallMemory::split_sums_of_weight(int64_t label) const {
  SplitSums split;
  if (plan_.accumulation == Accumulation::kCompact) {
    split.exponents_stride = compact_exponent_stride(problem_.features);
    // Slices take turns.
    const int64_t row = plan_.kind == PlanKind::kTokenChunks ? label : 0;
    split.exponents = place<uint8_t>(layout_.exponents) + row * split.exponents_stride;
  } else {
    split.remainder_stride = problem_.features;
    split.remainder = place<uint16_t>(layout_.remainder) + label * split.remainder_stride;
  }
  return split;
}

SplitSums CallMemory::split_sums_of_input(int64_t token) const {
  SplitSums split;
  split.exponents_stride = compact_exponent_stride(problem_.features);
  split.exponents = place<uint8_t>(layout_.input_exponents) +
                    (token - kept_tokens(request_, plan_)) * split.exponents_stride;
  return split;
}

void* CallMemory::input_sum(Range tokens) const {
  if (!is_16_bit(problem_.dtype)) return grad_input_row(tokens.begin);
  const bool of_all = plan_.kind == PlanKind::kVocabSlices && problem_.grad_weight != nullptr &&
                      !plan_.separate_sweeps && !plan_.compact_input_sums;
  // Blocks of kept tokens are finished one by one, before the sums of all others begin.
  const int64_t kept = kept_tokens(request_, plan_);
  const int64_t row = of_all && tokens.begin >= kept ? tokens.begin - kept : 0;
  return place<float>(layout_.input_sum) + row * problem_.features;
}

}  // namespace memeff::cuda
