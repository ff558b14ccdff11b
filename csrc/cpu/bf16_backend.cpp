#include "cpu/bf16_backend.h"

#include <algorithm>

#include "cpu/number.h"
#include "cpu/parallel.h"
#include "cpu/tiling.h"

namespace memeff {
namespace {

static_assert(kTileVocab * kTileStride * 4 + kTileVocab * copy_stride(kInnerBlock) * 2 <=
                  kScoreScratchBytes,
              "a tile of scores and a copy of its weight rows fit the thread's scratch");

}  // namespace

Bf16Backend::Bf16Backend(const CpuContext& context, const Bf16Kernels& kernels)
    : CpuBackend<float>(context),
      kernels_(kernels),
      input_(static_cast<const uint16_t*>(problem_.input)),
      weight_(static_cast<const uint16_t*>(problem_.weight)) {}

ScoreBlock Bf16Backend::part(const ScoreBlock& block, int64_t classes, int64_t tokens) const {
  ScoreBlock result = block;
  result.data = static_cast<uint16_t*>(block.data) + classes * block.stride + tokens;
  result.maxima =
      static_cast<float*>(block.maxima) + classes / kTileVocab * block.maxima_stride + tokens;
  return result;
}

const uint16_t* Bf16Backend::pack_input(Range tokens, Packing packing) {
  const bool along_features = packing == Packing::kAlongFeatures;
  uint16_t* panels = at<uint16_t>(along_features ? layout_.score_step.input_block
                                                 : layout_.weight_step.input_block);
  Range& packed = along_features ? packed_along_features_ : packed_along_tokens_;
  if (packed == tokens) return panels;
  if (plan_.kind == PlanKind::kTokenChunks) forget_packed();
  packed = tokens;
  const int64_t* rows = tokens_.rows() + tokens.begin;
  const int64_t features = problem_.features;
  if (along_features) {
    const int64_t panel_stride = round_up(features, 2) * kPanel;
    parallel_for(ceil_div(tokens.size(), kPanel), 1, [&](int64_t panel, int64_t end, int) {
      for (; panel < end; ++panel) {
        const int64_t first = panel * kPanel;
        kernels_.pack_transposed(input_, problem_.input_stride, rows + first,
                                 std::min(kPanel, tokens.size() - first), features,
                                 panels + panel * panel_stride);
      }
    });
  } else {
    const int64_t panel_stride = round_up(tokens.size(), 2) * kPanel;
    parallel_for(ceil_div(features, kPanel), 1, [&](int64_t panel, int64_t end, int) {
      for (; panel < end; ++panel) {
        const int64_t first = panel * kPanel;
        kernels_.interleave_rows(input_ + first, problem_.input_stride, rows, tokens.size(),
                                 std::min(kPanel, features - first), kPanel,
                                 panels + panel * panel_stride);
      }
    });
  }
  return panels;
}

void Bf16Backend::scores(Range tokens, const ScoreBlock* block) {
  compute_scores({0, problem_.vocab}, tokens, block, ScoreUse::kStatistics);
}

void Bf16Backend::fresh_gradient(Range classes, Range tokens, const ScoreBlock& block,
                                 bool add_bias) {
  // Each tile turns into gradients while it is in the cache. Sums of the bias gradient want whole rows.
  const bool in_tiles = !(add_bias && bias_sum() != nullptr);
  compute_scores(classes, tokens, &block, in_tiles ? ScoreUse::kGradient : ScoreUse::kKeep);
  if (!in_tiles) to_gradient(classes, tokens, block, add_bias);
}

void Bf16Backend::compute_scores(Range classes, Range tokens, const ScoreBlock* block,
                                 ScoreUse use) {
  const uint16_t* panels = pack_input(tokens, Packing::kAlongFeatures);
  if (use == ScoreUse::kGradient)
    tokens_.coefficients(tokens);  // computed before threads read them
  const int64_t tiles = ceil_div(classes.size(), kTileVocab);
  const int64_t strips = ceil_div(tokens.size(), kTileTokens);
  parallel_for(tiles * strips, 1, [&](int64_t task, int64_t end, int thread) {
    for (; task < end; ++task) {
      const int64_t v = classes.begin + task / strips * kTileVocab;
      const int64_t t = task % strips * kTileTokens;
      const ScoreBlock part =
          block == nullptr ? ScoreBlock{} : this->part(*block, v - classes.begin, t);
      score_task({v, std::min(v + kTileVocab, classes.end)}, tokens, t, panels,
                 block == nullptr ? nullptr : &part, use, scratch<float>(thread));
    }
  });
}

void Bf16Backend::score_task(Range classes, Range tokens, int64_t column, const uint16_t* panels,
                             const ScoreBlock* block, ScoreUse use, float* scratch) {
  const Range strip{tokens.begin + column,
                    std::min(tokens.begin + column + kTileTokens, tokens.end)};
  float bias[kTileVocab];
  float maxima[kTileTokens];
  ScoreTile tile;
  tile.weight = weight_ + classes.begin * problem_.weight_stride;
  tile.weight_stride = problem_.weight_stride;
  tile.classes = classes.size();
  tile.features = problem_.features;
  tile.panel_stride = round_up(problem_.features, 2) * kPanel;
  tile.panels = panels + column / kPanel * tile.panel_stride;
  tile.tokens = strip.size();
  tile.transform = score_transform(classes, bias);
  tile.transform.token_scale = tokens_.token_scale(strip.begin);
  if (use == ScoreUse::kStatistics) {
    tile.partials = tokens_.tile_partials(classes.begin / kTileVocab, column);
  } else {
    tile.partials.maximum = maxima;
  }
  tile.exponentials = block == nullptr ? nullptr : static_cast<uint16_t*>(block->data);
  tile.exponentials_stride = block == nullptr ? 0 : block->stride;
  tile.scratch = scratch;
  kernels_.score_tile(tile);
  tokens_.for_each_target(classes, strip, [&](int64_t row, int64_t i, int64_t k) {
    tokens_.set_target_logit(strip.begin + i, k, scratch[row * kTileStride + i]);
  });
  if (block == nullptr) return;
  std::copy_n(tile.partials.maximum, strip.size(), static_cast<float*>(block->maxima));
  if (use == ScoreUse::kGradient) gradient_task(classes, strip, column, *block, scratch, false);
}

void Bf16Backend::to_gradient(Range classes, Range tokens, const ScoreBlock& block, bool add_bias) {
  tokens_.coefficients(tokens);
  // Tasks are parts of tiles: enough of them for many threads, each within one tile's maxima.
  constexpr int64_t kTaskClasses = kTileVocab / 4;
  parallel_for(ceil_div(classes.size(), kTaskClasses), 1,
               [&](int64_t task, int64_t end, int thread) {
                 for (; task < end; ++task) {
                   const int64_t first = task * kTaskClasses;
                   const Range rows{classes.begin + first,
                                    std::min(classes.begin + first + kTaskClasses, classes.end)};
                   ScoreBlock part = this->part(block, first / kTileVocab * kTileVocab, 0);
                   part.data = static_cast<uint16_t*>(block.data) + first * block.stride;
                   gradient_task(rows, tokens, 0, part, scratch<float>(thread), add_bias);
                 }
               });
}

void Bf16Backend::gradient_task(Range classes, Range tokens, int64_t column,
                                const ScoreBlock& block, float* factors, bool add_bias) {
  const Coefficients& values = tokens_.current_coefficients();
  GradientTile tile;
  tile.data = static_cast<uint16_t*>(block.data);
  tile.stride = block.stride;
  tile.classes = classes.size();
  tile.tokens = tokens.size();
  tile.maxima = static_cast<const float*>(block.maxima);
  tile.shift = values.shift.data() + column;
  tile.scale_p = values.scale_p.data() + column;
  tile.scale_entropy =
      tokens_.has_entropy_gradient() ? values.scale_entropy.data() + column : nullptr;
  const float* scale_w = tokens_.scale_w(values);
  tile.scale_w = scale_w == nullptr ? nullptr : scale_w + column;
  tile.class_weight = tokens_.class_weight(classes.begin);
  tile.factors = factors;
  tile.bias_sum = add_bias && bias_sum() != nullptr ? bias_sum() + classes.begin : nullptr;
  // Targets get their exact value afterwards; until then their exponential counts as 0, so that the sum
  // of the bias gradient needs no difference of large numbers.
  tokens_.for_each_target(classes, tokens, [&](int64_t row, int64_t i, int64_t) {
    tile.data[row * tile.stride + i] = 0;
  });
  kernels_.gradient_tile(tile);
  tokens_.for_each_target(classes, tokens, [&](int64_t row, int64_t i, int64_t k) {
    const float exact = static_cast<float>(tokens_.target_gradient(tokens.begin + i, k));
    tile.data[row * tile.stride + i] = bf16_bits(exact);
    if (tile.bias_sum == nullptr) return;
    float so_far = 0;
    if (tile.scale_w != nullptr) {
      so_far = -tile.scale_w[i] * (tile.class_weight == nullptr ? 1.0f : tile.class_weight[row]);
    }
    tile.bias_sum[row] += exact - so_far;
  });
}

void Bf16Backend::add_grad_input(Range classes, Range tokens, const ScoreBlock& block, bool first) {
  const int64_t features = problem_.features;
  const int64_t padded = round_up(features, kPanel);
  const int64_t groups = ceil_div(tokens.size(), kMicroRows);
  auto* const weight_panels = at<uint16_t>(layout_.input_step.weight_block);
  auto* const gradient_pairs = at<uint16_t>(layout_.input_step.gradient_block);
  float* const sums = input_sum(tokens);
  const int64_t padded_inner = round_up(classes.size(), 2);
  if (plan_.kind == PlanKind::kTokenChunks) forget_packed();
  const bool packed = packed_classes_ == classes;
  packed_classes_ = classes;
  // A task: a few rows across all panels, so that it reads memory in order.
  constexpr int64_t kPackRows = 64;
  parallel_for(ceil_div(classes.size(), kPackRows), 1, [&](int64_t task, int64_t end, int) {
    for (; task < end; ++task) {
      const int64_t v = task * kPackRows;
      const int64_t rows = std::min(kPackRows, classes.size() - v);
      const uint16_t* weight = weight_ + (classes.begin + v) * problem_.weight_stride;
      for (int64_t d = 0; d < padded && !packed; d += kPanel) {
        kernels_.interleave_rows(weight + d, problem_.weight_stride, nullptr, rows,
                                 std::min(kPanel, features - d), kPanel,
                                 weight_panels + d * padded_inner + v * kPanel);
      }
      const uint16_t* gradient = static_cast<const uint16_t*>(block.data) + v * block.stride;
      for (int64_t t = 0; t < tokens.size(); t += kMicroRows) {
        kernels_.interleave_rows(gradient + t, block.stride, nullptr, rows,
                                 std::min(kMicroRows, tokens.size() - t), kMicroRows,
                                 gradient_pairs + t * padded_inner + v * kMicroRows);
      }
    }
  });
  // A task: groups of tokens whose pairs stay in the second-level cache, by kTaskColumns.
  const int64_t row_tasks = ceil_div(groups * kMicroRows, kTaskRows);
  const int64_t task_groups = ceil_div(groups, row_tasks);
  const int64_t column_tasks = ceil_div(padded, kTaskColumns);
  parallel_for(ceil_div(groups, task_groups) * column_tasks, 1,
               [&](int64_t task, int64_t end, int) {
                 for (; task < end; ++task) {
                   const int64_t group = task / column_tasks * task_groups;
                   const int64_t t = group * kMicroRows;
                   const int64_t d = task % column_tasks * kTaskColumns;
                   Product product;
                   product.a = gradient_pairs + group * padded_inner * kMicroRows;
                   product.a_stride = padded_inner * kMicroRows;
                   product.rows = std::min(task_groups * kMicroRows, tokens.size() - t);
                   product.panels = weight_panels + d / kPanel * padded_inner * kPanel;
                   product.panel_stride = padded_inner * kPanel;
                   product.columns = std::min(kTaskColumns, padded - d);
                   product.inner = classes.size();
                   product.c = sums + t * input_sum_stride() + d;
                   product.c_stride = input_sum_stride();
                   product.accumulate = !first;
                   kernels_.multiply_pairs(product);
                 }
               });
}

void Bf16Backend::grad_weight(Range classes, Range tokens, const ScoreBlock& block, bool first,
                              bool last, WeightUpdate update) {
  const uint16_t* panels = pack_input(tokens, Packing::kAlongTokens);
  const int64_t panel_stride = round_up(tokens.size(), 2) * kPanel;
  const int64_t features = problem_.features;
  const bool in_one_go = first && last;  // then a task's sums never leave its cache
  parallel_for(ceil_div(classes.size(), kTaskRows), 1, [&](int64_t task, int64_t end, int thread) {
    for (; task < end; ++task) {
      const int64_t v = task * kTaskRows;
      const int64_t rows = std::min(kTaskRows, classes.size() - v);
      // The scores may lie in exactly the rows of grad_weight that are written below: copy all of them.
      float* const sums = scratch<float>(thread);
      auto* const copy = reinterpret_cast<uint16_t*>(sums + kTaskRows * sum_stride(kTaskColumns));
      kernels_.copy_rows(static_cast<const uint16_t*>(block.data) + v * block.stride, block.stride,
                         rows, tokens.size(), copy);
      for (int64_t d = 0; d < features; d += kTaskColumns) {
        Product product;
        product.a = copy;
        product.a_stride = copy_stride(tokens.size());
        product.rows = rows;
        product.panels = panels + d / kPanel * panel_stride;
        product.panel_stride = panel_stride;
        product.columns = std::min(kTaskColumns, features - d);
        product.inner = tokens.size();
        product.c = in_one_go ? sums : weight_sum() + v * sum_stride(features) + d;
        product.c_stride = in_one_go ? sum_stride(kTaskColumns) : sum_stride(features);
        product.accumulate = !first;
        kernels_.multiply_rows(product);
        if (last) update_rows(product, classes.begin + v, d, update);
      }
    }
  });
}

void Bf16Backend::update_rows(const Product& product, int64_t row, int64_t column,
                              WeightUpdate update) {
  const int64_t offset = row * problem_.features + column;
  RowUpdate rows;
  rows.sums = product.c;
  rows.sums_stride = product.c_stride;
  rows.rows = product.rows;
  rows.columns = product.columns;
  rows.scale = static_cast<float>(tokens_.output_scale());
  rows.gradient = static_cast<uint16_t*>(problem_.grad_weight) + offset;
  rows.gradient_stride = problem_.features;
  const bool split = update != WeightUpdate::kWrite;
  const bool compact = plan_.accumulation == Accumulation::kCompact;
  rows.low = split && !compact ? at<uint16_t>(layout_.remainder) + offset : nullptr;
  rows.exponents_stride = ceil_div(problem_.features, kCompactBlock);
  rows.exponents = split && compact ? at<uint8_t>(layout_.exponents) + row * rows.exponents_stride +
                                          column / kCompactBlock
                                    : nullptr;
  rows.read = reads_gradient(update);
  rows.round = is_final(update);
  kernels_.update_rows(rows);
}

}  // namespace memeff
