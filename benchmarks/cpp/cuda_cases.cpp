#include "cuda_cases.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>

#include "core/compact_sum.h"
#include "core/math.h"
#include "core/problem.h"
#include "cpu/number.h"
#include "cuda/fused_kernels.h"
#include "cuda/generic_kernels.h"
#include "cuda/tokens.h"

namespace memeff::bench {
namespace {

using namespace cuda;

/// Fused kernels that run here, with those of their products that read scores.
struct Family {
  std::string name;
  FusedKernels kernels;
};

constexpr int64_t kGenericTokens = 1024;  // whose stored products the planner keeps at a time
constexpr int64_t kGenericRange = 512;
constexpr double kSkipMass = 1e-3;
// A chunk whose grad_input leaves 40 of 132 multiprocessors idle half of the time, at 4096 features, and
// the classes of a slice of grad_weight (docs/kernels.md, "Overlapping products").
constexpr int64_t kPairTokens = 1792, kPairClasses = 4096;
// Codes and exponents of a gradient's element, read and written.
constexpr double kCompactBytes = 2 * (2 + 1.0 / kCompactBlock);

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

/// Tiles of gradients of which some are left out.
struct SomeTiles {
  std::string name;
  double share = 1;          // that counts
  uint8_t* marks = nullptr;  // [ranges, token tiles]
  WorkList of_input, of_weight;
};

/// Places the arrays of one shape, fills them, and lists the cases.
class Maker {
 public:
  Maker(const Shape& shape, DType dtype, int capability, Memory& memory,
        const LibraryProduct& product, void* stream)
      : n_(shape.tokens),
        d_(shape.features),
        v_(shape.vocab),
        stride_(round_up(shape.tokens, 8)),
        ranges_(ceil_div(shape.vocab, kStoredTile)),
        exponents_stride_(round_up(ceil_div(shape.features, kCompactBlock), 4)),
        dtype_(dtype),
        memory_(memory),
        product_(product),
        stream_(stream) {
    make_inputs();
    for (const KernelSet& one : all_kernel_sets())
      if (one.fused() && !one.reads_scores && one.architecture->can_run(problem_, {capability, ""}))
        families_.push_back({name_of(one), fused_kernels(*one.architecture, one.cluster)});
    make_tokens();
    make_blocks();
  }

  std::vector<Case> make() {
    linear_cases();
    product_cases();
    pair_cases();
    stored_cases();
    generic_cases();
    row_cases();
    return std::move(cases_);
  }

 private:
  // ---- data ----

  template <class T>
  T* place(int64_t count, const char* name) {
    return static_cast<T*>(memory_.allocate(count * static_cast<int64_t>(sizeof(T)), name,
                                            static_cast<int>(std::min<size_t>(sizeof(T), 8))));
  }
  uint16_t* place_16(int64_t count, const char* name) { return place<uint16_t>(count, name); }

  /// Normal numbers, the same million again and again.
  void fill(void* to, DType dtype, int64_t count, double deviation) {
    constexpr int64_t kPattern = (1 << 20) + 7;
    const int64_t length = std::min(count, kPattern), size = size_of(dtype);
    std::vector<char> pattern(static_cast<size_t>(length * size));
    std::normal_distribution<double> normal(0.0, deviation);
    for (int64_t i = 0; i < length; ++i) store(dtype, pattern.data(), i, normal(random_));
    for (int64_t done = 0; done < count; done += length)
      memory_.copy(static_cast<char*>(to) + done * size, pattern.data(),
                   std::min(length, count - done) * size);
  }

