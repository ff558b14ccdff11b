// The bf16 kernels in plain C++, for any processor. See bf16_kernels.h.
//
// They exist so that the backend around them (bf16_backend.cpp) runs and is tested everywhere: products
// of fp32 by a BLAS are faster on processors without AVX512-BF16, so only MEMEFF_CPU_KERNELS chooses these.
//
// Numerics: VDPBF16PS adds the two products of a pair one after the other, the second element's first, each
// with one rounding to nearest even; it takes denormal numbers for 0 and rounds denormal results to 0.
// Here, too, the second element's product comes first, and products of two bf16 are exact in fp32, so both
// agree to the bit but for denormal numbers and products beyond fp32.
#include "cpu/bf16_kernels_impl.h"
#include "cpu/number.h"
#include "cpu/row_update.h"

namespace memeff {
namespace {

/// Rows of a micro-tile that share a loaded vector of B.
constexpr int64_t kRowsAtOnce = 4;

typedef uint32_t Pairs __attribute__((vector_size(kVectorBytes)));

inline Vec<float> as_floats(Pairs bits) {
  Vec<float> value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// C[kRows, kLanes] = or += A B over `steps` pairs; A as in multiply() below.
template <int kRows, bool kPacked>
void narrow_tile(const uint16_t* a, int64_t row_stride, const uint16_t* panel, int64_t steps,
                 float* c, int64_t c_stride, bool accumulate) {
  Vec<float> sum[kRows] = {};
  for (int64_t k = 0; k < steps; ++k) {
    Pairs b;
    std::memcpy(&b, panel + k * 2 * kPanel, sizeof b);
    const Vec<float> second = as_floats(b & 0xffff0000u);
    const Vec<float> first = as_floats(b << 16);
    for (int i = 0; i < kRows; ++i) {
      const uint16_t* pair = kPacked ? a + 2 * i + k * 2 * kMicroRows : a + i * row_stride + 2 * k;
      sum[i] += to_arithmetic(BFloat16{pair[1]}) * second;
      sum[i] += to_arithmetic(BFloat16{pair[0]}) * first;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    float* row = c + i * c_stride;
    store_vector(row, accumulate ? sum[i] + load_vector(row) : sum[i]);
  }
}

template <bool kPackedPairs>
struct MicroTiles {
  static constexpr bool kPacked = kPackedPairs;

  /// C[rows, 32] = or += A B over `steps` pairs. Element (i, k) of A: a + i * row_stride + 2 k for rows,
  /// a + 2 i + k * 2 * kMicroRows for packed pairs.
  static void multiply(int64_t rows, const uint16_t* a, int64_t row_stride, const uint16_t* panel,
                       int64_t steps, float* c, int64_t c_stride, bool accumulate) {
    for (int64_t i = 0; i < rows; i += kRowsAtOnce) {
      const int64_t height = smaller(kRowsAtOnce, rows - i);
      const auto tile = height == 4   ? narrow_tile<4, kPacked>
                        : height == 3 ? narrow_tile<3, kPacked>
                        : height == 2 ? narrow_tile<2, kPacked>
                                      : narrow_tile<1, kPacked>;
      const uint16_t* left = a + i * (kPacked ? 2 : row_stride);
      for (int64_t j = 0; j < kPanel; j += kLanes<float>) {
        tile(left, row_stride, panel + 2 * j, steps, c + i * c_stride + j, c_stride, accumulate);
      }
    }
  }
};

void pack_transposed(const uint16_t* source, int64_t stride, const int64_t* rows, int64_t count,
                     int64_t inner, uint16_t* panel) {
  for (int64_t k = 0; k < inner + inner % 2; ++k) {
    for (int64_t i = 0; i < kPanel; ++i) {
      const bool inside = k < inner && i < count;
      panel[(k / 2 * kPanel + i) * 2 + k % 2] = inside ? source[rows[i] * stride + k] : 0;
    }
  }
}

void interleave_rows(const uint16_t* source, int64_t stride, const int64_t* rows, int64_t inner,
                     int64_t columns, int64_t width, uint16_t* out) {
  for (int64_t k = 0; k < inner + inner % 2; ++k) {
    const uint16_t* row = k < inner ? source + (rows != nullptr ? rows[k] : k) * stride : nullptr;
    for (int64_t j = 0; j < width; ++j) {
      out[(k / 2 * width + j) * 2 + k % 2] = row != nullptr && j < columns ? row[j] : 0;
    }
  }
}

void score_tile(const ScoreTile& tile) {
  compute_score_tile<MicroTiles<false>>(tile, [](uint16_t* to, Vec<float> value, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = fp16_bits(value[i]);
  });
}

void gradient_tile(const GradientTile& tile) {
  const float* log_factors = fill_gradient_factors(tile);
  for (int64_t v = 0; v < tile.classes; ++v) {
    uint16_t* row = tile.data + v * tile.stride;
    const float w = tile.class_weight != nullptr ? tile.class_weight[v] : 1.0f;
    float sum = 0;
    for (int64_t t = 0; t < tile.tokens; t += kLanes<float>) {
      const int64_t count = smaller(kLanes<float>, tile.tokens - t);
      Vec<float> e = {};
      for (int64_t i = 0; i < count; ++i) e[i] = to_arithmetic(Float16{row[t + i]});
      Vec<float> factor = load_vector(tile.factors + t);
      if (tile.scale_entropy != nullptr) {
        factor = e > 0 ? factor + log_vector(e) * load_vector(log_factors + t) : factor;
      }
      Vec<float> gradient = e * factor;
      if (tile.scale_w != nullptr) gradient -= load_vector(tile.scale_w + t) * w;
      for (int64_t i = 0; i < count; ++i) {
        row[t + i] = bf16_bits(gradient[i]);
        sum += gradient[i];
      }
    }
    if (tile.bias_sum != nullptr) tile.bias_sum[v] += sum;
  }
}

void update_rows(const RowUpdate& u) {
  for (int64_t i = 0; i < u.rows; ++i) {
    const float* sums = u.sums + i * u.sums_stride;
    uint16_t* row = u.gradient + i * u.gradient_stride;
    if (u.exponents != nullptr) {
      update_compact_row(sums, u.scale, u.columns, u.read, u.round, row,
                         u.exponents + i * u.exponents_stride);
    } else if (u.low != nullptr) {
      update_fp32_row(sums, u.scale, u.columns, u.read, u.round, row,
                      u.low + i * u.gradient_stride);
    } else {
      for (int64_t d = 0; d < u.columns; ++d) {
        const float before = u.read ? to_arithmetic(BFloat16{row[d]}) : 0;
        row[d] = bf16_bits(before + sums[d] * u.scale);
      }
    }
  }
}

}  // namespace

Bf16Kernels bf16_kernels_portable() {
  return {pack_transposed,
          interleave_rows,
          score_tile,
          gradient_tile,
          copy_rows,
          multiply<MicroTiles<false>>,
          multiply<MicroTiles<true>>,
          update_rows};
}

}  // namespace memeff
