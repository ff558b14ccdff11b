#include "cuda/cuda_backend.h"

#include <cstddef>
#include <stdexcept>
#include <string>

#include "core/tiling.h"
#include "cuda/call_memory.h"
#include "cuda/fused_kernels.h"
#include "cuda/runtime.h"

namespace memeff::cuda {
namespace {

void throw_unless_accepted(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string("memeff: ") + status.message);
}

FusedKernels kernels_of(const KernelSet& kernels) {
  return fused_kernels(*kernels.architecture, kernels.cluster);
}

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(const CudaContext& context)
      : problem_(*context.problem),
        request_(*context.request),
        plan_(*context.plan),
        traits_(plan_traits(problem_, request_, context.kernels)),
        memory_(problem_, request_, plan_, traits_, context.workspace),
        tokens_(memory_.tokens()),
        stream_(context.stream),
        fused_(traits_.kernels.stores_16_bits()),
        handwritten_(traits_.kernels.products.fused()),
        apart_(traits_.smoothing_apart),
        scores_(kernels_of(traits_.kernels.scores)),
        products_(kernels_of(traits_.kernels.products)),
        sum_dtype_(accumulation_dtype(problem_.dtype)) {
    convert_class_arrays();
    // The terms are those of any block.
    multiplies_scores_ =
        plan_.products_from_scores && products_.accepts_scores(score_gradient({}, {}));
  }

  int64_t select_tokens() override {
    check(prepare_tokens(problem_, tokens_, stream_));
    return problem_.tokens;
  }

  void scores(Range tokens, const ScoreBlock* block) override {
    last_range_ = classes_per_range(request_, traits_, plan_, block != nullptr);
    last_partials_ = memory_.partial_statistics(tokens, block, last_range_);
    last_block_ = block == nullptr ? ScoreBlock{} : *block;
    void* target_logit = memory_.target_logit(tokens);
    if (fused_) {
      const Block shape{0, problem_.vocab, tokens.size()};
      const StoredScores kept =
          block == nullptr ? StoredScores{} : CallMemory::stored_scores(*block);
      check(scores_.linear_statistics(shape, memory_.linear_operands(tokens, 0), terms_,
                                      memory_.targets(tokens), last_range_, last_partials_,
                                      static_cast<float*>(target_logit), kept, stream_));
      return;
    }
    const int64_t step = block == nullptr ? plan_.slice_vocab : problem_.vocab;
    for (int64_t begin = 0; begin < problem_.vocab; begin += step) {
      const Range classes{begin, std::min(begin + step, problem_.vocab)};
      const ScoreBlock products = block == nullptr ? slice_block(tokens.size()) : *block;
      multiply_scores(classes, tokens, products);
      check(block_statistics({begin, classes.size(), tokens.size()}, products.data, products.stride,
                             sum_dtype_, terms_, memory_.targets(tokens), last_range_,
                             memory_.advanced(last_partials_, begin / last_range_), target_logit,
                             stream_));
    }
  }