  void make_inputs() {
    x_ = place_16(n_ * d_, "x"), w_ = place_16(v_ * d_, "w");
    // Logits of deviation 3, as in memeff-bench.
    fill(x_, dtype_, n_ * d_, 1.0);
    fill(w_, dtype_, v_ * d_, 3.0 / std::sqrt(static_cast<double>(d_)));
    std::vector<int64_t> target(static_cast<size_t>(n_));
    for (int64_t& y : target) y = static_cast<int64_t>(random_() % static_cast<uint64_t>(v_));
    auto* const on_device = place<int64_t>(n_, "target");
    memory_.copy(on_device, target.data(), n_ * 8);
    problem_.tokens = n_, problem_.features = d_, problem_.vocab = v_, problem_.dtype = dtype_;
    problem_.input = x_, problem_.weight = w_, problem_.target = on_device;
    problem_.input_stride = problem_.weight_stride = d_;
    problem_.skip_mass = kSkipMass;
  }

  void make_tokens() {
    tokens_.vocab = v_;
    tokens_.scalars = place<CallScalars>(1, "scalars");
    tokens_.target = place<int64_t>(n_, "token targets");
    tokens_.lse = place<double>(n_, "lse");
    tokens_.target_logit = place<float>(n_, "target logit");
    tokens_.target_mass = place<double>(n_, "target mass");
    for (void** array :
         {&tokens_.shift, &tokens_.softmax, &tokens_.target_coefficient, &tokens_.target_rest})
      *array = place<float>(n_, "coefficients");
    tokens_.target_gradient = place<float>(n_, "target gradient");
    coefficients_.shift = tokens_.shift, coefficients_.softmax = tokens_.softmax;
    coefficients_.target = tokens_.target_coefficient;
    coefficients_.target_rest = tokens_.target_rest;
    targets_.index = tokens_.target;
    check(prepare_tokens(problem_, tokens_, stream_));
  }

  /// Scores, gradients and partial statistics as one step of training leaves them, by the first
  /// family that runs here; noise where none does.
  void make_blocks() {
    scores_ = place_16(v_ * stride_, "scores"), gradient_ = place_16(v_ * stride_, "gradients");
    scratch_ = place_16(v_ * stride_, "scratch");
    maxima_ = place<float>(ranges_ * stride_, "maxima");
    other_maxima_ = place<float>(ranges_ * stride_, "other maxima");
    partials_.max = maxima_, partials_.max_stride = partials_.stride = stride_;
    partials_.sum = place<float>(ranges_ * stride_, "sums");
    other_sums_ = place<float>(ranges_ * stride_, "other sums");
    tiles_ = place<uint8_t>(ranges_ * token_tiles(), "tiles");
    mark_some("a quarter of the tiles", [](int64_t, int64_t) { return 0.25; });
    // As a trained model leaves them: tiles of frequent classes count for most tokens, others for few,
    // and some tokens are less certain than others. A tenth in all.
    const double common = as_double(ranges_) / 30, sum = 1 + std::log(30.0);
    mark_some("peaked, a tenth of the tiles", [=](int64_t range, int64_t token_tile) {
      const double of_class = 3.5 / sum * std::min(1.0, common / (1.0 + as_double(range)));
      return of_class * (token_tile % 8 == 0 ? 4.5 : 0.5);
    });
    sums_ = place<float>(std::max(n_, v_) * d_, "sums of gradients");
    fill(sums_, DType::kFloat32, std::max(n_, v_) * d_, 1.0);
    result_ = place_16(std::max(n_, v_) * d_, "gradient of an operand");
    fill(result_, dtype_, std::max(n_, v_) * d_, 1.0);
    remainder_ = place_16(v_ * d_, "remainder");
    fill(remainder_, dtype_, v_ * d_, 1.0);
    const int64_t exponents = std::max(n_, v_) * exponents_stride_;
    compact_.exponents = place<uint8_t>(exponents, "exponents");
    compact_.exponents_stride = exponents_stride_;
    const std::vector<uint8_t> ones(static_cast<size_t>(exponents), 127);
    memory_.copy(compact_.exponents, ones.data(), exponents);

    if (families_.empty()) {
      fill(gradient_, dtype_, v_ * stride_, 1e-3);
      return;
    }
    check(families_[0].kernels.linear_statistics({block(),
                                                  linear(),
                                                  {},
                                                  targets_,
                                                  partials_,
                                                  static_cast<float*>(tokens_.target_logit),
                                                  kept(scores_)},
                                                 stream_));
    check(merge_statistics(problem_, tokens_, 0, n_, partials_, ranges_, stream_));
    memory_.copy(gradient_, scores_, v_ * stride_ * 2);
    check(stored_gradient(
        {block(), kept(gradient_), dtype_, {}, targets_, coefficients_, tokens_.target_gradient},
        stream_));
  }

