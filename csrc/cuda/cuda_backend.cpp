#include "cuda/cuda_backend.h"

#include <cstddef>
#include <stdexcept>
#include <string>

#include "core/tiling.h"
#include "cuda/gemm.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "cuda/tokens.h"

namespace memeff::cuda {
namespace {

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string("memeff: ") + status.message);
}

/// The functions of a family of fused kernels.
struct FusedKernels {
  LinearStatistics* linear_statistics;
  LinearGradient* linear_gradient;
  GradientProduct *grad_input_product, *grad_weight_product;
};

FusedKernels kernels_of(Family family) {
  if (family == Family::kSm90)
    return {&sm90::linear_statistics, &sm90::linear_gradient, &sm90::grad_input_product,
            &sm90::grad_weight_product};
  return {&sm80::linear_statistics, &sm80::linear_gradient, &sm80::grad_input_product,
          &sm80::grad_weight_product};
}

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(const CudaContext& context)
      : problem_(*context.problem),
        request_(*context.request),
        plan_(*context.plan),
        traits_(plan_traits(problem_, request_, context.kernels)),
        layout_(cuda::layout(request_, traits_, plan_)),
        workspace_(context.workspace),
        stream_(context.stream),
        fused_(traits_.kernels.stores_16_bits()),
        handwritten_(traits_.kernels.products != Family::kGeneric),
        apart_(traits_.smoothing_apart),
        scores_(kernels_of(traits_.kernels.scores)),
        products_(kernels_of(traits_.kernels.products)),
        sum_dtype_(accumulation_dtype(problem_.dtype)) {
    place_token_arrays();
    place_class_arrays();
  }

  int64_t select_tokens() override {
    check(prepare_tokens(problem_, tokens_, stream_));
    return problem_.tokens;
  }

  void scores(Range tokens, const ScoreBlock* block) override {
    const int64_t range = classes_per_range(request_, traits_, plan_, block != nullptr);
    const PartialStatistics partials = partial_statistics(tokens, block, range);
    if (fused_) {
      const Block shape{0, problem_.vocab, tokens.size()};
      const StoredScores kept = block == nullptr ? StoredScores{} : stored_scores(*block);
      check(scores_.linear_statistics(shape, linear_operands(tokens, 0), terms_, targets(tokens),
                                      range, partials, target_logit(tokens), kept, stream_));
      return;
    }
    const int64_t step = block == nullptr ? plan_.slice_vocab : problem_.vocab;
    for (int64_t begin = 0; begin < problem_.vocab; begin += step) {
      const Range classes{begin, std::min(begin + step, problem_.vocab)};
      const ScoreBlock products = block == nullptr ? slice_block() : *block;
      multiply_scores(classes, tokens, products);
      check(block_statistics({begin, classes.size(), tokens.size()}, products.data, products.stride,
                             sum_dtype_, terms_, targets(tokens), range,
                             advanced(partials, begin / range), target_logit_any(tokens), stream_));
    }
  }

  void merge_statistics(Range tokens) override {
    const bool kept = tiles_of_scores_ != nullptr;
    const int64_t ranges = ceil_div(problem_.vocab, last_range_);
    check(cuda::merge_statistics(problem_, tokens_, tokens.begin, tokens.end, last_partials_,
                                 ranges, stream_));
    if (kept)
      check(mark_tiles(problem_, tokens_, tokens.begin, tokens.end, last_partials_,
                       problem_.skip_mass, tiles_of_scores_, tiles_stride_, stream_));
  }

  void differentiate_statistics(Range tokens) override {
    const TokenStatistics* statistics = problem_.token_statistics;
    if (statistics == nullptr || statistics->differentiate == nullptr) return;
    check(write_token_statistics(problem_, tokens_, tokens.begin, tokens.end, stream_));
    // The caller works on the same stream: nobody waits.
    statistics->differentiate(statistics->context, tokens.begin, tokens.end);
    check(cuda::restore_statistics(problem_, tokens_, tokens.begin, tokens.end, stream_));
  }

  void restore_statistics() override {
    check(cuda::restore_statistics(problem_, tokens_, 0, problem_.tokens, stream_));
  }

  void write_loss() override {
    const TokenStatistics* statistics = problem_.token_statistics;
    if (statistics == nullptr) {
      check(cuda::write_loss(problem_, tokens_, stream_));
    } else if (statistics->differentiate == nullptr) {
      // With gradients in the forward pass they have been written chunk by chunk.
      check(write_token_statistics(problem_, tokens_, 0, problem_.tokens, stream_));
    }
  }

  void fresh_gradient(Range classes, Range tokens, const ScoreBlock& block,
                      bool add_bias) override {
    const Block shape{classes.begin, classes.size(), tokens.size()};
    if (fused_) {
      check(scores_.linear_gradient(shape, linear_operands(tokens, classes.begin), terms_,
                                    targets(tokens), coefficients(tokens), block.data, block.stride,
                                    static_cast<uint8_t*>(block.tiles), block.tiles_stride,
                                    problem_.skip_mass, problem_.vocab, stream_));
    } else {
      multiply_scores(classes, tokens, block);
      check(block_gradient(shape, block.data, block.stride, sum_dtype_, problem_.dtype, terms_,
                           targets(tokens), coefficients(tokens), stream_));
    }
    if (add_bias) add_to_bias(shape, block);
  }

  void to_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) override {
    const Block shape{classes.begin, classes.size(), tokens.size()};
    if (fused_) {
      const auto* target_gradient = tokens_.target_gradient + tokens.begin;
      check(stored_gradient(shape, stored_scores(block), problem_.dtype, terms_, targets(tokens),
                            coefficients(tokens), target_gradient, stream_));
    } else {
      check(block_gradient(shape, block.data, block.stride, sum_dtype_, problem_.dtype, terms_,
                           targets(tokens), coefficients(tokens), stream_));
    }
    if (add_bias) add_to_bias(shape, block);
  }

  void add_grad_input(Range classes, Range tokens, const ScoreBlock& block, bool first) override {
    const bool last = classes.end == problem_.vocab;
    if (!handwritten_) {
      const int64_t stride = gradient_stride(block);
      gemm({block.data, problem_.dtype, tokens.size(), classes.size(), 1, stride},
           rows_of(problem_.weight, problem_.weight_stride, classes), !first, input_sum(tokens),
           problem_.features);
      return;
    }
    ProductOutput output;
    wrote_grad_input_ = first && last && !apart_;
    if (wrote_grad_input_) {
      output.gradient = grad_input_row(tokens.begin);
      output.gradient_stride = problem_.features;
      output.scale = &tokens_.scalars->output_scale_float;
    } else {
      output.sums = static_cast<float*>(input_sum(tokens));
      output.sums_stride = problem_.features;
      output.accumulate = !first || apart_;
      if (first && apart_) start_with_smoothing(tokens);
    }
    check(products_.grad_input_product(
        classes.size(), tokens.size(),
        gradient_operands(block, at(problem_.weight, classes.begin * problem_.weight_stride),
                          problem_.weight_stride),
        output, stream_));
  }

  void finish_grad_input(Range tokens) override {
    // fp32 and fp64 gradients are their own sums.
    if (!is_16_bit(problem_.dtype) || wrote_grad_input_) return;
    RowUpdate update;
    update.sums = input_sum(tokens);
    update.sums_stride = problem_.features;
    update.gradient = grad_input_row(tokens.begin);
    update.gradient_stride = problem_.features;
    update.dtype = problem_.dtype;
    update.rows = tokens.size();
    update.columns = problem_.features;
    update.scale = output_scale();
    check(update_rows(update, stream_));
  }

  void grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first, bool last,
                   WeightUpdate how) override {
    const void* x = at(problem_.input, tokens.begin * problem_.input_stride);
    void* rows = at(problem_.grad_weight, classes.begin * problem_.features);
    auto* remainder = place<uint16_t>(layout_.remainder) + classes.begin * problem_.features;
    if (handwritten_ && first && last && !apart_) {
      ProductOutput output;
      output.gradient = rows;
      output.gradient_stride = problem_.features;
      output.remainder = remainder;
      output.remainder_stride = problem_.features;
      output.update = how;
      output.scale = &tokens_.scalars->output_scale_float;
      GradientOperands operands = gradient_operands(block, x, problem_.input_stride);
      if (in_gradient(block)) move_out_of_gradient(classes, tokens, &operands);
      check(
          products_.grad_weight_product(classes.size(), tokens.size(), operands, output, stream_));
      return;
    }
    void* sum = place<char>(layout_.weight_sum);
    if (handwritten_) {
      ProductOutput output;
      output.sums = static_cast<float*>(sum);
      output.sums_stride = problem_.features;
      output.accumulate = !first || apart_;
      if (apart_) add_smoothing(classes, tokens, !first, output.sums);
      check(products_.grad_weight_product(classes.size(), tokens.size(),
                                          gradient_operands(block, x, problem_.input_stride),
                                          output, stream_));
    } else {
      gemm({block.data, problem_.dtype, classes.size(), tokens.size(), gradient_stride(block), 1},
           rows_of(problem_.input, problem_.input_stride, tokens), !first, sum, problem_.features);
    }
    if (!last) return;
    RowUpdate update;
    update.sums = sum;
    update.sums_stride = problem_.features;
    update.gradient = rows;
    update.gradient_stride = problem_.features;
    update.remainder = remainder;
    update.remainder_stride = problem_.features;
    update.dtype = problem_.dtype;
    update.rows = classes.size();
    update.columns = problem_.features;
    update.update = how;
    update.scale = output_scale();
    check(update_rows(update, stream_));
  }

  void finish_gradients() override {
    if (problem_.grad_bias == nullptr) return;
    RowUpdate update;
    update.sums = place<char>(layout_.bias_sum);
    update.gradient = problem_.grad_bias;
    update.dtype = problem_.dtype;
    update.rows = 1;
    update.columns = problem_.vocab;
    update.sums_stride = update.gradient_stride = problem_.vocab;
    update.scale = output_scale();
    check(update_rows(update, stream_));
  }

  ScoreBlock block_in_gradient() override {
    ScoreBlock block;
    block.data = problem_.grad_weight;
    block.stride = tokens_in_gradient_row(request_, traits_);
    add_kept(&block, 0, plan_.stored_in_gradient);
    return block;
  }

  ScoreBlock block_in_workspace() override {
    const int64_t chunk = std::min(plan_.chunk_tokens, problem_.tokens - plan_.stored_in_gradient);
    ScoreBlock block;
    block.data = place<char>(layout_.scores);
    block.stride = round_up(chunk, kRowPadding);
    // Chunks take turns, but under vocab slices the one in grad_weight stays alive beside this one.
    const bool beside = plan_.kind == PlanKind::kVocabSlices;
    add_kept(&block, beside ? plan_.stored_in_gradient : 0, chunk);
    return block;
  }

  ScoreBlock slice_block() override {
    ScoreBlock block;
    block.data = place<char>(layout_.slice);
    block.stride = round_up(std::min(plan_.token_block, problem_.tokens), kRowPadding);
    if (traits_.skips) {
      block.tiles = place<uint8_t>(layout_.slice_tiles);
      block.tiles_stride = ceil_div(block.stride, kTokenTile);
    }
    return block;
  }

  ScoreBlock part(const ScoreBlock& block, int64_t classes, int64_t tokens) const override {
    ScoreBlock moved = block;
    moved.data = static_cast<char*>(block.data) +
                 (classes * block.stride + tokens) * kept_score_bytes(request_, traits_);
    if (block.maxima != nullptr)
      moved.maxima =
          static_cast<float*>(block.maxima) + classes / kStoredTile * block.maxima_stride + tokens;
    if (block.tiles != nullptr)
      moved.tiles = static_cast<uint8_t*>(block.tiles) +
                    classes / kStoredTile * block.tiles_stride + tokens / kTokenTile;
    return moved;
  }

 private:
  static constexpr int64_t kRowPadding = 8;

  template <class T>
  T* place(int64_t offset) const {
    return reinterpret_cast<T*>(workspace_ + offset);
  }
  /// Element `index` of an array of the problem's type.
  template <class Pointer>
  Pointer at(Pointer array, int64_t index) const {
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return array == nullptr ? array : static_cast<Byte*>(array) + index * size_of(problem_.dtype);
  }
  void* grad_input_row(int64_t token) const {
    return at(problem_.grad_input, token * problem_.features);
  }

  void place_token_arrays() {
    tokens_.scalars = place<CallScalars>(layout_.scalars);
    int64_t next = layout_.token_arrays;
    const auto take = [&](auto** array, bool wanted = true) {
      *array = nullptr;
      if (!wanted) return;
      *array = reinterpret_cast<std::remove_pointer_t<decltype(array)>>(workspace_ + next);
      next += problem_.tokens * 8;
    };
    const bool soft = problem_.probabilities != nullptr, smooths = problem_.label_smoothing > 0;
    take(&tokens_.target), take(&tokens_.lse), take(&tokens_.target_logit);
    take(&tokens_.target_dot, soft), take(&tokens_.target_mass), take(&tokens_.target_plain, soft);
    const TokenStatistics* wanted = problem_.token_statistics;
    tokens_.for_statistics = wanted != nullptr;
    if (wanted != nullptr) tokens_.wanted = *wanted;
    take(&tokens_.smooth, smooths), take(&tokens_.entropy, wants_entropy(problem_));
    take(&tokens_.maximum, problem_.statistics || wanted != nullptr);
    take(&tokens_.argmax, wants_argmax(problem_));
    take(&tokens_.entropy_coefficient, wanted != nullptr && wanted->grad_entropy != nullptr);
    take(&tokens_.shift), take(&tokens_.softmax), take(&tokens_.target_coefficient);
    take(&tokens_.target_rest), take(&tokens_.weighted, smooths);
    take(&tokens_.target_gradient, !request_.statistics_known);
    tokens_.weighted_apart = apart_;
  }

  void place_class_arrays() {
    terms_.logit_scale = problem_.logit_scale;
    terms_.softcap = problem_.softcap;
    const auto convert = [&](const void* from, DType dtype, int64_t offset) {
      if (from == nullptr || dtype == sum_dtype_) return from;
      void* to = place<char>(offset);
      check(copy_rows(from, problem_.vocab, dtype, to, problem_.vocab, sum_dtype_, 1,
                      problem_.vocab, stream_));
      return static_cast<const void*>(to);
    };
    terms_.bias = convert(problem_.bias, problem_.dtype, layout_.bias);
    terms_.class_weight = convert(problem_.class_weight, DType::kFloat64, layout_.class_weight);
    if (problem_.grad_bias != nullptr)
      check(
          fill_zeros(place<char>(layout_.bias_sum), problem_.vocab * size_of(sum_dtype_), stream_));
  }

  Targets targets(Range tokens) const {
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

  /// The part of a [tokens] array of the accumulation type that starts at token `begin`.
  void* from_token(void* array, int64_t begin) const {
    return array == nullptr ? nullptr : static_cast<char*>(array) + begin * size_of(sum_dtype_);
  }
  void* target_logit_any(Range tokens) const {
    return problem_.probabilities != nullptr ? nullptr
                                             : from_token(tokens_.target_logit, tokens.begin);
  }
  float* target_logit(Range tokens) const { return static_cast<float*>(target_logit_any(tokens)); }

  Coefficients coefficients(Range tokens) const {
    Coefficients c;
    c.shift = from_token(tokens_.shift, tokens.begin);
    c.softmax = from_token(tokens_.softmax, tokens.begin);
    c.entropy = from_token(tokens_.entropy_coefficient, tokens.begin);
    if (problem_.probabilities != nullptr) {
      c.target = from_token(tokens_.target_coefficient, tokens.begin);
    } else {
      c.target_rest = from_token(tokens_.target_rest, tokens.begin);
    }
    if (!apart_) c.weighted = from_token(tokens_.weighted, tokens.begin);
    return c;
  }

  /// Places the partial statistics of a block of tokens, and remembers them for merge_statistics.
  const PartialStatistics& partial_statistics(Range tokens, const ScoreBlock* block,
                                              int64_t range) {
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
    if (fused_ && block != nullptr) {
      partials.max = block->maxima;
      partials.max_stride = block->maxima_stride;
    } else {
      partials.max = take(bytes);
      partials.max_stride = stride;
    }
    partials.sum = take(bytes);
    if (wants_entropy(problem_)) partials.entropy = take(bytes);
    if (problem_.label_smoothing > 0) partials.smooth = take(bytes);
    if (wants_argmax(problem_)) partials.argmax = static_cast<int32_t*>(take(4));
    if (problem_.probabilities != nullptr) {
      partials.target_dot = take(bytes);
      partials.target_mass = take(bytes);
      partials.target_plain = take(bytes);
    }
    last_partials_ = partials;
    last_range_ = range;
    tiles_of_scores_ = block == nullptr ? nullptr : static_cast<uint8_t*>(block->tiles);
    tiles_stride_ = block == nullptr ? 0 : block->tiles_stride;
    return last_partials_;
  }

  /// The same from range `first` on.
  PartialStatistics advanced(PartialStatistics partials, int64_t first) const {
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

  LinearOperands linear_operands(Range tokens, int64_t first_class) const {
    LinearOperands operands;
    operands.input = at(problem_.input, tokens.begin * problem_.input_stride);
    operands.input_stride = problem_.input_stride;
    operands.weight = at(problem_.weight, first_class * problem_.weight_stride);
    operands.weight_stride = problem_.weight_stride;
    operands.features = problem_.features;
    operands.dtype = problem_.dtype;
    return operands;
  }

  Matrix rows_of(const void* matrix, int64_t stride, Range rows) const {
    return {
        at(matrix, rows.begin * stride), problem_.dtype, rows.size(), problem_.features, stride, 1};
  }

  /// u = x W^T of the generic kernels, into the block.
  void multiply_scores(Range classes, Range tokens, const ScoreBlock& block) const {
    const Matrix x_transposed = {at(problem_.input, tokens.begin * problem_.input_stride),
                                 problem_.dtype,
                                 problem_.features,
                                 tokens.size(),
                                 1,
                                 problem_.input_stride};
    gemm(rows_of(problem_.weight, problem_.weight_stride, classes), x_transposed, false, block.data,
         block.stride);
  }

  StoredScores stored_scores(const ScoreBlock& block) const {
    return {block.data, block.stride, static_cast<float*>(block.maxima), block.maxima_stride};
  }

  /// Elements between rows of gradients that lie where scores lay.
  int64_t gradient_stride(const ScoreBlock& block) const {
    const bool shrunk = !fused_ && is_16_bit(problem_.dtype);
    return shrunk ? block.stride * size_of(sum_dtype_) / size_of(problem_.dtype) : block.stride;
  }

  GradientOperands gradient_operands(const ScoreBlock& block, const void* other,
                                     int64_t other_stride) const {
    GradientOperands operands;
    operands.gradient = block.data;
    operands.gradient_stride = gradient_stride(block);
    operands.other = other;
    operands.other_stride = other_stride;
    operands.features = problem_.features;
    operands.dtype = problem_.dtype;
    operands.tiles = static_cast<const uint8_t*>(block.tiles);
    operands.tiles_stride = block.tiles_stride;
    return operands;
  }

  bool in_gradient(const ScoreBlock& block) const {
    const auto* begin = static_cast<const char*>(problem_.grad_weight);
    const auto* data = static_cast<const char*>(block.data);
    return data >= begin &&
           data < begin + problem_.vocab * problem_.features * size_of(problem_.dtype);
  }

  /// Gradients that lie where their product will be written.
  void move_out_of_gradient(Range classes, Range tokens, GradientOperands* operands) const {
    const int64_t stride = round_up(tokens.size(), kRowPadding);
    void* copy = place<char>(layout_.weight_copy);
    check(copy_rows(operands->gradient, operands->gradient_stride, problem_.dtype, copy, stride,
                    problem_.dtype, classes.size(), tokens.size(), stream_));
    operands->gradient = copy;
    operands->gradient_stride = stride;
  }

  void add_to_bias(const Block& shape, const ScoreBlock& block) const {
    if (problem_.grad_bias == nullptr) return;
    check(add_bias_gradient(shape, block.data, gradient_stride(block), problem_.dtype,
                            place<char>(layout_.bias_sum), stream_));
  }

  /// Maxima and tiles of the kept scores of `count` tokens, `before` others before them.
  void add_kept(ScoreBlock* block, int64_t before, int64_t count) const {
    const int64_t vocab_tiles = ceil_div(problem_.vocab, kStoredTile);
    if (fused_) {
      block->maxima =
          place<float>(layout_.kept_maxima) + vocab_tiles * round_up(before, kRowPadding);
      block->maxima_stride = round_up(count, kRowPadding);
    }
    if (traits_.skips) {
      block->tiles = place<uint8_t>(layout_.tiles) + vocab_tiles * ceil_div(before, kTokenTile);
      block->tiles_stride = ceil_div(count, kTokenTile);
    }
  }

  /// Sums of grad_input from tokens.begin on: the gradient itself when it has full precision.
  void* input_sum(Range tokens) const {
    if (!is_16_bit(problem_.dtype)) return grad_input_row(tokens.begin);
    const bool of_all = plan_.kind == PlanKind::kVocabSlices && problem_.grad_weight != nullptr &&
                        !plan_.separate_sweeps;
    const int64_t kept = plan_.stored_in_gradient + plan_.stored_chunks * plan_.chunk_tokens;
    // Blocks of kept tokens are finished one by one, before the sums of all others begin.
    const int64_t row = of_all && tokens.begin >= kept ? tokens.begin - kept : 0;
    return place<float>(layout_.input_sum) + row * problem_.features;
  }

  /// The part of grad_input that label smoothing gives: weighted_n sum_v w_v W[v].
  void start_with_smoothing(Range tokens) {
    auto* sum = place<float>(layout_.row_sums);
    if (!has_smoothing_row_) {
      check(weighted_row_sum(problem_.weight, problem_.weight_stride, problem_.dtype,
                             problem_.vocab, problem_.features,
                             static_cast<const float*>(terms_.class_weight), sum, stream_));
      has_smoothing_row_ = true;
    }
    check(outer_product(static_cast<const float*>(from_token(tokens_.weighted, tokens.begin)), sum,
                        tokens.size(), problem_.features, false,
                        static_cast<float*>(input_sum(tokens)), problem_.features, stream_));
  }

  /// Likewise of grad_weight: w_v sum_n weighted_n x[n].
  void add_smoothing(Range classes, Range tokens, bool accumulate, float* sums) const {
    auto* sum = place<float>(layout_.row_sums) + problem_.features;
    check(weighted_row_sum(at(problem_.input, tokens.begin * problem_.input_stride),
                           problem_.input_stride, problem_.dtype, tokens.size(), problem_.features,
                           static_cast<const float*>(from_token(tokens_.weighted, tokens.begin)),
                           sum, stream_));
    const auto* weights = static_cast<const float*>(terms_.class_weight);
    check(outer_product(weights == nullptr ? nullptr : weights + classes.begin, sum, classes.size(),
                        problem_.features, accumulate, sums, problem_.features, stream_));
  }

  const void* output_scale() const {
    if (!is_16_bit(problem_.dtype)) return nullptr;
    return &tokens_.scalars->output_scale_float;
  }

  const Problem& problem_;
  const PlanRequest& request_;
  const Plan& plan_;
  const PlanTraits traits_;
  const Layout layout_;
  char* const workspace_;
  void* const stream_;
  const bool fused_, handwritten_;
  const bool apart_;  // label smoothing is added to the products of the gradients
  const FusedKernels scores_, products_;
  const DType sum_dtype_;
  TokenArrays tokens_;
  LogitTerms terms_;
  bool wrote_grad_input_ = false;
  bool has_smoothing_row_ = false;
  // Of the last scores():
  PartialStatistics last_partials_;
  int64_t last_range_ = 1;
  uint8_t* tiles_of_scores_ = nullptr;
  int64_t tiles_stride_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaContext& context) {
  return std::make_unique<CudaBackend>(context);
}

}  // namespace memeff::cuda
