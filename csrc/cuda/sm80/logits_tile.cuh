// Tiles of x W^T of 128 tokens x 128 classes on gemm_tile.cuh, for the kernels that begin with
// them.
//
// Rows of a tile are tokens, so that a thread's 16 columns belong to one token at a time, and the
// statistics of few tokens stay in its registers. The matrices that are stored have adjacent tokens
// instead: they pass through shared memory.
#pragma once

#include "cuda/common/logit_gradient.cuh"
#include "cuda/sm80/gemm_tile.cuh"
#include "cuda/sm80/kernels.h"

namespace memeff::cuda::sm80 {

static_assert(kColumns == kStoredTile && kRows == kTokenTile);

// ---- the product ----

// Products of tokens [first_token, +128) with classes [first_class, +128).
template <bool kAligned, class T>
MEMEFF_DEVICE void multiply_tile(unsigned char* stages, const Matrix<T>& x, const Matrix<T>& w,
                                 int64_t first_token, int64_t first_class, Accumulators& c) {
  using Source = SliceSource<kAligned, Contiguous::kDepth, T>;
  const Source source_x(x, first_token), source_w(w, first_class);
  const int features = static_cast<int>(x.columns);
  int loaded = 0;
  const auto load = [&](unsigned char* stage) {
    if (loaded >= features) return false;
    source_x.load(stage, loaded);
    source_w.load(stage + kOperandBytes, loaded);
    loaded += kDepth;
    return true;
  };
  c.clear();
  run_pipeline(stages, load, [&](const unsigned char* stage) {
    multiply_slice<T, Contiguous::kDepth, Contiguous::kDepth>(c, stage);
  });
}

// x and W of a block.
template <class T>
struct LinearMatrices {
  Matrix<T> x, w;

  LinearMatrices(const LinearOperands& operands, const Block& block)
      : x{static_cast<const T*>(operands.input), block.tokens, operands.features,
          operands.input_stride},
        w{static_cast<const T*>(operands.weight), block.classes, operands.features,
          operands.weight_stride} {}
  bool aligned() const { return chunks_are_aligned(x) && chunks_are_aligned(w); }
};

// ---- logits ----

// Kernel argument: everything about a block of logits but its operands. Classes count from the
// block's first, here and in the functions that take a `first_class` of a tile.
struct LogitBlock {
  LogitTransform<float> transform;
  const int64_t* target;  // [tokens] vocabulary index, or null
  Block block;
};

inline LogitBlock logit_block(const Block& block, const LogitTerms& terms, const Targets& targets) {
  return {logit_transform<float>(terms, block.first_class), targets.index, block};
}

// The column of a token's target in the tile, -1 when it lies elsewhere or there is none.
MEMEFF_DEVICE int target_in_tile(const LogitBlock& logits, int64_t first_class, int64_t token) {
  int in_block[1];
  load_targets(in_block, logits.target, logits.block, token, token < logits.block.tokens ? 1 : 0);
  const int64_t in_tile = in_block[0] - first_class;
  return in_block[0] < 0 || in_tile < 0 || in_tile >= kColumns ? -1 : static_cast<int>(in_tile);
}

}  // namespace memeff::cuda::sm80