  void merge_statistics(Range tokens) override {
    const int64_t ranges = ceil_div(problem_.vocab, last_range_);
    check(cuda::merge_statistics(problem_, tokens_, tokens.begin, tokens.end, last_partials_,
                                 ranges, stream_));
    if (last_block_.tiles != nullptr)
      check(mark_tiles(problem_, tokens_, tokens.begin, tokens.end, last_partials_,
                       problem_.skip_mass, static_cast<uint8_t*>(last_block_.tiles),
                       last_block_.tiles_stride, stream_));
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
      check(scores_.linear_gradient(shape, memory_.linear_operands(tokens, classes.begin), terms_,
                                    memory_.targets(tokens), memory_.coefficients(tokens),
                                    block.data, block.stride, static_cast<uint8_t*>(block.tiles),
                                    block.tiles_stride, problem_.skip_mass, problem_.vocab,
                                    stream_));
    } else {
      multiply_scores(classes, tokens, block);
      products_to_gradient(shape, tokens, block);
    }
    if (add_bias) add_to_bias(shape, block);
  }

  void to_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) override {
    if (multiplies_scores_) return;
    const Block shape{classes.begin, classes.size(), tokens.size()};
    if (fused_) {
      check(stored_gradient(shape, CallMemory::stored_scores(block), problem_.dtype, terms_,
                            memory_.targets(tokens), memory_.coefficients(tokens),
                            tokens_.target_gradient + tokens.begin, stream_));
    } else {
      products_to_gradient(shape, tokens, block);
    }
    if (add_bias) add_to_bias(shape, block);
  }

  void add_grad_input(Range classes, Range tokens, const ScoreBlock& block, bool first) override {
    const bool last = classes.end == problem_.vocab, alone = first && last;
    const Matrix weight = memory_.weight_rows(classes);
    // Kept scores take one product.
    const bool compact = plan_.compact_input_sums && !alone;
    RowUpdate update = input_update(tokens);
    if (compact) {
      update.split = memory_.split_sums_of_input(tokens.begin);
      update.update = split_update(first, last);
    }
    const bool at_once = handwritten_ && !apart_ && (alone || compact);
    wrote_grad_input_ = at_once || compact;
    if (!handwritten_) {
      const int64_t stride = memory_.gradient_stride(block);
      gemm({block.data, problem_.dtype, tokens.size(), classes.size(), 1, stride}, weight,
           !first && !compact, memory_.input_sum(tokens), problem_.features);
      if (compact) check(update_rows(update, stream_));
      return;
    }
    GradientOperands operands = memory_.gradient_operands(block, weight);
    const Block shape{classes.begin, classes.size(), tokens.size()};
    list_work(ProductOfGradient::kGradInput, shape, block, &operands);
    ProductOutput output;
    if (at_once) {
      output = written_by_product(update);
      output.beside = runs_beside(tokens, &tokens_written_);
    } else {
      output.sums = static_cast<float*>(memory_.input_sum(tokens));
      output.sums_stride = problem_.features;
      output.accumulate = (!first && !compact) || (first && apart_);
      if (first && apart_) start_with_smoothing(tokens);
    }
    check_product(
        holds_scores(block)
            ? products_.grad_input_from_scores(shape, operands, score_gradient(tokens, block),
                                               output, stream_)
            : products_.grad_input_product(shape.classes, shape.tokens, operands, output, stream_),
        at_once);
    if (compact && !at_once) check(update_rows(update, stream_));
  }

  void finish_grad_input(Range tokens) override {
    // fp32 and fp64 gradients are their own sums.
    if (!is_16_bit(problem_.dtype) || wrote_grad_input_) return;
    check(update_rows(input_update(tokens), stream_));
  }

  void grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first, bool last,
                   WeightUpdate how) override {
    const Matrix input = memory_.input_rows(tokens);
    RowUpdate update = row_update(classes.size());
    update.sums = memory_.weight_sum();
    update.gradient = memory_.grad_weight_row(classes.begin);
    // Under vocab slices the parts of a slice may add up in the gradient's own memory.
    const bool parts = plan_.kind == PlanKind::kVocabSlices &&
                       plan_.accumulation == Accumulation::kCompact && !(first && last);
    update.split = memory_.split_sums_of_weight(classes.begin);
    update.update = parts ? split_update(first, last) : how;
    if (!handwritten_) {
      gemm({block.data, problem_.dtype, classes.size(), tokens.size(),
            memory_.gradient_stride(block), 1},
           input, !first, memory_.weight_sum(), problem_.features);
      if (last) check(update_rows(update, stream_));
      return;
    }
    const bool at_once = ((first && last) || parts) && !apart_;
    GradientOperands operands = memory_.gradient_operands(block, input);
    const Block shape{classes.begin, classes.size(), tokens.size()};
    list_work(ProductOfGradient::kGradWeight, shape, block, &operands);
    ProductOutput output;
    if (at_once) {
      output = written_by_product(update);
      if (memory_.in_gradient(block)) move_out_of_gradient(classes, tokens, &operands);
      output.beside = runs_beside(classes, &classes_written_);
    } else {
      output.sums = static_cast<float*>(memory_.weight_sum());
      output.sums_stride = problem_.features;
      output.accumulate = !first || apart_;
      if (apart_) add_smoothing(classes, tokens, !first, output.sums);
    }
    check_product(
        holds_scores(block)
            ? products_.grad_weight_from_scores(shape, operands, score_gradient(tokens, block),
                                                output, stream_)
            : products_.grad_weight_product(shape.classes, shape.tokens, operands, output, stream_),
        at_once);
    if (last && !at_once) check(update_rows(update, stream_));
  }

  void finish_gradients() override {
    if (problem_.grad_bias == nullptr) return;
    RowUpdate update = row_update(1);
    update.sums = memory_.bias_sum();
    update.gradient = problem_.grad_bias;
    update.columns = update.sums_stride = update.gradient_stride = problem_.vocab;
    check(update_rows(update, stream_));
  }

  ScoreBlock block_in_gradient() override { return memory_.block_in_gradient(); }
  ScoreBlock block_in_workspace() override { return memory_.block_in_workspace(); }
  ScoreBlock slice_block(int64_t tokens) override { return memory_.slice_block(tokens); }
  ScoreBlock part(const ScoreBlock& block, int64_t classes, int64_t tokens) const override {
    return memory_.part(block, classes, tokens);
  }

 private:
  /// Of every launch but those of products that write gradients at once.
  void check(const Status& status) {
    throw_unless_accepted(status);
    follows_writing_product_ = false;
  }
  void check_product(const Status& status, bool at_once) {
    throw_unless_accepted(status);
    follows_writing_product_ = at_once;
  }
  /// Whether the product that will write these rows may run beside those launched just before: they
  /// write gradients at once, too, and other rows. What they read no product writes: scores leave
  /// grad_weight by a copy, a launch in between. `written` is the end of the rows so far.
  bool runs_beside(Range rows, int64_t* written) {
    const bool beside = follows_writing_product_ && rows.begin >= *written;
    if (!beside) tokens_written_ = classes_written_ = 0;
    *written = rows.end;
    return beside;
  }

  /// Bias and class weights in the accumulation type; sums of grad_bias that start at zero.
  void convert_class_arrays() {
    terms_.logit_scale = problem_.logit_scale;
    terms_.softcap = problem_.softcap;
    const auto convert = [&](const void* from, DType dtype, void* to) {
      if (from == nullptr || dtype == sum_dtype_) return from;
      check(copy_rows(from, problem_.vocab, dtype, to, problem_.vocab, sum_dtype_, 1,
                      problem_.vocab, stream_));
      return static_cast<const void*>(to);
    };
    terms_.bias = convert(problem_.bias, problem_.dtype, memory_.bias());
    terms_.class_weight = convert(problem_.class_weight, DType::kFloat64, memory_.class_weight());
    if (problem_.grad_bias != nullptr)
      check(fill_zeros(memory_.bias_sum(), problem_.vocab * size_of(sum_dtype_), stream_));
  }

  /// u = x W^T of the generic kernels, into the block.
  void multiply_scores(Range classes, Range tokens, const ScoreBlock& block) const {
    const Matrix x = memory_.input_rows(tokens);
    const Matrix x_transposed = {x.data, x.dtype, x.columns, x.rows, x.column_stride, x.row_stride};
    gemm(memory_.weight_rows(classes), x_transposed, false, block.data, block.stride);
  }

  void products_to_gradient(const Block& shape, Range tokens, const ScoreBlock& block) {
    check(block_gradient(shape, block.data, block.stride, sum_dtype_, problem_.dtype, terms_,
                         memory_.targets(tokens), memory_.coefficients(tokens), stream_));
  }

  void add_to_bias(const Block& shape, const ScoreBlock& block) {
    if (problem_.grad_bias == nullptr) return;
    check(add_bias_gradient(shape, block.data, memory_.gradient_stride(block), problem_.dtype,
                            memory_.bias_sum(), stream_));
  }

  /// Whether the products find kept scores, rather than gradients, in the block. Only kept scores
  /// have maxima.
  bool holds_scores(const ScoreBlock& block) const {
    return multiplies_scores_ && block.maxima != nullptr;
  }
  ScoreGradient score_gradient(Range tokens, const ScoreBlock& block) const {
    const StoredScores scores = CallMemory::stored_scores(block);
    return {scores.maxima,
            scores.maxima_stride,
            terms_,
            memory_.targets(tokens),
            memory_.coefficients(tokens),
            tokens_.target_gradient + tokens.begin};
  }

  /// What the product has to do where the block's tiles are marked.
  void list_work(ProductOfGradient product, const Block& shape, const ScoreBlock& block,
                 GradientOperands* operands) {
    if (block.tiles == nullptr) return;
    check(make_work_list(product, shape.classes, shape.tokens,
                         static_cast<const uint8_t*>(block.tiles), block.tiles_stride,
                         memory_.work_list(), &operands->list, stream_));
  }

  /// Sums [rows, features] to the gradient, still without either.
  RowUpdate row_update(int64_t rows) const {
    RowUpdate update;
    update.dtype = problem_.dtype;
    update.rows = rows;
    update.columns = update.sums_stride = update.gradient_stride = problem_.features;
    update.scale = memory_.output_scale();
    return update;
  }

  /// Of one of several terms that add up in split sums.
  static WeightUpdate split_update(bool first, bool last) {
    return first  ? WeightUpdate::kSplitFirst
           : last ? WeightUpdate::kSplitLast
                  : WeightUpdate::kSplitNext;
  }
  RowUpdate input_update(Range tokens) const {
    RowUpdate update = row_update(tokens.size());
    update.sums = memory_.input_sum(tokens);
    update.gradient = memory_.grad_input_row(tokens.begin);
    return update;
  }
  /// The same update in a product's epilogue.
  static ProductOutput written_by_product(const RowUpdate& update) {
    ProductOutput output;
    output.gradient = update.gradient;
    output.gradient_stride = update.gradient_stride;
    output.split = update.split;
    output.update = update.update;
    output.scale = static_cast<const float*>(update.scale);
    return output;
  }

  /// Gradients, or scores, that lie where their product will be written.
  void move_out_of_gradient(Range classes, Range tokens, GradientOperands* operands) {
    const int64_t stride = round_up(tokens.size(), CallMemory::kRowPadding);
    check(copy_rows(operands->gradient, operands->gradient_stride, problem_.dtype,
                    memory_.weight_copy(), stride, problem_.dtype, classes.size(), tokens.size(),
                    stream_));
    operands->gradient = memory_.weight_copy();
    operands->gradient_stride = stride;
  }

  /// The part of grad_input that label smoothing gives: weighted_n sum_v w_v W[v].
  void start_with_smoothing(Range tokens) {
    if (!has_smoothing_row_) {
      const Matrix weight = memory_.weight_rows({0, problem_.vocab});
      check(weighted_row_sum(weight.data, weight.row_stride, problem_.dtype, problem_.vocab,
                             problem_.features, static_cast<const float*>(terms_.class_weight),
                             memory_.weight_row_sum(), stream_));
      has_smoothing_row_ = true;
    }
    check(outer_product(memory_.weighted(tokens), memory_.weight_row_sum(), tokens.size(),
                        problem_.features, false, static_cast<float*>(memory_.input_sum(tokens)),
                        problem_.features, stream_));
  }

  /// Likewise of grad_weight: w_v sum_n weighted_n x[n].
  void add_smoothing(Range classes, Range tokens, bool accumulate, float* sums) {
    const Matrix input = memory_.input_rows(tokens);
    check(weighted_row_sum(input.data, input.row_stride, problem_.dtype, tokens.size(),
                           problem_.features, memory_.weighted(tokens), memory_.input_row_sum(),
                           stream_));
    const auto* weights = static_cast<const float*>(terms_.class_weight);
    check(outer_product(weights == nullptr ? nullptr : weights + classes.begin,
                        memory_.input_row_sum(), classes.size(), problem_.features, accumulate,
                        sums, problem_.features, stream_));
  }

  const Problem& problem_;
  const PlanRequest& request_;
  const Plan& plan_;
  const PlanTraits traits_;
  const CallMemory memory_;
  const TokenArrays& tokens_;
  void* const stream_;
  const bool fused_, handwritten_;
  const bool apart_;  // label smoothing is added to the products of the gradients
  const FusedKernels scores_, products_;
  const DType sum_dtype_;
  LogitTerms terms_;
  bool multiplies_scores_ = false;  // kept scores go into the products as they are
  bool wrote_grad_input_ = false;
  // Of the products that may run beside one another:
  bool follows_writing_product_ = false;
  int64_t tokens_written_ = 0, classes_written_ = 0;
  bool has_smoothing_row_ = false;
  // Of the last scores():
  PartialStatistics last_partials_;
  int64_t last_range_ = 1;
  ScoreBlock last_block_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaContext& context) {
  return std::make_unique<CudaBackend>(context);
}

}  // namespace memeff::cuda
