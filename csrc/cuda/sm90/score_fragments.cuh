// Operand A of wgmma from stored scores: a consumer warp makes its 16 rows of G in registers, 16 of k at
// a time, by one ldmatrix (transposed for grad_input, whose rows are columns of E), the factors of
// score_factors.cuh, fp32 products and one rounding.
//
// Register i holds row lane / 4 + 8 (i % 2) of the warp's 16, columns pair + 8 (i / 2) and the next
// of 16 k, pair = 2 (lane % 4).
#pragma once

#include "cuda/sm90/score_factors.cuh"

namespace memeff::cuda::sm90 {

// Two adjacent entries of G. The minimum is that of softmax_gradient(), two at a time.
template <class T>
MEMEFF_DEVICE uint32_t entries(uint32_t scores, float low, float high) {
  constexpr uint32_t kOnes = 0x3c003c00u;
  const uint32_t limited = ptx::min_of_halves(scores, kOnes);
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &limited, sizeof pair);
  const float2 e = __half22float2(pair);
  return pack(e.x * low, e.y * high, T{});
}

MEMEFF_DEVICE void replace(uint32_t& pair, int which, uint32_t entry) {
  pair = which == 0 ? (pair & 0xffff0000u) | entry : (pair & 0xffffu) | entry << 16;
}

template <class T, Major kMajorOfG>
class ScoresAsA;

template <class T>
class ScoresAsA<T, Major::kMn> {
 public:
  struct Raw {  // 16 k of E as ldmatrix loads them
    uint32_t e[4];
  };

  MEMEFF_DEVICE ScoresAsA(const ScoreFactors& scores, int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = row * kTileM + row_in_tile(r), count = token < scores.block.tokens ? 1 : 0;
      TokenCoefficients<float> coefficients[1];
      scores.load_tokens(coefficients, token, count);
      int target[1];
      load_targets(target, scores.index, scores.block, token, count);
      target_[r] = coefficients[0].all_zero() ? -1 : target[0];
      entry_[r] = target_[r] < 0 ? 0 : bits_of(narrow<T>(scores.target_gradient[token]));
    }
    // Matrix lane / 8 of ldmatrix: k 0-7, 0-7, 8-15, 8-15, rows 0-7, 8-15, 0-7, 8-15.
    const int k = lane_index() / 16 * 8 + lane_index() % 8;
    const int piece = warp_of_group() * 2 + lane_index() / 8 % 2;
    offset_ = consumer_group() * OperandTile<Major::kMn, kTileM>::kPanelBytes + k * 128 +
              ((piece ^ k % 8) << 4);
  }
  MEMEFF_DEVICE void begin_step(const StepFactors<Major::kMn>& step) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor_[r] = step.factor[row_in_tile(r)];
      column_[r] = target_[r] - step.first_class;
      any |= column_[r] >= 0 && column_[r] < kStepK;
    }
    has_target_ = __any_sync(~0u, any) != 0;
  }
  MEMEFF_DEVICE void load(Raw& raw, uint32_t tile, int k16) const {
    ptx::ldmatrix_x4_trans(raw.e, tile + offset_ + k16 * 2 * ptx::kAtomBytes);
  }
  MEMEFF_DEVICE void make(uint32_t (&a)[4], const Raw& raw, int k16) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = entries<T>(raw.e[i], factor_[i % 2], factor_[i % 2]);
    if (!has_target_) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int which = column_[i % 2] - (k16 * 16 + i / 2 * 8 + lane_index() % 4 * 2);
      if (which == 0 || which == 1) replace(a[i], which, entry_[i % 2]);
    }
  }

 private:
  uint32_t offset_;
  int target_[2];  // class of the block, or -1
  uint32_t entry_[2];
  // For the current step:
  float factor_[2];
  int column_[2];
  bool has_target_;
};

template <class T>
class ScoresAsA<T, Major::kK> {
 public:
  struct Raw {
    uint32_t e[4];
    float2 factor[2];  // of the thread's two pairs of columns
  };

  MEMEFF_DEVICE ScoresAsA(const ScoreFactors&, int) {
    // Matrix lane / 8 of ldmatrix: rows 0-7, 8-15, 0-7, 8-15, k 0-7, 0-7, 8-15, 8-15.
    const int row = consumer_group() * kGroupM + warp_of_group() * 16 + lane_index() % 16;
    offset_ = row * 128 + ((lane_index() / 16 ^ row % 8) << 4);
  }
  MEMEFF_DEVICE void begin_step(const StepFactors<Major::kK>& step) {
    step_ = &step;
    has_target_ = step.has_target;
  }
  MEMEFF_DEVICE void load(Raw& raw, uint32_t tile, int k16) const {
    ptx::ldmatrix_x4(raw.e, tile + (offset_ ^ k16 << 5));  // two pieces of 16 bytes further
#pragma unroll
    for (int half = 0; half < 2; ++half) raw.factor[half] = step_->factor[pair(k16, half)];
  }
  MEMEFF_DEVICE void make(uint32_t (&a)[4], const Raw& raw, int k16) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = entries<T>(raw.e[i], raw.factor[i / 2].x, raw.factor[i / 2].y);
    if ((has_target_ >> 8 * k16 & 0xff) == 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 target = step_->target[pair(k16, half)];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto row = static_cast<uint32_t>(row_in_tile(r));
        if (target.x >> 16 == row) replace(a[2 * half + r], 0, target.x & 0xffff);
        if (target.y >> 16 == row) replace(a[2 * half + r], 1, target.y & 0xffff);
      }
    }
  }

 private:
  MEMEFF_DEVICE static int pair(int k16, int half) { return k16 * 8 + half * 4 + lane_index() % 4; }
  uint32_t offset_;
  // For the current step:
  const StepFactors<Major::kK>* step_;
  uint32_t has_target_;
};

}  // namespace memeff::cuda::sm90