  /// Marks each tile with the probability that is given.
  template <class Probability>
  void mark_some(const std::string& name, const Probability& probability) {
    std::uniform_real_distribution<double> uniform;
    std::vector<uint8_t> marks;
    for (int64_t range = 0; range < ranges_; ++range)
      for (int64_t tile = 0; tile < token_tiles(); ++tile)
        marks.push_back(uniform(random_) < probability(range, tile) ? 1 : 0);
    SomeTiles some;
    some.name = name;
    some.share = as_double(std::count(marks.begin(), marks.end(), 1)) / as_double(marks.size());
    some.marks = place<uint8_t>(ranges_ * token_tiles(), "some tiles");
    memory_.copy(some.marks, marks.data(), ranges_ * token_tiles());
    const TileMarks tiles = marks_at(some.marks);
    check(make_work_list({ProductOfGradient::kGradInput, v_, n_, tiles}, list_memory(),
                         &some.of_input, stream_));
    check(make_work_list({ProductOfGradient::kGradWeight, v_, n_, tiles}, list_memory(),
                         &some.of_weight, stream_));
    some_tiles_.push_back(some);
  }
  void* list_memory() {
    const int64_t bytes =
        std::max(work_list_bytes(token_tiles(), ranges_), work_list_bytes(ranges_, token_tiles()));
    return place<int32_t>(bytes / 4, "work list");
  }

  TileMarks marks_at(uint8_t* tiles) const { return {tiles, token_tiles(), kSkipMass, v_}; }
  int64_t token_tiles() const { return ceil_div(n_, cuda::kTokenTile); }
  Block block() const { return {0, v_, n_}; }
  StoredScores kept(void* data) const { return {data, stride_, maxima_, stride_}; }
  LinearOperands linear() const { return {x_, d_, w_, d_, d_, dtype_}; }

  // ---- cases ----

  void add(const std::string& kernel, const std::string& family, const std::string& variant,
           double flops, double bytes, std::function<Status()> run,
           std::function<void()> prepare = {}) {
    cases_.push_back({kernel, family, variant, flops, bytes, std::move(prepare), std::move(run)});
  }

  double product_flops() const { return 2.0 * as_double(n_) * as_double(d_) * as_double(v_); }
  double inputs() const { return 2.0 * as_double(d_) * as_double(n_ + v_); }
  double all_scores(double bytes) const { return bytes * as_double(n_) * as_double(v_); }
  static double as_double(int64_t x) { return static_cast<double>(x); }

  void linear_cases() {
    if (product_) {
      const Matrix w{w_, dtype_, v_, d_, d_, 1}, x_transposed{x_, dtype_, d_, n_, 1, d_};
      add("scores", "cublas", "16 bits", product_flops(), inputs() + all_scores(2),
          [=, multiply = product_, to = scratch_, dtype = dtype_] {
            return multiply(w, x_transposed, false, to, dtype);
          });
    }
    for (const Family& family : families_) {
      auto* const target_logit = static_cast<float*>(tokens_.target_logit);
      const auto statistics = [&](const std::string& variant, bool keep, bool all) {
        PartialStatistics partials = partials_;
        partials.max = other_maxima_, partials.sum = other_sums_;
        if (all) partials.entropy = entropy(), partials.argmax = argmax();
        StoredScores to;
        if (keep) to = kept(scratch_), to.maxima = other_maxima_;
        const double arrays = all ? 4 : 2;
        add("linear_statistics", family.name, variant, product_flops(),
            inputs() + all_scores((keep ? 2 : 0) + 4 * arrays / as_double(kStoredTile)),
            [=, this_block = block(), operands = linear(), targets = targets_, stream = stream_,
             launch = family.kernels.linear_statistics] {
              return launch({this_block, operands, {}, targets, partials, target_logit, to},
                            stream);
            });
      };
      statistics("kept", true, false);
      statistics("kept, entropy and argmax", true, true);
      statistics("not kept", false, false);
      for (const bool marks : {false, true})
        add("linear_gradient", family.name, marks ? "with marks" : "", product_flops(),
            inputs() + all_scores(2),
            [=, shape = block(), operands = linear(), targets = targets_, c = coefficients_,
             to = scratch_, stride = stride_, stream = stream_,
             tiles = marks ? marks_at(tiles_) : TileMarks{},
             launch = family.kernels.linear_gradient] {
              return launch({shape, operands, {}, targets, c, to, stride, tiles}, stream);
            });
    }
  }

