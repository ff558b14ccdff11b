// Handwritten bf16 products: C[m,n] (fp32) = A[m,k] B[k,n] in bf16. Two versions: for AVX512-BF16, whose
// shapes are what follows, and a portable one.
//
// The instruction of AVX512-BF16 (VDPBF16PS) multiplies pairs of bf16 that are adjacent along the inner dimension and
// adds both products to an fp32 lane. Hence two packings:
//
//   panel       B: [k/2][32 columns][2]      two vectors per step, read in order
//   pairs       A: [k/2][14 rows][2]         one 32-bit pair broadcast per row and step
//
// while an A whose rows run along k needs no packing at all. A micro-tile is 14 rows x 32 columns: 28 of
// the 32 vector registers accumulate, 2 hold B, 1 the broadcast; 14 steps per loaded vector of B keep
// the loads well below one per multiplication.
//
// Everything here is torch-free and free of std:: templates: the implementation is compiled for an
// instruction set that the machine may lack, and must not leak into functions shared by the linker.
#pragma once

#include <cstdint>

#include "cpu/column_kernels.h"
#include "cpu/tiling.h"

namespace memeff {

/// Tokens of one score tile: 224 x 512 fp32 scores stay in the second-level cache.
constexpr int64_t kTileTokens = 512;
/// Row stride of a score tile, in floats: a cache line more than its tokens.
constexpr int64_t kTileStride = kTileTokens + 16;
/// Inner dimension per pass over a tile: a panel of B (28 KiB) stays in the first-level cache.
constexpr int64_t kInnerBlock = 448;

/// A tile of scores, its partial statistics and 16-bit form.
struct ScoreTile {
  const uint16_t* weight;  // [classes, features] bf16, first class of the tile
  int64_t weight_stride;
  int64_t classes;  // <= kTileVocab
  int64_t features;
  const uint16_t* panels;  // packed hidden states: one panel per 32 tokens
  int64_t panel_stride;
  int64_t tokens;  // <= kTileTokens
  ScoreTransform<float> transform;
  TilePartials<float> partials;  // maximum is always wanted
  uint16_t* exponentials;  // fp16 exp(z - maximum) [classes, tokens], times the derivative of the
                           // soft cap if there is one; null: not kept
  int64_t exponentials_stride;
  // kScoreScratchBytes; begins with what is kept of the finished scores, [classes, kTileStride].
  float* scratch;
};

/// dlogits (bf16) from exponentials (fp16), in place, for rows of one tile.
struct GradientTile {
  uint16_t* data;  // [classes, tokens]
  int64_t stride;
  int64_t classes;
  int64_t tokens;
  const float* maxima;  // [tokens], of the tile
  const float* shift;   // [tokens], padded to whole panels like the next two
  const float* scale_p;
  // Or null; not with a soft cap, whose derivative is in the exponentials.
  const float* scale_entropy = nullptr;
  const float* scale_w;       // or null
  const float* class_weight;  // [classes] or null
  float* factors;             // scratch [2, tokens], padded
  double* bias_sum;           // [classes] or null
};

/// A product whose result is stored in, or added to, fp32 sums.
struct Product {
  const uint16_t* a;  // rows along k, an odd k padded with 0; or pairs packed by 14 rows
  int64_t a_stride;   // rows: elements between rows; pairs: elements between groups of 14 rows
  int64_t rows;
  const uint16_t* panels;
  int64_t panel_stride;
  int64_t columns;  // C is written in whole panels of 32
  int64_t inner;    // k
  float* c;
  int64_t c_stride;
  bool accumulate;
};

/// Rows of a bf16 gradient from fp32 sums, in one of the ways of core/weight_update.h.
struct RowUpdate {
  const float* sums;
  int64_t sums_stride;
  int64_t rows;
  int64_t columns;
  float scale;
  uint16_t* gradient;
  int64_t gradient_stride;
  uint16_t* low;  // lower halves of fp32 sums with upper halves in gradient, same stride; or null
  uint8_t* exponents;  // of compact sums [rows, columns / kCompactBlock]; or null
  int64_t exponents_stride;
  bool read;   // add to what is there
  bool round;  // the gradient is final (of split sums: the last chunk)
};

struct Bf16Kernels {
  /// Panel of up to 32 rows of `source` for products along their elements: [k/2][32][2].
  void (*pack_transposed)(const uint16_t* source, int64_t stride, const int64_t* rows,
                          int64_t count, int64_t inner, uint16_t* panel);
  /// Rows interleaved in pairs, `width` columns wide: [inner/2][width][2]. `rows` lists source rows, or is
  /// null for consecutive ones; columns beyond `columns` become 0.
  void (*interleave_rows)(const uint16_t* source, int64_t stride, const int64_t* rows,
                          int64_t inner, int64_t columns, int64_t width, uint16_t* out);
  void (*score_tile)(const ScoreTile& tile);
  void (*gradient_tile)(const GradientTile& tile);
  /// Copies rows next to each other, copy_stride(inner) apart.
  void (*copy_rows)(const uint16_t* source, int64_t stride, int64_t rows, int64_t inner,
                    uint16_t* out);
  void (*multiply_rows)(const Product& product);
  void (*multiply_pairs)(const Product& product);
  void (*update_rows)(const RowUpdate& update);
};

#if defined(__x86_64__)
Bf16Kernels bf16_kernels_avx512bf16();
#endif
/// For any processor; for tests of what surrounds them (see bf16_kernels_portable.cpp).
Bf16Kernels bf16_kernels_portable();

}  // namespace memeff
