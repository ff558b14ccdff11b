// A tile of logits of 128 tokens x 128 classes in registers: the product x W^T on gemm_tile.cuh,
// the step from product to logit, and the way of 16-bit results to a vocabulary-major matrix.
//
// Rows of the tile are tokens, so that a thread's 16 columns belong to one token at a time and the
// statistics of 8 tokens stay in registers. The matrices that leave have adjacent tokens instead:
// they are transposed in shared memory.
#pragma once

#include <cmath>

#include "cuda/common/logit_gradient.cuh"
#include "cuda/sm80/gemm_tile.cuh"

namespace memeff::cuda::sm80 {

static_assert(kColumns == kStoredTile && kRows == kTokenTile);

// ---- the product ----

// Products of tokens [first_token, +128) with `tiles` tiles of classes from first_class on. Calls
// finish(first_class of the tile) when `c` holds a tile; loads of the next are then in flight.
template <bool kAligned, class T, class Finish>
MEMEFF_DEVICE void multiply_tiles(unsigned char* stages, const Matrix<T>& x, const Matrix<T>& w,
                                  int64_t first_token, int64_t first_class, int64_t tiles,
                                  Accumulators& c, Finish finish) {
  using Source = SliceSource<kAligned, Contiguous::kDepth, T>;
  const Source source_x(x, first_token);
  Source source_w(w, first_class);
  int64_t loaded_tile = 0, loaded_k = 0, k = 0;
  const auto load = [&](unsigned char* stage) {
    if (loaded_tile == tiles) return false;
    source_x.load(stage, loaded_k);
    source_w.load(stage + kOperandBytes, loaded_k);
    loaded_k += kDepth;
    if (loaded_k >= x.columns) {
      loaded_k = 0;
      ++loaded_tile;
      source_w = Source(w, first_class + loaded_tile * kColumns);
    }
    return true;
  };
  int64_t tile_class = first_class;
  c.clear();
  run_pipeline(stages, load, [&](const unsigned char* stage) {
    if (k == 0) c.clear();
    multiply_slice<T, Contiguous::kDepth, Contiguous::kDepth>(c, stage);
    k += kDepth;
    if (k < x.columns) return;
    finish(tile_class);
    tile_class += kColumns;
    k = 0;
  });
}

// ---- logits ----

// Kernel argument: everything about a block of logits but its operands.
struct LogitBlock {
  LogitTransform<float> transform;
  const int64_t* target;  // [tokens] vocabulary index, or null
  Block block;
};

inline LogitBlock logit_block(const Block& block, const LogitTerms& terms, const Targets& targets) {
  return {logit_transform<float>(terms, block.first_class), targets.index, block};
}

// Products to logits, in place; -inf beyond the last class. `first_class` of the tile, like all
// classes here, counts from the block's first. Loops are repeated rather than their conditions,
// which are the same for the whole launch.
MEMEFF_DEVICE void to_logits(Accumulators& c, const LogitBlock& logits, int64_t first_class) {
  const LogitTransform<float>& transform = logits.transform;
  const int64_t left = logits.block.classes - first_class;
  const int classes = left < kColumns ? static_cast<int>(left) : kColumns;
  if (transform.bias != nullptr) {
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v) {
      if (column_in_tile(v) >= classes) continue;
      const float bias = transform.bias[first_class + column_in_tile(v)];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) c.at(r, v) += bias;
    }
  }
  if (transform.softcap != 0.f) {
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v)
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) c.at(r, v) = transform.logit(c.at(r, v), 0.f);
  } else {
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v)
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) c.at(r, v) *= transform.scale;
  }
  if (classes == kColumns) return;
#pragma unroll
  for (int v = 0; v < kThreadColumns; ++v) {
    if (column_in_tile(v) < classes) continue;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) c.at(r, v) = -INFINITY;
  }
}

// The column of a token's target in the tile, -1 when it lies elsewhere or there is none.
MEMEFF_DEVICE int target_in_tile(const LogitBlock& logits, int64_t first_class, int64_t token) {
  int in_block[1];
  load_targets(in_block, logits.target, logits.block, token, token < logits.block.tokens ? 1 : 0);
  const int64_t in_tile = in_block[0] - first_class;
  return in_block[0] < 0 || in_tile < 0 || in_tile >= kColumns ? -1 : static_cast<int>(in_tile);
}

// ---- 16-bit results, vocabulary-major ----

MEMEFF_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
MEMEFF_DEVICE uint32_t pack(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

// Rows of classes, 128 tokens each. The 16 bytes between rows let the 8 rows that a warp writes at
// once cover all banks.
constexpr int kTransposedRowBytes = kRows * 2 + 16;
constexpr int kTransposedBytes = kColumns * kTransposedRowBytes;

// Writes `c`, rounded to T, to shared memory. Lanes whose tokens are neighbours swap halves first,
// so that each has a pair of adjacent tokens of one class.
template <class T>
MEMEFF_DEVICE void put_transposed(unsigned char* to, const Accumulators& c) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool odd = thread / 4 % 2 != 0;  // of two neighbouring tokens
#pragma unroll
  for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
      const uint32_t upper = pack(c.value[i][j][0], c.value[i][j][1], T{});  // classes c, c + 1
      const uint32_t lower = pack(c.value[i][j][2], c.value[i][j][3], T{});  // 8 tokens on
      // The even lane keeps class c, the odd one c + 1; low half: upper row, high half: lower row.
      const uint32_t class_0 = (upper & 0xffffu) | lower << 16;
      const uint32_t class_1 = upper >> 16 | (lower & 0xffff0000u);
      const uint32_t kept = odd ? class_1 : class_0;
      const uint32_t received = __shfl_xor_sync(~0u, odd ? class_0 : class_1, 4);
      const uint32_t even_token = odd ? received : kept, odd_token = odd ? kept : received;
      const int column = column_in_tile(j * 2) + (odd ? 1 : 0);
      const int token = row_in_tile(i * 2) & ~1;
      auto* row = reinterpret_cast<uint32_t*>(to + column * kTransposedRowBytes + token * 2);
      row[0] = (even_token & 0xffffu) | odd_token << 16;
      row[4] = even_token >> 16 | (odd_token & 0xffff0000u);  // 8 tokens on
    }
}

// Copies what all threads have put to rows `to`, "stride" elements apart, 16 bytes at a time where
// rows are aligned.
template <class T>
MEMEFF_DEVICE void store_transposed(const unsigned char* from, T* to, int64_t stride,
                                    int64_t classes, int64_t tokens) {
  constexpr int kChunksPerRow = kRows / kChunk;
#pragma unroll 4
  for (int pass = 0; pass < kColumns * kChunksPerRow / kThreads; ++pass) {
    const int i = pass * kThreads + static_cast<int>(threadIdx.x);
    const int row = i / kChunksPerRow, first = i % kChunksPerRow * kChunk;
    if (row >= classes || first >= tokens) continue;
    T values[kChunk];
    load(values, reinterpret_cast<const T*>(from + row * kTransposedRowBytes + first * 2));
    store(to + row * stride + first, values, count_left<kChunk>(first, tokens));
  }
}

}  // namespace memeff::cuda::sm80