  void product_cases() {
    for (const bool of_input : {true, false}) {
      const std::string kernel = of_input ? "grad_input_product" : "grad_weight_product";
      const int64_t rows = of_input ? n_ : v_;
      const double operands = all_scores(2) + 2.0 * as_double(d_) * as_double(of_input ? v_ : n_);
      const double out = as_double(rows) * as_double(d_);
      if (product_) {
        const int64_t inner = of_input ? v_ : n_;
        const Matrix g{
            gradient_, dtype_, rows, inner, of_input ? 1 : stride_, of_input ? stride_ : 1};
        const Matrix other{of_input ? w_ : x_, dtype_, inner, d_, d_, 1};
        const auto library = [&](const char* variant, double bytes, bool accumulate, void* to,
                                 DType to_dtype) {
          add(kernel, "cublas", variant, product_flops(), operands + bytes * out,
              [=, multiply = product_] { return multiply(g, other, accumulate, to, to_dtype); });
        };
        library("rounded", 2, false, result_, dtype_);
        library("fp32 sums", 4, false, sums_, DType::kFloat32);
        library("fp32 sums, added", 8, true, sums_, DType::kFloat32);
      }
      for (const Family& family : families_) {
        // With `some`, other tiles are left out.
        const auto product = [&](const std::string& variant, double bytes, const ProductOutput& to,
                                 const SomeTiles* some = nullptr) {
          GradientOperands from{gradient_, stride_, of_input ? w_ : x_, d_, d_, dtype_};
          if (some != nullptr) from.list = of_input ? some->of_input : some->of_weight;
          const double share = some == nullptr ? 1.0 : some->share;
          add(kernel, family.name, variant, share * product_flops(),
              share * all_scores(2) + operands - all_scores(2) + bytes * out,
              [=, shape = block(), stream = stream_,
               launch = of_input ? family.kernels.grad_input_product
                                 : family.kernels.grad_weight_product] {
                return launch({shape, from, to}, stream);
              });
        };
        const auto from_scores = [&](const std::string& variant, double bytes,
                                     const ProductOutput& to, const SomeTiles* some = nullptr) {
          auto* const launch = of_input ? family.kernels.grad_input_from_scores
                                        : family.kernels.grad_weight_from_scores;
          if (launch == nullptr) return;
          GradientOperands from{scores_, stride_, of_input ? w_ : x_, d_, d_, dtype_};
          if (some != nullptr) from.list = of_input ? some->of_input : some->of_weight;
          const double share = some == nullptr ? 1.0 : some->share;
          const ScoreGradient terms{maxima_,  stride_,       {},
                                    targets_, coefficients_, tokens_.target_gradient};
          add(kernel, family.name + "rs", variant, share * product_flops(),
              share * (all_scores(2) + 4.0 * as_double(ranges_) * as_double(n_)) + operands -
                  all_scores(2) + bytes * out,
              [=, shape = block(), stream = stream_] {
                return launch({shape, from, to}, terms, stream);
              });
        };
        ProductOutput rounded, sums;
        rounded.gradient = result_, rounded.gradient_stride = d_;
        rounded.scale = &tokens_.scalars->output_scale_float;
        sums.sums = sums_, sums.sums_stride = d_;
        product("rounded", 2, rounded);
        for (const SomeTiles& some : some_tiles_) {
          product("rounded, " + some.name, 2, rounded, &some);
          from_scores("rounded, from scores, " + some.name, 2, rounded, &some);
        }
        product("fp32 sums", 4, sums);
        from_scores("rounded, from scores", 2, rounded);
        from_scores("fp32 sums, from scores", 4, sums);
        sums.accumulate = true;
        product("fp32 sums, added", 8, sums);
        rounded.update = WeightUpdate::kSplitNext;
        rounded.split = compact_;
        product("compact sums, added", kCompactBytes, rounded);
        from_scores("compact sums, added, from scores", kCompactBytes, rounded);
        if (of_input || dtype_ != DType::kBFloat16) continue;
        rounded.split = {};
        rounded.split.remainder = remainder_, rounded.split.remainder_stride = d_;
        product("split sums, added", 8, rounded);
      }
    }
  }

