#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>

#include "core/math.h"
#include "cuda/call_memory.h"
#include "cuda/fused_kernels.h"
#include "cuda/generic_kernels.h"
#include "cuda/plan_sizes.h"
#include "cuda/runtime.h"

namespace memeff::cuda {
namespace {

Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.columns, m.rows, m.column_stride, m.row_stride};
}

FusedKernels kernels_of(const KernelSet& kernels) {
  return fused_kernels(*kernels.architecture, kernels.cluster);
}

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(const CudaContext& context)
      : problem_(*context.problem),
        request_(context.call->request),
        plan_(context.call->plan),
        traits_(context.call->traits),
        memory_(problem_, request_, plan_, traits_, context.workspace),
        tokens_(memory_.tokens()),
        stream_(context.stream),
        fused_(traits_.kernels.scores.fused()),
        handwritten_(traits_.kernels.products.fused()),
        places_(rank_numbers(problem_, request_.statistics_known)),
        writes_gradients_(writes_gradients(traits_)),
        writes_input_(writes_input(request_, traits_)),
        masks_rows_(handwritten_ && request_.grad_weight && !traits_.copies_input &&
                    problem_.probabilities == nullptr),
        scores_(kernels_of(traits_.kernels.scores)),
        products_(kernels_of(traits_.kernels.products)),
        sum_dtype_(accumulation_dtype(problem_.dtype)),
        classes_per_range_(classes_per_range(traits_)) {
    convert_class_arrays();
    // The terms are those of any block.
    reads_scores_ = plan_.products_from_scores && products_.accepts_scores(score_gradient({}, {}));
  }

  int64_t select_tokens() override {
    check(prepare_tokens(problem_, tokens_, stream_));
    return problem_.tokens;
  }

  void scores(Range tokens, const ScoreBlock* block) override {
    last_partials_ = memory_.partial_statistics(tokens, block, classes_per_range_);
    last_block_ = block == nullptr ? ScoreBlock{} : *block;
    if (problem_.vocab == 0) return;  // of a rank without classes
    void* target_logit = memory_.target_logit(tokens);
    if (fused_) {
      const StoredScores kept =
          block == nullptr ? StoredScores{} : CallMemory::stored_scores(*block);
      const Range all{0, problem_.vocab};
      check(scores_.linear_statistics(
          {shape_of(all, tokens), memory_.linear_operands(tokens, 0), terms_,
           memory_.targets(tokens), last_partials_, static_cast<float*>(target_logit), kept},
          stream_));
      return;
    }
    const bool keeps_products = block != nullptr && !traits_.keeps_16_bits;
    const int64_t step = keeps_products ? problem_.vocab : plan_.slice_vocab;
    for (int64_t begin = 0; begin < problem_.vocab; begin += step) {
      const Range classes{begin, std::min(begin + step, problem_.vocab)};
      const ScoreBlock to = keeps_products ? *block : memory_.product_block(tokens.size());
      const Block shape = shape_of(classes, tokens);
      const Targets targets = memory_.targets(tokens);
      const PartialStatistics partials =
          memory_.advanced(last_partials_, begin / classes_per_range_);
      compute_scores(classes, tokens, to);
      if (traits_.keeps_16_bits) {
        const ScoreBlock kept = block == nullptr ? ScoreBlock{} : memory_.part(*block, begin, 0);
        check(keep_scores({shape, static_cast<const float*>(to.data), to.stride, terms_, targets,
                           partials, static_cast<float*>(target_logit), kept.data, kept.stride},
                          stream_));
      } else {
        check(block_statistics({shape, to.data, to.stride, sum_dtype_, terms_, targets,
                                classes_per_range_, partials, target_logit, token_scale(tokens)},
                               stream_));
      }
    }
  }

  void merge_statistics(Range tokens) override {
    const int64_t ranges = ceil_div(problem_.vocab, classes_per_range_);
    check(cuda::merge_statistics(problem_, tokens_, tokens.begin, tokens.end, last_partials_,
                                 ranges, stream_));
    if (problem_.shard == nullptr) statistics_are_known(tokens);
  }

  SharedNumbers shared_numbers(Shared what, Range tokens) override {
    SharedNumbers numbers{memory_.own_numbers(), memory_.all_numbers(), 0};
    if (what == Shared::kTotals) {
      if (problem_.class_weight == nullptr) return numbers;
      numbers.count = kTotals;
      check(say_totals(problem_, tokens_, memory_.own_numbers(), stream_));
      return numbers;
    }
    numbers.count = places_.count * tokens.size();
    if (numbers.count > 0)
      check(say_tokens(problem_, tokens_, places_, tokens.begin, tokens.end, memory_.own_numbers(),
                       stream_));
    return numbers;
  }

  void merge_ranks(Shared what, Range tokens) override {
    const int64_t ranks = problem_.shard->ranks;
    if (what == Shared::kTotals)
      return check(merge_totals(problem_, tokens_, memory_.all_numbers(), ranks, stream_));
    check(cuda::merge_ranks(problem_, tokens_, places_, tokens.begin, tokens.end,
                            memory_.all_numbers(), ranks, stream_));
    if (what == Shared::kStatistics) statistics_are_known(tokens);
    if (what == Shared::kTargetWeights) look_for_non_finite_rows(tokens);
  }

  InputSums input_sums(Range tokens) override {
    const InputSums sums{memory_.input_sum(tokens), sum_dtype_, tokens.size() * problem_.features};
    follows_writing_product_ = false;
    if (problem_.vocab == 0)
      check(fill_zeros(sums.data, sums.count * size_of(sum_dtype_), stream_));
    if (!traits_.rounds_sums) return sums;
    RowUpdate rounding = row_update(tokens.size());
    rounding.dtype = DType::kBFloat16;
    rounding.sums = sums.data;
    rounding.gradient = memory_.rounded_sums();
    rounding.scale = nullptr;
    check(update_rows(rounding, stream_));
    return {memory_.rounded_sums(), DType::kBFloat16, sums.count};
  }

  void differentiate_statistics(Range tokens) override {
    const TokenStatistics* statistics = problem_.token_statistics;
    if (statistics == nullptr || statistics->differentiate == nullptr) return;
    check(write_token_statistics(problem_, tokens_, tokens.begin, tokens.end, stream_));
    // The caller works on the same stream: nothing waits.
    statistics->differentiate(statistics->context, tokens.begin, tokens.end);
    check(cuda::restore_statistics(problem_, tokens_, tokens.begin, tokens.end, stream_));
    look_for_non_finite_rows(tokens);
  }

  void restore_statistics() override {
    check(cuda::restore_statistics(problem_, tokens_, 0, problem_.tokens, stream_));
    look_for_non_finite_rows({0, problem_.tokens});
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
    if (!fused_) {
      compute_scores(classes, tokens, block);
      return to_gradient(classes, tokens, block, add_bias);
    }
    const Block shape = shape_of(classes, tokens);
    BiasPartials bias;
    if (add_bias && problem_.grad_bias != nullptr) bias = memory_.bias_partials(tokens);
    check(scores_.linear_gradient(
        {shape, memory_.linear_operands(tokens, classes.begin), terms_, memory_.targets(tokens),
         memory_.coefficients(tokens), block.data, block.stride, marks_of(block), bias},
        stream_));
    if (bias.sums != nullptr)
      add_to_bias({classes.begin, classes.size(), ceil_div(tokens.size(), kBiasTokens)}, bias.sums,
                  bias.stride);
  }

  void to_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) override {
    if (reads_scores_) return;
    add_bias = add_bias && problem_.grad_bias != nullptr;
    const Block shape = shape_of(classes, tokens);
    BiasSums bias;
    if (add_bias && is_16_bit(problem_.dtype))
      bias = {static_cast<float*>(memory_.bias_sum()), memory_.bias_factors(tokens)};
    if (block.maxima != nullptr) {  // scores kept in 16 bits
      check(stored_gradient(
          {shape, CallMemory::stored_scores(block), problem_.dtype, terms_, memory_.targets(tokens),
           memory_.coefficients(tokens), tokens_.target_gradient + tokens.begin, bias},
          stream_));
    } else {
      check(block_gradient(
          {shape, block.data, block.stride, sum_dtype_, problem_.dtype, terms_,
           memory_.targets(tokens), memory_.coefficients(tokens), token_scale(tokens), bias},
          stream_));
    }
    if (add_bias && bias.sums == nullptr) add_to_bias(shape, block.data, block.stride);
  }

  void add_grad_input(Range classes, Range tokens, const ScoreBlock& block, bool first) override {
    const bool last = classes.end == problem_.vocab, alone = first && last;
    // Kept scores take one product.
    const bool compact = plan_.compact_input_sums && !alone;
    ProductTarget to;
    to.product = ProductOfGradient::kGradInput;
    to.rows = tokens, to.written = &tokens_written_;
    to.other = memory_.weight_rows(classes);
    to.sums = memory_.input_sum(tokens);
    to.update = input_update(tokens);
    if (compact) {
      to.update.split = memory_.split_sums_of_input(tokens.begin);
      to.update.update = split_update(first, last);
    }
    to.at_once = writes_input_ && (alone || compact);
    to.accumulate = !first && !compact;
    to.smooths = first;
    to.updates = compact;
    wrote_grad_input_ = to.at_once || compact;
    if (plan_.input_parts > 1) return grad_input_in_parts(to, classes, tokens, block);
    gradient_product(to, classes, tokens, block);
  }

  void finish_grad_input(Range tokens) override {
    if (traits_.rounds_sums) {
      const int64_t d = problem_.features;
      check(copy_rows({memory_.rounded_sums(), d, DType::kBFloat16, memory_.input_sum(tokens), d,
                       sum_dtype_, tokens.size(), d},
                      stream_));
    }
    // fp32 and fp64 gradients are their own sums.
    if (!is_16_bit(problem_.dtype) || wrote_grad_input_) return;
    check(update_rows(input_update(tokens), stream_));
  }

  void grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first, bool last,
                   WeightUpdate how) override {
    // Under vocab slices the parts of a slice may add up in the gradient's own memory.
    const bool parts = plan_.kind == PlanKind::kVocabSlices &&
                       plan_.accumulation == Accumulation::kCompact && !(first && last);
    ProductTarget to;
    to.product = ProductOfGradient::kGradWeight;
    to.rows = classes, to.written = &classes_written_;
    if (handwritten_) to.other = counted_input(tokens, first);  // else piece by piece
    to.sums = memory_.weight_sum();
    to.update = row_update(classes.size());
    to.update.sums = to.sums;
    to.update.gradient = memory_.grad_weight_row(classes.begin);
    to.update.split = memory_.split_sums_of_weight(classes.begin);
    to.update.update = parts ? split_update(first, last) : how;
    to.at_once = writes_gradients_ && ((first && last) || parts);
    to.accumulate = !first;
    to.smooths = true;
    to.updates = last;
    gradient_product(to, classes, tokens, block);
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
  void check(const Status& status) {
    if (!status.ok())
      throw std::runtime_error(std::string("memeff: ") + status.message + ", with " +
                               in_words(traits_.kernels) + way_out());
    follows_writing_product_ = false;
  }

  std::string way_out() const {
    return fused_ || handwritten_
               ? "; MEMEFF_CUDA_KERNELS=generic,generic runs without handwritten products"
               : "";
  }

  static Block shape_of(Range classes, Range tokens) {
    return {classes.begin, classes.size(), tokens.size()};
  }
  TileMarks marks_of(const ScoreBlock& block) const {
    // A rank leaves out no more than its share of the classes.
    const double share =
        static_cast<double>(problem_.vocab) / static_cast<double>(total_vocab(problem_));
    return {static_cast<uint8_t*>(block.tiles), block.tiles_stride, problem_.skip_mass * share,
            problem_.vocab};
  }

  /// Coefficients are known, if they follow from the statistics of a block.
  void statistics_are_known(Range tokens) {
    if (last_block_.tiles != nullptr && problem_.vocab > 0)
      check(mark_tiles(problem_, tokens_, tokens.begin, tokens.end, last_partials_,
                       marks_of(last_block_), stream_));
    look_for_non_finite_rows(tokens);
  }

  // ---- gradient products ----

  /// What the products that may overlap the next one have written of a gradient.
  struct Written {
    int64_t end = 0;                     // of its rows
    const uint8_t* exponents = nullptr;  // of the last one's compact sums
  };

  /// Where a gradient product goes: rows of grad_input or of grad_weight.
  struct ProductTarget {
    ProductOfGradient product = ProductOfGradient::kGradInput;
    Range rows;
    Written* written = nullptr;
    Matrix other{};  // operand of the linear layer
    void* sums = nullptr;
    RowUpdate update;         // how sums enter the gradient
    bool at_once = false;     // the product's epilogue does that; else it writes sums,
    bool accumulate = false;  // added to those of the products before it,
    bool smooths = false;     // and to label smoothing, if gradients of logits leave it out
    bool updates = false;     // then the sums are complete, and enter the gradient
    bool joins_sums = false;  // it may run while the product before it writes other sums
  };

  void gradient_product(const ProductTarget& to, Range classes, Range tokens,
                        const ScoreBlock& block) {
    if (handwritten_) {
      multiply_handwritten(to, classes, tokens, block);
    } else {
      multiply_by_library(to, classes, tokens, block);
    }
    if (to.updates && !to.at_once) check(update_rows(to.update, stream_));
  }

  void multiply_by_library(const ProductTarget& to, Range classes, Range tokens,
                           const ScoreBlock& block) {
    const auto gradient_of = [&](Range part) {
      const int64_t before = (part.begin - tokens.begin) * size_of(problem_.dtype);
      return Matrix{static_cast<const char*>(block.data) + before,
                    problem_.dtype,
                    classes.size(),
                    part.size(),
                    memory_.gradient_stride(block),
                    1};
    };
    if (to.product == ProductOfGradient::kGradInput)
      return gemm(transposed(gradient_of(tokens)), to.other, to.accumulate, to.sums,
                  problem_.features);
    const int64_t size = traits_.copies_input ? plan_.copied_tokens : tokens.size();
    for (int64_t begin = tokens.begin; begin < tokens.end; begin += size) {
      const Range part{begin, std::min(begin + size, tokens.end)};
      const bool first = !to.accumulate && begin == tokens.begin;
      gemm(gradient_of(part), counted_input(part, first), !first, to.sums, problem_.features);
    }
  }

  void multiply_handwritten(const ProductTarget& to, Range classes, Range tokens,
                            const ScoreBlock& block) {
    const bool of_input = to.product == ProductOfGradient::kGradInput;
    GradientProduct call{shape_of(classes, tokens), memory_.gradient_operands(block, to.other), {}};
    list_work(to.product, call.block, block, &call.operands);
    if (!of_input && masks_rows_)
      call.operands.mask = {memory_.input_factors(tokens), &tokens_.scalars->non_finite};
    ProductOutput& output = call.output;
    if (to.at_once) {
      output.gradient = to.update.gradient;
      output.gradient_stride = to.update.gradient_stride;
      output.split = to.update.split;
      output.update = to.update.update;
      output.scale = static_cast<const float*>(to.update.scale);
      output.scale_stride = to.update.scale_stride;
      if (!of_input && memory_.in_gradient(block))
        move_out_of_gradient(classes, tokens, &call.operands);
      output.overlaps_previous = overlaps_previous(to);
    } else {
      const bool smooths = traits_.smoothing_apart && to.smooths;
      if (smooths) add_smoothing(to, classes, tokens);
      output.sums = static_cast<float*>(to.sums);
      output.sums_stride = problem_.features;
      output.accumulate = to.accumulate || smooths;
      output.overlaps_previous = to.joins_sums;
    }
    // Only kept scores have maxima; other blocks hold gradients.
    if (reads_scores_ && block.maxima != nullptr) {
      const auto product =
          of_input ? products_.grad_input_from_scores : products_.grad_weight_from_scores;
      check(product(call, score_gradient(tokens, block), stream_));
    } else {
      const auto product = of_input ? products_.grad_input_product : products_.grad_weight_product;
      check(product(call, stream_));
    }
    follows_writing_product_ = to.at_once;
  }

  /// Parts of the sum over classes (Plan::input_parts), each a product with sums of its own. They overlap,
  /// and read what was complete before the first of them.
  void grad_input_in_parts(ProductTarget to, Range classes, Range tokens, const ScoreBlock& block) {
    const int64_t each = round_up(ceil_div(classes.size(), plan_.input_parts), kStoredTile);
    to.at_once = false;
    to.update.part_stride = tokens.size() * problem_.features;
    to.update.parts = 0;
    for (int64_t begin = classes.begin; begin < classes.end; begin += each) {
      const Range part{begin, std::min(begin + each, classes.end)};
      to.other = memory_.weight_rows(part);
      to.joins_sums = to.update.parts > 0;
      multiply_handwritten(to, part, tokens, memory_.part(block, begin - classes.begin, 0));
      to.sums = static_cast<float*>(to.sums) + to.update.part_stride;
      ++to.update.parts;
    }
    check(update_rows(to.update, stream_));
  }

  /// Whether the product may overlap those launched just before: they write gradients at once, too,
  /// and other rows. What they read no product writes: a copy moves scores out of grad_weight, a launch in
  /// between. Slices of classes that share exponents (under vocab slices, where all have one buffer) do
  /// not overlap either: the launch that makes each slice's gradients keeps them apart.
  bool overlaps_previous(const ProductTarget& to) {
    const uint8_t* const exponents = to.update.split.exponents;
    const bool shares = exponents != nullptr && exponents == to.written->exponents;
    const bool overlaps = follows_writing_product_ && to.rows.begin >= to.written->end && !shares;
    if (!overlaps) tokens_written_ = classes_written_ = {};
    *to.written = {to.rows.end, exponents};
    return overlaps;
  }

  /// Bias and class weights in the accumulation type; sums of grad_bias that start at zero.
  void convert_class_arrays() {
    terms_.logit_scale = problem_.logit_scale;
    terms_.softcap = problem_.softcap;
    const auto convert = [&](const void* from, DType dtype, void* to) {
      if (from == nullptr || dtype == sum_dtype_) return from;
      const int64_t v = problem_.vocab;
      check(copy_rows({from, v, dtype, to, v, sum_dtype_, 1, v}, stream_));
      return static_cast<const void*>(to);
    };
    terms_.bias = convert(problem_.bias, problem_.dtype, memory_.bias());
    terms_.class_weight = convert(problem_.class_weight, DType::kFloat64, memory_.class_weight());
    if (problem_.grad_bias != nullptr)
      check(fill_zeros(memory_.bias_sum(), problem_.vocab * size_of(sum_dtype_), stream_));
  }

  /// u = x W^T of the generic kernels, into the block.
  void compute_scores(Range classes, Range tokens, const ScoreBlock& block) const {
    gemm(memory_.weight_rows(classes), transposed(memory_.input_rows(tokens)), false, block.data,
         block.stride);
  }

  const double* token_scale(Range tokens) const {
    return has_temperatures(problem_)
               ? problem_.token_statistics->inverse_temperature + tokens.begin
               : nullptr;
  }

  /// Sums of the accumulation type, of gradients or of their partial sums.
  void add_to_bias(const Block& shape, const void* gradient, int64_t stride) {
    check(add_bias_gradient(shape, gradient, stride, sum_dtype_, memory_.bias_sum(), stream_));
  }

  /// Products that leave rows of hidden states out by themselves (RowMask) learn whether they have to:
  /// whether those of a token without a gradient are not finite. Called once coefficients are known.
  void look_for_non_finite_rows(Range tokens) {
    if (!masks_rows_) return;
    const Matrix input = memory_.input_rows(tokens);
    check(find_non_finite_rows(
        {input.data, input.row_stride, problem_.dtype, memory_.input_factors(tokens), tokens.size(),
         problem_.features, &tokens_.scalars->non_finite},
        stream_));
  }

  /// The hidden states as grad_weight's product wants them: 0 times what is not finite is not 0, so
  /// products that cannot leave rows out get a copy with zeros for tokens without a gradient. It serves
  /// all slices of classes if there is room for all their tokens. `first`: of those of a slice.
  Matrix counted_input(Range tokens, bool first) {
    const Matrix input = memory_.input_rows(tokens);
    if (!traits_.copies_input) return input;
    const bool copied = tokens.begin >= copied_.begin && tokens.end <= copied_.end;
    if (!copied) {
      const bool appends = !first && tokens.begin == copied_.end &&
                           tokens.end - copied_.begin <= plan_.copied_tokens;
      copied_ = {appends ? copied_.begin : tokens.begin, tokens.end};
    }
    const Matrix copy =
        memory_.input_copy({tokens.begin - copied_.begin, tokens.end - copied_.begin});
    if (!copied)
      check(multiply_rows(
          {input.data, input.row_stride, problem_.dtype, memory_.input_factors(tokens),
           const_cast<void*>(copy.data), copy.row_stride, tokens.size(), problem_.features},
          stream_));
    return copy;
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
    check(make_work_list({product, shape.classes, shape.tokens, marks_of(block)},
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

  RowUpdate input_update(Range tokens) const {
    RowUpdate update = row_update(tokens.size());
    update.sums = memory_.input_sum(tokens);
    update.gradient = memory_.grad_input_row(tokens.begin);
    update.scale = memory_.input_scale(tokens.begin);
    update.scale_stride = memory_.scales_rows() ? 1 : 0;
    return update;
  }

  /// Gradients, or scores, that lie where their product will be written.
  void move_out_of_gradient(Range classes, Range tokens, GradientOperands* operands) {
    const int64_t stride = round_up(tokens.size(), CallMemory::kRowPadding);
    check(copy_rows({operands->gradient, operands->gradient_stride, problem_.dtype,
                     memory_.weight_copy(), stride, problem_.dtype, classes.size(), tokens.size()},
                    stream_));
    operands->gradient = memory_.weight_copy();
    operands->gradient_stride = stride;
  }

  /// The part of a gradient that label smoothing gives, a matrix of rank one, into the sums:
  /// weighted_n sum_v w_v W[v] of grad_input, w_v sum_n weighted_n x[n] of grad_weight.
  void add_smoothing(const ProductTarget& to, Range classes, Range tokens) {
    const bool of_input = to.product == ProductOfGradient::kGradInput;
    const auto* class_weight = static_cast<const float*>(terms_.class_weight);
    const float* token_weight = memory_.weighted(tokens);
    float* const row = of_input ? memory_.weight_row_sum() : memory_.input_row_sum();
    if (!of_input) {
      sum_rows(to.other, token_weight, row);
    } else if (!has_smoothing_row_) {
      sum_rows(memory_.weight_rows({0, problem_.vocab}), class_weight, row);
      has_smoothing_row_ = true;
    }
    const float* factors = of_input                  ? token_weight
                           : class_weight == nullptr ? nullptr
                                                     : class_weight + classes.begin;
    const int64_t features = problem_.features;
    check(outer_product({factors, row, static_cast<float*>(to.sums), features, to.rows.size(),
                         features, to.accumulate},
                        stream_));
  }
  void sum_rows(const Matrix& matrix, const float* factors, float* sums) {
    check(weighted_row_sum({matrix.data, matrix.row_stride, problem_.dtype, matrix.rows,
                            problem_.features, factors, sums},
                           stream_));
  }

  const Problem& problem_;
  const GpuPlanRequest& request_;
  const Plan& plan_;
  const PlanTraits& traits_;
  const CallMemory memory_;
  const TokenArrays& tokens_;
  void* const stream_;
  const bool fused_, handwritten_;  // scores with their epilogue in one kernel; gradient products
  const RankNumbers places_;        // of a vocabulary that ranks share
  const bool writes_gradients_;     // products may: label smoothing is not added to their sums
  const bool writes_input_;         // of grad_input: nor are sums added up over ranks
  const bool masks_rows_;           // grad_weight's product leaves out rows by itself
  const FusedKernels scores_, products_;
  const DType sum_dtype_;
  const int64_t classes_per_range_;  // of partial statistics
  LogitTerms terms_;
  bool reads_scores_ = false;  // kept scores go into the gradient products as they are
  bool wrote_grad_input_ = false;
  // For products that may overlap:
  bool follows_writing_product_ = false;
  Written tokens_written_, classes_written_;
  bool has_smoothing_row_ = false;
  Range copied_{0, 0};  // tokens whose hidden states counted_input() has copied
  // What the last scores() computed:
  PartialStatistics last_partials_;
  ScoreBlock last_block_;
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaContext& context) {
  return std::make_unique<CudaBackend>(context);
}

}  // namespace memeff::cuda
