// The parts of the bf16 kernels that need no particular instruction: loops over blocks, tiles and strips.
// Included by one file per instruction set, which brings the micro-tile and conversions of vectors.
#pragma once

#include "cpu/bf16_kernels.h"
#include "cpu/column_kernels_impl.h"

namespace memeff {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

void copy_rows(const uint16_t* source, int64_t stride, int64_t rows, int64_t inner, uint16_t* out) {
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* to = out + i * copy_stride(inner);
    std::memcpy(to, source + i * stride, static_cast<size_t>(inner) * 2);
    if (inner % 2 != 0) to[inner] = 0;
  }
}

/// C += A B for one block of the inner dimension, panel by panel (B stays in the first-level cache).
/// MicroTiles::multiply(height, ...) computes up to kMicroRows rows of 32 columns.
template <class MicroTiles>
void multiply_block(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panels,
                    int64_t panel_stride, int64_t columns, int64_t inner, float* c,
                    int64_t c_stride, bool accumulate) {
  const int64_t steps = (inner + 1) / 2;
  for (int64_t j = 0; j < columns; j += kPanel) {
    const uint16_t* panel = panels + j / kPanel * panel_stride;
    for (int64_t i = 0; i < rows; i += kMicroRows) {
      const int64_t height = smaller(kMicroRows, rows - i);
      const uint16_t* left = MicroTiles::kPacked
                                 ? a + i / kMicroRows * a_stride + i % kMicroRows * 2
                                 : a + i * a_stride;
      MicroTiles::multiply(height, left, a_stride, panel, steps, c + i * c_stride + j, c_stride,
                           accumulate);
    }
  }
}

template <class MicroTiles>
void multiply(const Product& p) {
  // Elements of A per row and unit of the inner dimension.
  const int64_t step = MicroTiles::kPacked ? kMicroRows : 1;
  for (int64_t k = 0; k < p.inner; k += kInnerBlock) {
    multiply_block<MicroTiles>(p.a + k * step, p.a_stride, p.rows, p.panels + k * kPanel,
                               p.panel_stride, p.columns, smaller(kInnerBlock, p.inner - k), p.c,
                               p.c_stride, p.accumulate || k > 0);
  }
}

/// store_half(to, vector, count) stores that many of its numbers as fp16.
template <class MicroTiles, class StoreHalf>
void compute_score_tile(const ScoreTile& tile, const StoreHalf& store_half) {
  float* z = tile.scratch;
  uint16_t* copy = reinterpret_cast<uint16_t*>(z + kTileVocab * kTileStride);
  for (int64_t k = 0; k < tile.features; k += kInnerBlock) {
    const int64_t inner = smaller(kInnerBlock, tile.features - k);
    copy_rows(tile.weight + k, tile.weight_stride, tile.classes, inner, copy);
    multiply_block<MicroTiles>(copy, copy_stride(inner), tile.classes, tile.panels + k * kPanel,
                               tile.panel_stride, tile.tokens, inner, z, kTileStride, k > 0);
  }

  const float softcap = tile.transform.softcap;
  for (int64_t t = 0; t < tile.tokens; t += kLanes<float>) {
    const int64_t count = smaller(kLanes<float>, tile.tokens - t);
    // Statistics see whole strips (the scratch is padded); partial ones are stored with `count`.
    finish_strip(z + t, kTileStride, tile.classes, count, t, tile.transform, tile.partials,
                 [&](int64_t v, Vec<float> kept, Vec<float> e) {
                   if (tile.exponentials == nullptr) return;
                   if (softcap > 0) e *= cap_slope_of_kept<float>(kept);
                   store_half(tile.exponentials + v * tile.exponentials_stride + t, e, count);
                 });
  }
}

/// Fills tile.factors: dlogits are e (factors + log_factors log e) and the smoothing. Returns log_factors.
inline const float* fill_gradient_factors(const GradientTile& tile) {
  float* log_factors = tile.factors + (tile.tokens + kPanel - 1) / kPanel * kPanel;
  for (int64_t t = 0; t < tile.tokens; t += kLanes<float>) {
    const int64_t count = smaller(kLanes<float>, tile.tokens - t);
    const Vec<float> shift = load_strip(tile.maxima + t, count) - load_vector(tile.shift + t);
    const Vec<float> ratio = exp_vector<float>(shift);
    Vec<float> factor = load_vector(tile.scale_p + t);
    if (tile.scale_entropy != nullptr) {
      // log p = log e + shift: p (P + B log p) = e (ratio (P + B shift) + ratio B log e)
      const Vec<float> entropy = load_vector(tile.scale_entropy + t);
      factor += ratio > 0 ? entropy * shift : Vec<float>{};
      store_vector(log_factors + t, ratio * entropy);
    }
    store_vector(tile.factors + t, ratio * factor);
  }
  return log_factors;
}

}  // namespace
}  // namespace memeff