  /// Both products of a chunk's gradients, one after the other in plain order, and overlapping.
  void pair_cases() {
    const int64_t n = std::min(n_, kPairTokens);
    for (const KernelSet& one : all_kernel_sets()) {
      if (!one.architecture->overlaps_launches || one.reads_scores) continue;
      for (const Family& family : families_) {
        if (family.name != name_of(one)) continue;
        ProductOutput of_input, of_weight;
        of_input.gradient = place_16(n * d_, "gradient of the chunk's hidden states");
        of_weight.gradient = result_;
        for (ProductOutput* to : {&of_input, &of_weight}) {
          to->gradient_stride = d_;
          to->scale = &tokens_.scalars->output_scale_float;
        }
        for (const bool overlap : {false, true})
          add("gradient_products", family.name, overlap ? "overlapping" : "in plain order",
              2 * product_flops() * as_double(n) / as_double(n_),
              2 * as_double(n) * (2 * as_double(v_) + 2 * as_double(d_)) +
                  2 * 2 * as_double(v_) * as_double(d_),
              [=, input = of_input, weight = of_weight, kernels = family.kernels,
               scores = gradient_, stride = stride_, w = w_, x = x_, d = d_, v = v_, dtype = dtype_,
               stream = stream_] {
                Status status = kernels.grad_input_product(
                    {{0, v, n}, {scores, stride, w, d, d, dtype}, input}, stream);
                for (int64_t begin = 0; status.ok() && begin < v; begin += kPairClasses) {
                  ProductOutput slice = weight;
                  slice.overlaps_previous = overlap;
                  slice.gradient = static_cast<uint16_t*>(weight.gradient) + begin * d;
                  const int64_t classes = std::min(kPairClasses, v - begin);
                  status = kernels.grad_weight_product(
                      {{begin, classes, n},
                       {scores + begin * stride, stride, x, d, d, dtype},
                       slice},
                      stream);
                }
                return status;
              });
      }
    }
  }

