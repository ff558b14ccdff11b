// The factors that turn stored scores into their gradient on the way into a product
// (stored_products.cu), from a warp of the producer's group to the consumers.
//
//   G [v, n] = E[v, n] f[n],  f = exp(m - shift) softmax;  target_gradient[n] where v is n's target
//
// The warp keeps as far ahead as TMA does. For each step of k it puts into shared memory (StepFactors)
//   grad_input    f of the tile's 128 rows: constant over 128 classes; consumers know their rows'
//                 targets, and learn which classes the step has
//   grad_weight   f of the step's 64 tokens, and in which row of the tile each has its target
// A stage is full once the bytes of TMA and the factors have arrived; stages of the epilogue's source
// have no factors, and the warp only arrives.
#pragma once

#include "cuda/common/logit_gradient.cuh"
#include "cuda/sm90/gradient_tiles.cuh"

namespace memeff::cuda::sm90 {

// Kernel argument: what G is made of, in addition to E.
struct ScoreFactors {
  Block block;
  const float* maxima;  // [tiles, tokens]
  int64_t maxima_stride;
  const void *shift, *softmax, *target;  // of Coefficients
  const int64_t* index;                  // targets, or null
  const float* target_gradient;

  // Coefficients of kCount adjacent tokens. What this file does not take is known to be zero.
  template <int kCount>
  MEMEFF_DEVICE void load_tokens(TokenCoefficients<float> (&c)[kCount], int token,
                                 int count) const {
    Coefficients known;
    known.shift = shift;
    known.softmax = softmax;
    known.target = target;
    load_coefficients(c, known, token, count);
  }
  template <int kCount>
  MEMEFF_DEVICE void load_maxima(float (&m)[kCount], int class_tile, int token, int count) const {
    load(m, maxima + class_tile * maxima_stride + token, count);
  }
};

template <class T>
MEMEFF_DEVICE uint32_t bits_of(T x) {
  uint16_t bits;
  memcpy(&bits, static_cast<const void*>(&x), sizeof bits);
  return bits;
}

constexpr int kFactorWarp = 1;

template <Major kMajorOfG>
struct StepFactors;

template <>
struct alignas(16) StepFactors<Major::kMn> {  // grad_input
  float factor[kTileM];                       // of every row
  int first_class;
};

template <>
struct alignas(16) StepFactors<Major::kK> {  // grad_weight
  float2 factor[kStepK / 2];                 // of every token; in pairs, as registers hold them
  // The tile's row that has the token's target in the upper half, the entry in the lower.
  uint2 target[kStepK / 2];
  uint32_t has_target;  // bit i: a token of pair i has its target here
};
constexpr uint32_t kNoTargetHere = 0xffffu << 16;

static_assert(kStages * sizeof(StepFactors<Major::kMn>) <= kScratchBytes &&
              kStages * sizeof(StepFactors<Major::kK>) <= kScratchBytes);

// The warp has written the factors of a step, in a stage that was empty.
MEMEFF_DEVICE void end_factors(Ring<1>& ring) {
  __syncwarp();
  if (lane_index() == 0) ptx::mbarrier_arrive(ring.full());
  ring.advance();
}

// Steps that have none, but are full only when this warp has arrived, too.
MEMEFF_DEVICE void pass_steps(Ring<1>& ring, int steps) {
  for (int step = 0; step < steps; ++step) {
    wait_until_empty(ring);
    end_factors(ring);
  }
}

// The factors of a tile of C, k tile by k tile. The whole warp takes part.
template <class T, Major kMajorOfG>
class FactorWriter;

template <class T>
class FactorWriter<T, Major::kMn> {
 public:
  MEMEFF_DEVICE FactorWriter(const ScoreFactors& scores, int row)
      : scores_(scores),
        token_(row * kTileM + lane_index() * kPerLane),
        count_(count_left<kPerLane>(token_, scores.block.tokens)) {
    scores.load_tokens(coefficients_, token_, count_);
  }
  MEMEFF_DEVICE void write(StepFactors<Major::kMn>* factors, Ring<1>& ring, int k) const {
    float max[kPerLane], factor[kPerLane];
    scores_.load_maxima(max, k / kTileK, token_, count_);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) factor[i] = stored_factors(coefficients_[i], max[i]).softmax;
    for (int step = 0; step < kStepsPerTile; ++step) {
      wait_until_empty(ring);
      StepFactors<Major::kMn>& out = factors[ring.stage];
      store(out.factor + lane_index() * kPerLane, factor);
      if (lane_index() == 0) out.first_class = k + step * kStepK;
      end_factors(ring);
    }
  }

 private:
  static constexpr int kPerLane = kTileM / 32;
  const ScoreFactors& scores_;
  int token_, count_;
  TokenCoefficients<float> coefficients_[kPerLane];
};

template <class T>
class FactorWriter<T, Major::kK> {
 public:
  MEMEFF_DEVICE FactorWriter(const ScoreFactors& scores, int row)
      : scores_(scores), class_tile_(row) {}
  MEMEFF_DEVICE void write(StepFactors<Major::kK>* factors, Ring<1>& ring, int k) const {
    for (int step = 0; step < kStepsPerTile; ++step) {
      const int token = k + step * kStepK + lane_index() * kPerLane;
      const int count = count_left<kPerLane>(token, scores_.block.tokens);
      TokenCoefficients<float> coefficients[kPerLane];
      scores_.load_tokens(coefficients, token, count);
      float max[kPerLane], factor[kPerLane], entry[kPerLane] = {};
      scores_.load_maxima(max, class_tile_, token, count);
      int target[kPerLane];
      load_targets(target, scores_.index, scores_.block, token, count);
      if (scores_.index != nullptr) load(entry, scores_.target_gradient + token, count);
      uint32_t packed[kPerLane];
      bool any = false;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const StoredFactors f = stored_factors(coefficients[i], max[i]);
        factor[i] = f.softmax;
        const bool here = target[i] >= 0 && target[i] / kTileM == class_tile_ && !f.left_out;
        any |= here;
        packed[i] =
            here ? static_cast<uint32_t>(target[i] % kTileM) << 16 | bits_of(narrow<T>(entry[i]))
                 : kNoTargetHere;
      }
      const uint32_t has_target = __ballot_sync(~0u, any);
      wait_until_empty(ring);
      StepFactors<Major::kK>& out = factors[ring.stage];
      out.factor[lane_index()] = {factor[0], factor[1]};
      out.target[lane_index()] = {packed[0], packed[1]};
      if (lane_index() == 0) out.has_target = has_target;
      end_factors(ring);
    }
  }

 private:
  static constexpr int kPerLane = 2;
  static_assert(kStepK == 32 * kPerLane);
  const ScoreFactors& scores_;
  int class_tile_;
};

}  // namespace memeff::cuda::sm90
