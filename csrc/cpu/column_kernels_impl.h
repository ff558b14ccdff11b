// Body of the column kernels; included by one file per instruction set.
#pragma once

#include <type_traits>

#include "cpu/column_kernels.h"
#include "cpu/vector_math.h"

namespace memeff {
namespace {

/// Loads and stores a strip of up to kLanes tokens. Only the last strip of a row is partial: what lies
/// beyond it belongs to the next class.
template <class T>
inline Vec<T> load_strip(const T* data, int64_t count) {
  if (count >= kLanes<T>) return load_vector(data);
  Vec<T> value = {};
  std::memcpy(&value, data, static_cast<size_t>(count) * sizeof(T));
  return value;
}

template <class T>
inline void store_strip(T* data, Vec<T> value, int64_t count) {
  if (count >= kLanes<T>) {
    store_vector(data, value);
  } else {
    std::memcpy(data, &value, static_cast<size_t>(count) * sizeof(T));
  }
}

/// `kRows` rows of multiply(), for some of the sum: sums of 16 terms, added up.
template <class T, int kRows>
inline void multiply_rows_of_c(const T* a, int64_t row_stride, int64_t inner_stride, const T* b,
                               int64_t b_stride, int64_t inner, int64_t columns, bool accumulate,
                               T* c, int64_t c_stride) {
  constexpr int64_t kTerms = 16;
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const int64_t count = columns - j;
    Vec<T> sum[kRows] = {};
    for (int64_t first = 0; first < inner; first += kTerms) {
      const int64_t end = inner - first < kTerms ? inner : first + kTerms;
      Vec<T> part[kRows] = {};
      const auto add = [&](int64_t k, Vec<T> right) {
        for (int i = 0; i < kRows; ++i) part[i] += a[i * row_stride + k * inner_stride] * right;
      };
      if (count >= kLanes<T>) {
        for (int64_t k = first; k < end; ++k) add(k, load_vector(b + k * b_stride + j));
      } else {
        for (int64_t k = first; k < end; ++k) add(k, load_strip(b + k * b_stride + j, count));
      }
      for (int i = 0; i < kRows; ++i) sum[i] += part[i];
    }
    for (int i = 0; i < kRows; ++i) {
      T* const to = c + i * c_stride + j;
      store_strip(to, accumulate ? load_strip(to, count) + sum[i] : sum[i], count);
    }
  }
}

template <class T>
void multiply(const T* a, int64_t row_stride, int64_t inner_stride, int64_t rows, const T* b,
              int64_t b_stride, int64_t inner, int64_t columns, bool accumulate, T* c,
              int64_t c_stride) {
  constexpr int64_t kTerms = 128;  // at a time; few columns of B then stay in the first-level cache
  constexpr int kRows = 4;
  for (int64_t k = 0; k < inner || k == 0; k += kTerms) {
    const int64_t terms = inner - k < kTerms ? inner - k : kTerms;
    const T* left = a + k * inner_stride;
    const T* right = b + k * b_stride;
    const bool adds = accumulate || k > 0;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
      multiply_rows_of_c<T, kRows>(left + i * row_stride, row_stride, inner_stride, right, b_stride,
                                   terms, columns, adds, c + i * c_stride, c_stride);
    for (; i < rows; ++i)
      multiply_rows_of_c<T, 1>(left + i * row_stride, row_stride, inner_stride, right, b_stride,
                               terms, columns, adds, c + i * c_stride, c_stride);
  }
}

/// The magnitude of one vector with the signs of another.
template <class T>
inline Vec<T> with_sign(Vec<T> magnitude, Vec<T> sign) {
  using Int = typename VectorTraits<T>::Int;
  constexpr auto kSign = std::numeric_limits<std::decay_t<decltype(Int{}[0])>>::min();
  Int bits, sign_bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  std::memcpy(&sign_bits, &sign, sizeof sign_bits);
  bits = (bits & ~kSign) | (sign_bits & kSign);
  std::memcpy(&magnitude, &bits, sizeof bits);
  return magnitude;
}

template <class T>
inline Vec<T> magnitude_of(Vec<T> value) {
  return with_sign<T>(value, Vec<T>{});
}

/// What is kept of a score: see column_kernels.h. With e = exp(-2 |x|), |tanh x| = (1 - e) / (1 + e).
template <class T>
inline Vec<T> transform_score(Vec<T> z, int64_t v, const ScoreTransform<T>& transform) {
  if (transform.bias != nullptr) z += transform.bias[v];
  z *= transform.scale;
  if (transform.softcap == 0) return z;
  const Vec<T> x = magnitude_of<T>(z) * (-2 / transform.softcap);
  const Vec<T> e = exp_vector<T>(x);
  const Vec<T> e_less_1 = expm1_vector<T>(x);  // where it is used, x >= -log 3
  const Vec<T> distance = 2 * e / (1 + e) * kDistanceUnit<T>;
  const Vec<T> far = distance == 0 ? broadcast<T>(T(0.75)) : distance;
  const Vec<T> t = -e_less_1 / (2 + e_less_1);
  const Vec<T> near = t > T(0.5) ? broadcast<T>(T(0.5)) : t;
  return with_sign<T>(e >= T(1) / 3 ? near : far, z);
}

/// As cap_distance(), score_of() and cap_slope().
template <class T>
inline Vec<T> cap_distance_of_kept(Vec<T> kept) {
  const Vec<T> magnitude = magnitude_of<T>(kept);
  const Vec<T> far = magnitude < 1 ? Vec<T>{} : magnitude * (1 / kDistanceUnit<T>);
  return magnitude <= T(0.5) ? 1 - magnitude : far;
}

template <class T>
inline Vec<T> score_of_kept(Vec<T> kept, T softcap) {
  if (softcap == 0) return kept;
  const Vec<T> magnitude = magnitude_of<T>(kept);
  const Vec<T> t = magnitude <= T(0.5) ? magnitude : 1 - cap_distance_of_kept<T>(kept);
  return with_sign<T>(softcap * t, kept);
}

template <class T>
inline Vec<T> cap_slope_of_kept(Vec<T> kept) {
  const Vec<T> distance = cap_distance_of_kept<T>(kept);
  return distance * (2 - distance);
}

/// `finished(v, kept, e)` sees what is kept of every score and its exponential relative to the strip's
/// maximum.
template <class T, class Finished>
inline void finish_strip(T* z, int64_t stride, int64_t classes, int64_t count, int64_t at,
                         const ScoreTransform<T>& transform, const TilePartials<T>& partials,
                         const Finished& finished) {
  const T infinity = std::numeric_limits<T>::infinity();
  const Vec<T> token_scale = transform.token_scale == nullptr
                                 ? broadcast<T>(T(1))
                                 : load_strip(transform.token_scale + at, count);
  Vec<T> maximum = broadcast<T>(-infinity);
  Vec<T> argmax = {};
  Vec<T> smooth = {};
  for (int64_t v = 0; v < classes; ++v) {
    T* row = z + v * stride;
    const Vec<T> kept = transform_score<T>(load_strip(row, count), v, transform);
    store_strip(row, kept, count);
    const Vec<T> score = score_of_kept<T>(kept, transform.softcap) * token_scale;
    if (partials.argmax != nullptr) {
      argmax = score > maximum ? broadcast<T>(static_cast<T>(v)) : argmax;
    }
    maximum = score > maximum ? score : maximum;
    if (partials.smooth != nullptr) {
      smooth += transform.class_weight != nullptr ? transform.class_weight[v] * score : score;
    }
  }
  // Relative to a finite number, so that a tile of -inf scores has sum 0 and not NaN, and +inf
  // differs from NaN.
  const Vec<T> origin = maximum == -infinity || maximum == infinity ? Vec<T>{} : maximum;
  // Sums of sums of 16: their rounding would be an error of lse and entropy, which all classes share.
  constexpr int64_t kTerms = 16;
  Vec<T> sum = {};
  Vec<T> weighted = {};
  for (int64_t first = 0; first < classes; first += kTerms) {
    const int64_t end = classes - first < kTerms ? classes : first + kTerms;
    Vec<T> part = {};
    Vec<T> weighted_part = {};
    for (int64_t v = first; v < end; ++v) {
      const Vec<T> kept = load_strip(z + v * stride, count);
      const Vec<T> score = score_of_kept<T>(kept, transform.softcap) * token_scale;
      const Vec<T> e = exp_vector<T>(score - origin);
      part += e;
      if (partials.weighted != nullptr) weighted_part += e > 0 ? e * (score - origin) : Vec<T>{};
      finished(v, kept, e);
    }
    sum += part;
    weighted += weighted_part;
  }
  store_strip(partials.maximum + at, maximum, count);
  if (partials.sum != nullptr) store_strip(partials.sum + at, sum, count);
  if (partials.smooth != nullptr) store_strip(partials.smooth + at, smooth, count);
  if (partials.weighted != nullptr) store_strip(partials.weighted + at, weighted, count);
  if (partials.argmax != nullptr) store_strip(partials.argmax + at, argmax, count);
}

template <class T>
void finish_scores(T* z, int64_t stride, int64_t classes, int64_t tokens,
                   const ScoreTransform<T>& transform, const TilePartials<T>& partials) {
  const bool plain = transform.bias == nullptr && transform.scale == 1 && transform.softcap == 0;
  for (int64_t t = 0; t < tokens; t += kLanes<T>) {
    const int64_t count = tokens - t < kLanes<T> ? tokens - t : kLanes<T>;
    if (partials.maximum != nullptr) {
      finish_strip(z + t, stride, classes, count, t, transform, partials,
                   [](int64_t, Vec<T>, Vec<T>) {});
    } else if (!plain) {
      for (int64_t v = 0; v < classes; ++v) {
        T* at = z + v * stride + t;
        store_strip(at, transform_score<T>(load_strip(at, count), v, transform), count);
      }
    }
  }
}

template <class T>
void to_gradient(T* z, int64_t stride, int64_t classes, int64_t tokens,
                 const GradientTransform<T>& transform) {
  for (int64_t v = 0; v < classes; ++v) {
    const T w = transform.class_weight != nullptr ? transform.class_weight[v] : 1;
    for (int64_t t = 0; t < tokens; t += kLanes<T>) {
      const int64_t count = tokens - t < kLanes<T> ? tokens - t : kLanes<T>;
      T* at = z + v * stride + t;
      const Vec<T> kept = load_strip(at, count);
      Vec<T> score = score_of_kept<T>(kept, transform.softcap);
      if (transform.token_scale != nullptr) score *= load_strip(transform.token_scale + t, count);
      const Vec<T> log_p = score - load_strip(transform.shift + t, count);
      const Vec<T> p = exp_vector<T>(log_p);
      Vec<T> gradient = load_strip(transform.scale_p + t, count) * p;
      if (transform.scale_entropy != nullptr) {
        const Vec<T> factor = load_strip(transform.scale_p + t, count) +
                              load_strip(transform.scale_entropy + t, count) * log_p +
                              load_strip(transform.scale_p_rest + t, count);
        gradient = p > 0 ? p * factor : p;  // p log p is 0 where p is, also for a score of -inf
      }
      if (transform.scale_w != nullptr) gradient -= load_strip(transform.scale_w + t, count) * w;
      if (transform.softcap > 0) gradient *= cap_slope_of_kept<T>(kept);
      store_strip(at, gradient, count);
    }
  }
}

template <class T>
void add_few_features(const T* z, int64_t stride, int64_t classes, int64_t tokens, const T* weight,
                      int64_t weight_stride, int64_t features, bool accumulate, T* sums,
                      int64_t sums_stride) {
  constexpr int64_t kTerms = 256;  // of one partial sum
  for (int64_t t = 0; t < tokens; t += kLanes<T>) {
    const int64_t count = tokens - t < kLanes<T> ? tokens - t : kLanes<T>;
    Vec<T> sum[kFewFeatures] = {};
    for (int64_t first = 0; first < classes; first += kTerms) {
      const int64_t end = classes - first < kTerms ? classes : first + kTerms;
      Vec<T> part[kFewFeatures] = {};
      for (int64_t v = first; v < end; ++v) {
        const Vec<T> gradient = load_strip(z + v * stride + t, count);
        for (int64_t d = 0; d < features; ++d) part[d] += gradient * weight[v * weight_stride + d];
      }
      for (int64_t d = 0; d < features; ++d) sum[d] += part[d];
    }
    for (int64_t i = 0; i < count; ++i) {
      T* row = sums + (t + i) * sums_stride;
      for (int64_t d = 0; d < features; ++d) row[d] = (accumulate ? row[d] : 0) + sum[d][i];
    }
  }
}

template <class T>
void add_row_sums(const T* z, int64_t stride, int64_t classes, int64_t tokens, double* sums) {
  for (int64_t v = 0; v < classes; ++v) {
    Vec<T> sum = {};
    for (int64_t t = 0; t < tokens; t += kLanes<T>) {
      sum += load_strip(z + v * stride + t, tokens - t);
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) sums[v] += sum[lane];
  }
}

template <class T>
ColumnKernels<T> make_column_kernels() {
  return {multiply<T>, finish_scores<T>, to_gradient<T>, add_few_features<T>, add_row_sums<T>};
}

}  // namespace
}  // namespace memeff