  void stored_cases() {
    const double tiles = as_double(ranges_) * as_double(n_);
    auto* const bias = place<float>(v_, "sums of the bias");
    for (const bool sums : {false, true})
      add(
          "stored_gradient", "generic", sums ? "in place, sums of the bias" : "in place", 0,
          all_scores(4) + 4 * tiles,
          [=, shape = block(), scores = kept(scratch_), dtype = dtype_, targets = targets_,
           c = coefficients_, target_gradient = tokens_.target_gradient, stream = stream_] {
            return stored_gradient(
                {shape, scores, dtype, {}, targets, c, target_gradient, {sums ? bias : nullptr}},
                stream);
          },
          [=, memory = &memory_, to = scratch_, from = scores_, bytes = v_ * stride_ * 2] {
            memory->copy(to, from, bytes);
          });
    add("merge_statistics", "generic", "", 0, 8 * tiles,
        [problem = problem_, tokens = tokens_, n = n_, partials = partials_, ranges = ranges_,
         stream = stream_] {
          return merge_statistics(problem, tokens, 0, n, partials, ranges, stream);
        });
    add("mark_tiles", "generic", "", 0, 8 * tiles,
        [problem = problem_, tokens = tokens_, n = n_, partials = partials_,
         marks = marks_at(tiles_),
         stream = stream_] { return mark_tiles(problem, tokens, 0, n, partials, marks, stream); });
    const SomeTiles& some = some_tiles_.back();
    for (const bool of_input : {true, false})
      add("make_work_list", "generic",
          (of_input ? "of grad_input, " : "of grad_weight, ") + some.name, 0,
          as_double(ranges_) * as_double(token_tiles()) * (1 + 4 * some.share),
          [=, marks = marks_at(some.marks), memory = list_memory(), v = v_, n = n_,
           stream = stream_] {
            WorkList unused;
            const auto product =
                of_input ? ProductOfGradient::kGradInput : ProductOfGradient::kGradWeight;
            return make_work_list({product, v, n, marks}, memory, &unused, stream);
          });
    add("copy_rows", "generic", "gradients out of grad_weight", 0, all_scores(4),
        [=, from = gradient_, to = scratch_, stride = stride_, dtype = dtype_, rows = v_,
         columns = n_, stream = stream_] {
          return copy_rows({from, stride, dtype, to, stride, dtype, rows, columns}, stream);
        });
  }

  /// The kernels of stored products, fp32.
  void generic_cases() {
    const int64_t n = std::min(n_, kGenericTokens), stride = round_up(n, 8);
    const int64_t ranges = ceil_div(v_, kGenericRange);
    const double scores = as_double(n) * as_double(v_);
    const std::string tokens = std::to_string(n) + " tokens, ";
    auto* const pristine = place<float>(v_ * stride, "products");
    auto* const products = place<float>(v_ * stride, "converted products");
    fill(pristine, DType::kFloat32, v_ * stride, 3.0);
    PartialStatistics partials;
    partials.max = place<float>(ranges * stride, "maxima of products");
    partials.sum = place<float>(ranges * stride, "sums of products");
    partials.stride = partials.max_stride = stride;
    add("block_statistics", "generic", tokens + "fp32 products", 0, 4 * scores,
        [=, shape = Block{0, v_, n}, targets = targets_, stream = stream_,
         target_logit = tokens_.target_logit] {
          return block_statistics({shape,
                                   pristine,
                                   stride,
                                   DType::kFloat32,
                                   {},
                                   targets,
                                   kGenericRange,
                                   partials,
                                   target_logit},
                                  stream);
        });
    // The same of tiles of classes, with scores to be kept.
    const int64_t tiles = ceil_div(v_, kStoredTile);
    PartialStatistics of_tiles;
    of_tiles.max = place<float>(tiles * stride, "maxima of tiles of products");
    of_tiles.sum = place<float>(tiles * stride, "sums of tiles of products");
    of_tiles.stride = of_tiles.max_stride = stride;
    add("keep_scores", "generic", tokens + "fp32 products, 16-bit scores", 0, 6 * scores,
        [=, shape = Block{0, v_, n}, targets = targets_, stream = stream_,
         target_logit = tokens_.target_logit, scores = scratch_] {
          return keep_scores({shape,
                              pristine,
                              stride,
                              {},
                              targets,
                              of_tiles,
                              static_cast<float*>(target_logit),
                              scores,
                              stride},
                             stream);
        });
    for (const DType to : {dtype_, DType::kFloat32})
      add(
          "block_gradient", "generic",
          tokens + (to == DType::kFloat32 ? "fp32 gradients" : "16-bit gradients"), 0,
          as_double(4 + size_of(to)) * scores,
          [=, shape = Block{0, v_, n}, targets = targets_, c = coefficients_, stream = stream_] {
            return block_gradient({shape, products, stride, DType::kFloat32, to, {}, targets, c},
                                  stream);
          },
          [=, memory = &memory_, bytes = v_ * stride * 4] {
            memory->copy(products, pristine, bytes);
          });
  }

