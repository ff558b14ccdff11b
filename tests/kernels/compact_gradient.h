// A gradient as compact sums (core/compact_sum.h), next to what the scalar model makes of the same fp32
// sums. Kernels must leave the model's bits.
#pragma once

#include <algorithm>
#include <vector>

#include "core/weight_update.h"
#include "cpu/compact_sum.h"
#include "kernels/linear_case.h"

namespace memeff::cuda {

template <class T>
class CompactGradient {
 public:
  CompactGradient(int64_t rows, int64_t columns, int64_t padding, int64_t offset)
      : gradient("gradient", rows, columns, padding, offset, BufferAccess::kReadWrite),
        blocks_((columns + kCompactBlock - 1) / kCompactBlock),
        exponents_stride_((blocks_ + 3) / 4 * 4 + 4),
        exponents_("exponents", rows * exponents_stride_, BufferAccess::kReadWrite),
        codes_(static_cast<std::size_t>(rows * columns)),
        model_exponents_(static_cast<std::size_t>(rows * blocks_)) {
    std::fill(exponents_.begin(), exponents_.end(), kPoison);
  }
  SplitSums split() {
    SplitSums split;
    split.exponents = exponents_.data();
    split.exponents_stride = exponents_stride_;
    return split;
  }

  // After an update by sums(row, column), fp32 numbers: whether the gradient is what it should be.
  template <class Sums>
  bool is_model_after(WeightUpdate update, const Sums& sums, float scale) {
    bool same = gradient.padding_is_untouched();
    for (int64_t row = 0; row < gradient.rows; ++row)
      for (int64_t block = 0; block < exponents_stride_; ++block)
        same &= block < blocks_ ? block_is_model(update, sums, scale, row, block)
                                : exponents_[row * exponents_stride_ + block] == kPoison;
    return same;
  }

  GuardedMatrix<T> gradient;

 private:
  static constexpr uint8_t kPoison = 0;  // as an exponent: a unit that makes NaN even of zeros

  template <class Sums>
  bool block_is_model(WeightUpdate update, const Sums& sums, float scale, int64_t row,
                      int64_t block) {
    const int64_t first = block * kCompactBlock;
    const int64_t count = std::min(kCompactBlock, gradient.columns - first);
    uint16_t* const codes = codes_.data() + row * gradient.columns + first;
    uint8_t& exponent = model_exponents_[static_cast<std::size_t>(row * blocks_ + block)];
    float values[kCompactBlock];
    for (int64_t i = 0; i < count; ++i) {
      values[i] = sums(row, first + i);
      if (update != WeightUpdate::kSplitFirst) values[i] += load_compact(codes[i], exponent);
    }
    const bool last = update == WeightUpdate::kSplitLast;
    if (!last) exponent = compact_exponent(values, count);
    bool same = last || exponents_[row * exponents_stride_ + block] == exponent;
    for (int64_t i = 0; i < count; ++i) {
      const T got = gradient.at(row, first + i);
      if (last) {
        same &= is_same(got, T(values[i] * scale));
        continue;
      }
      codes[i] = compact_code(values[i], exponent);
      uint16_t code;
      std::memcpy(&code, static_cast<const void*>(&got), sizeof code);
      // Which of the NaNs does not matter.
      same &= code == codes[i] || (std::isnan(load_compact(code, exponent)) &&
                                   std::isnan(load_compact(codes[i], exponent)));
    }
    return same;
  }
  static bool is_same(T a, T b) {
    return std::memcmp(&a, &b, sizeof a) == 0 ||
           (std::isnan(to_double(a)) && std::isnan(to_double(b)));
  }

  int64_t blocks_, exponents_stride_;
  GuardedArray<uint8_t> exponents_;
  std::vector<uint16_t> codes_;  // of the model
  std::vector<uint8_t> model_exponents_;
};

}  // namespace memeff::cuda
