// Element-wise work on a tile of scores, vocabulary-major: the lanes of a vector are tokens, so the
// softmax statistics of a token never need a reduction across lanes.
//
//   z       [classes, tokens], rows `stride` elements apart
//   multiply         products that no BLAS shall compute
//   finish_scores    z <- softcap(scale * (z + bias)); per-token partial sums of the tile, of scores
//                    that are token_scale times that
//   to_gradient      z <- dlogits
//
// With a soft cap c, what is kept of a finished score has the sign of z and all digits of both t = |z| / c
// and d = 1 - t. Small scores would lose theirs in d; and where tanh is saturated, the cap's derivative
// 1 - t^2 would be a difference of equal numbers, which d (2 - d) is not. Hence the magnitude
//
//   t                where t <= 1/2
//   d kDistanceUnit  elsewhere, above 1; or 3/4 if d is 0
//
// Compiled once per instruction set (column_kernels_*.cpp) and chosen at run time.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "cpu/tiling.h"

namespace memeff {

template <class T>
constexpr T kDistanceUnit = sizeof(T) == 8 ? static_cast<T>(0x1p1022) : static_cast<T>(0x1p126);

/// d from what is kept of a score under a soft cap.
template <class T>
inline T cap_distance(T kept) {
  const T magnitude = std::abs(kept);
  if (magnitude <= T(0.5)) return 1 - magnitude;
  return magnitude < 1 ? 0 : magnitude / kDistanceUnit<T>;
}

/// A finished score from what a block keeps of it.
template <class T>
inline T score_of(T kept, T softcap) {
  if (softcap == 0) return kept;
  const T magnitude = std::abs(kept);
  return std::copysign(softcap * (magnitude <= T(0.5) ? magnitude : 1 - cap_distance(kept)), kept);
}

/// Derivative of the soft cap at a kept score.
template <class T>
inline T cap_slope(T kept) {
  const T distance = cap_distance(kept);
  return distance * (2 - distance);
}

/// Partial sums of a tile, per token. Null: not requested.
template <class T>
struct TilePartials {
  T* maximum = nullptr;   // max_v z_v
  T* sum = nullptr;       // sum_v exp(z_v - max)
  T* smooth = nullptr;    // sum_v w_v z_v
  T* weighted = nullptr;  // sum_v exp(z_v - max) (z_v - max)
  T* argmax = nullptr;    // class with the maximum, counted from the tile's first
};

template <class T>
struct ScoreTransform {
  T scale = 1;
  T softcap = 0;  // 0: off
  const T* token_scale =
      nullptr;              // [tokens] multiplies finished scores; null: 1. Not in what is kept
  const T* bias = nullptr;  // of the tile's classes
  const T* class_weight = nullptr;  // of the tile's classes
};

/// dlogits = exp(z - shift) * (scale_p + scale_entropy * (z - shift)) - scale_w * w, times the derivative
/// of the soft cap. The shift is lse rounded to T, and the scales make up for the rounding.
template <class T>
struct GradientTransform {
  T softcap = 0;
  const T* token_scale =
      nullptr;                 // [tokens] as in ScoreTransform; the coefficients contain it, too
  const T* shift = nullptr;    // [tokens]
  const T* scale_p = nullptr;  // [tokens]
  // With scale_entropy scale_p cancels most of its term. What rounding has taken from scale_p would be an
  // error that all classes share: it is added in the end.
  const T* scale_p_rest = nullptr;   // [tokens]
  const T* scale_entropy = nullptr;  // [tokens] or null
  const T* scale_w = nullptr;        // [tokens] or null
  const T* class_weight = nullptr;   // of the tile's classes, or null
};

/// Columns that BLAS libraries multiply by plain sums over all rows, which err with their number.
constexpr int64_t kFewFeatures = 15;

template <class T>
struct ColumnKernels {
  /// C[rows, columns] = or += A B. A's element (i, k) lies at a + i * row_stride + k * inner_stride.
  /// Each sum has the same order of additions, whatever the shapes: sums of sums of 16.
  void (*multiply)(const T* a, int64_t row_stride, int64_t inner_stride, int64_t rows, const T* b,
                   int64_t b_stride, int64_t inner, int64_t columns, bool accumulate, T* c,
                   int64_t c_stride);
  void (*finish_scores)(T* z, int64_t stride, int64_t classes, int64_t tokens,
                        const ScoreTransform<T>& transform, const TilePartials<T>& partials);
  void (*to_gradient)(T* z, int64_t stride, int64_t classes, int64_t tokens,
                      const GradientTransform<T>& transform);
  /// sums[t, d] = or += sum over the classes of z[v, t] weight[v, d], for at most kFewFeatures features.
  void (*add_few_features)(const T* z, int64_t stride, int64_t classes, int64_t tokens,
                           const T* weight, int64_t weight_stride, int64_t features,
                           bool accumulate, T* sums, int64_t sums_stride);
  /// sums[v] += sum over the tokens of row v.
  void (*add_row_sums)(const T* z, int64_t stride, int64_t classes, int64_t tokens, double* sums);
};

/// The fastest version that this machine runs.
template <class T>
const ColumnKernels<T>& column_kernels();

#if defined(__x86_64__)
template <class T>
ColumnKernels<T> column_kernels_avx2();
template <class T>
ColumnKernels<T> column_kernels_avx512();
#endif

}  // namespace memeff