  void row_cases() {
    const double elements = as_double(v_) * as_double(d_);
    RowUpdate update;
    update.sums = sums_, update.gradient = result_, update.dtype = dtype_;
    update.sums_stride = update.gradient_stride = d_, update.rows = v_, update.columns = d_;
    update.scale = &tokens_.scalars->output_scale_float;
    add("update_rows", "generic", "rounded", 0, 6 * elements,
        [update, stream = stream_] { return update_rows(update, stream); });
    update.update = WeightUpdate::kSplitNext;
    update.split = compact_;
    add("update_rows", "generic", "compact sums, added", 0, (4 + kCompactBytes) * elements,
        [update, stream = stream_] { return update_rows(update, stream); });
    if (dtype_ == DType::kBFloat16) {
      update.split = {};
      update.split.remainder = remainder_, update.split.remainder_stride = d_;
      add("update_rows", "generic", "split sums, added", 0, 12 * elements,
          [update, stream = stream_] { return update_rows(update, stream); });
    }
    add("scale_gradient", "generic", "from another", 0, 4 * elements,
        [from = w_, to = result_, dtype = dtype_, n = v_ * d_,
         scale = &tokens_.scalars->output_scale,
         stream = stream_] { return scale_gradient(from, to, dtype, n, scale, stream); });
    add("weighted_row_sum", "generic", "", 0, 2 * elements,
        [=, w = w_, d = d_, v = v_, dtype = dtype_, sums = sums_, stream = stream_] {
          return weighted_row_sum({w, d, dtype, v, d, nullptr, sums}, stream);
        });
    add("outer_product", "generic", "written", 0, 4 * as_double(n_) * as_double(d_),
        [=, factors = static_cast<const float*>(tokens_.softmax), values = sums_, n = n_, d = d_,
         to = place<float>(n_ * d_, "outer product"),
         stream = stream_] { return outer_product({factors, values, to, d, n, d}, stream); });
  }

  float* entropy() {
    if (entropy_ == nullptr) entropy_ = place<float>(ranges_ * stride_, "entropy");
    return entropy_;
  }
  int32_t* argmax() {
    if (argmax_ == nullptr) argmax_ = place<int32_t>(ranges_ * stride_, "argmax");
    return argmax_;
  }

  const int64_t n_, d_, v_, stride_, ranges_, exponents_stride_;
  const DType dtype_;
  std::vector<Family> families_;  // the oldest first
  Memory& memory_;
  const LibraryProduct& product_;
  void* const stream_;
  std::mt19937 random_{1};
  std::vector<Case> cases_;

  uint16_t *x_ = nullptr, *w_ = nullptr;  // [N, D], [V, D]
  Problem problem_;
  TokenArrays tokens_;
  Coefficients coefficients_;
  Targets targets_;
  uint16_t *scores_ = nullptr, *gradient_ = nullptr, *scratch_ = nullptr;      // [V, stride]
  float *maxima_ = nullptr, *other_maxima_ = nullptr, *other_sums_ = nullptr;  // [ranges, stride]
  PartialStatistics partials_;
  float* entropy_ = nullptr;
  int32_t* argmax_ = nullptr;
  uint8_t* tiles_ = nullptr;  // [ranges, token tiles]
  std::vector<SomeTiles> some_tiles_;
  float* sums_ = nullptr;                              // [max(N, V), D]
  uint16_t *result_ = nullptr, *remainder_ = nullptr;  // [max(N, V), D], [V, D]
  SplitSums compact_;                                  // [max(N, V), D]
};

}  // namespace

std::vector<Case> make_cases(const Shape& shape, DType dtype, int capability, Memory& memory,
                             const LibraryProduct& product, void* stream) {
  if (!is_16_bit(dtype)) throw std::runtime_error("make_cases: expected bfloat16 or float16");
  return Maker(shape, dtype, capability, memory, product, stream).make();
}

}  // namespace memeff::bench
