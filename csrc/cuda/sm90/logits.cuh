// Logits from the accumulators of u = x W^T, for the two kernels that start with that product:
// C = [tokens, classes], rows of A are tokens, rows of B classes, both K-major.
//
// An epilogue works on halves of 128 classes (kStoredTile) of a warpgroup's 64 tokens: 64
// accumulators per thread, 2 tokens x 32 classes; the 4 lanes of a quad share the tokens.
#pragma once

#include "cuda/common/logit_transform.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tile_store.cuh"

namespace memeff::cuda::sm90 {

constexpr int kHalfN = static_cast<int>(kStoredTile);
constexpr int kHalves = kTileN / kHalfN;
constexpr int kHalfCount = kHalfN / 2;  // accumulators per thread
static_assert(kHalves == 2 && kTokenTile == kTileM);

using TokensOperand = OperandTile<Major::kK, kTileM>;
template <int kCluster>
using ClassesOperand = OperandTile<Major::kK, kTileN, kCluster>;

// The producer's thread: loads `steps` steps of each of the block's tiles.
template <int kCluster>
MEMEFF_DEVICE void load_score_tiles(Ring<kCluster>& ring, const TensorMap* x, const TensorMap* w,
                                    int steps, const TileOrder<kCluster>& order) {
  for (int number = order.first(); number < order.count(); number += order.stride()) {
    int row, column;
    order.place(number, &row, &column);
    for (int step = 0; step < steps; ++step)
      load_step<TokensOperand, ClassesOperand<kCluster>>(ring, x, w, row * kTileM, column * kTileN,
                                                         step * kStepK);
  }
  finish_loads(ring);
}

// The thread's k-th class of a half comes class_offset(k) after its first one: a constant, so that
// comparisons and addresses need no register per accumulator. `accumulator` is where the half's
// numbers of token r (0 or 1) and this class lie.
constexpr int kClassesPerThread = kHalfCount / 2;
MEMEFF_DEVICE constexpr int class_offset(int k) { return k / 2 * 8 + k % 2; }
MEMEFF_DEVICE constexpr int accumulator(int r, int k) { return k / 2 * 4 + r * 2 + k % 2; }
MEMEFF_DEVICE int first_class_of_thread(int first_of_half) {
  return first_of_half + lane_index() % 4 * 2;
}

// exp x of a logit's distance from a maximum or from lse: a relative error of 2^-22 + |x| 2^-24,
// far below the rounding of what is stored, and in sums below that of the logits themselves.
MEMEFF_DEVICE float fast_exp(float x) { return ptx::exp2_approximate(x * 1.4426950408889634f); }

// What turns products into logits, for a block of scores.
struct Scores {
  LogitTransform<float> transform;
  const int64_t* target;  // [tokens] of the vocabulary, or null
  int64_t first_class;
  int classes, tokens;

  // Counted from the block's first class; negative: none there.
  MEMEFF_DEVICE int target_of(int token) const {
    if (target == nullptr || token >= tokens) return -1;
    const int64_t index = target[token] - first_class;
    return index >= 0 && index < classes ? static_cast<int>(index) : -1;
  }

  // Products of a half become what the soft cap is applied to; -inf past the last class. `first` is the
  // thread's first class. Loops are repeated rather than their conditions: these are the same for the
  // whole launch.
  MEMEFF_DEVICE void to_scaled(float (&z)[kHalfCount], int first) const {
    if (transform.bias != nullptr) {
#pragma unroll
      for (int k = 0; k < kClassesPerThread; ++k) {
        const int offset = class_offset(k);
        const float bias = offset < classes - first ? transform.bias[first + offset] : 0.f;
        z[accumulator(0, k)] += bias;
        z[accumulator(1, k)] += bias;
      }
    }
    if (transform.scale != 1.f) {
#pragma unroll
      for (float& x : z) x *= transform.scale;
    }
    drop_classes_beyond(z, first);
  }
  // And logits.
  MEMEFF_DEVICE void to_logits(float (&z)[kHalfCount], int first) const {
    to_scaled(z, first);
    if (transform.softcap == 0.f) return;
#pragma unroll
    for (float& x : z) x = transform.capped(x);
    drop_classes_beyond(z, first);
  }

 private:
  MEMEFF_DEVICE void drop_classes_beyond(float (&z)[kHalfCount], int first) const {
    if (classes - first >= kHalfN) return;
#pragma unroll
    for (int k = 0; k < kClassesPerThread; ++k)
      if (class_offset(k) >= classes - first)
        z[accumulator(0, k)] = z[accumulator(1, k)] = -INFINITY;
  }
};

inline Scores make_scores(const Block& block, const LogitTerms& terms, const Targets& targets) {
  return {logit_transform<float>(terms, block.first_class), targets.index, block.first_class,
          static_cast<int>(block.classes), static_cast<int>(block.tokens)};
}

// Few halves contain a target of any of the warp's 16 tokens: whether this one does.
MEMEFF_DEVICE bool warp_has_target(const int (&target)[2], int first_of_half) {
  const int a = target[0] - first_of_half, b = target[1] - first_of_half;
  return __any_sync(~0u, (a >= 0 && a < kHalfN) || (b >= 0 && b < kHalfN)) != 0;
}

// Launches a kernel that takes maps of x, of W and of `stored` [classes, tokens], to which boxes of 64 x
// 64 go, then Scores, features, TileOrder and `rest`.
template <class T, int kCluster, class Kernel, class Call, class... Rest>
Status launch_on_scores(Kernel kernel, const Call& call, void* stored, int64_t stored_stride,
                        TensorMapElement stored_element, void* stream, const Rest&... rest) {
  const Block& block = call.block;
  const LinearOperands& operands = call.operands;
  TensorMap x, w, stored_map{};
  Status status = TokensOperand::map(operands.input, map_element<T>(), operands.features,
                                     block.tokens, operands.input_stride, &x);
  if (status.ok())
    status = ClassesOperand<kCluster>::map(operands.weight, map_element<T>(), operands.features,
                                           block.classes, operands.weight_stride, &w);
  if (status.ok() && stored != nullptr)
    status = OperandTile<Major::kMn, kPanel>::map(stored, stored_element, block.tokens,
                                                  block.classes, stored_stride, &stored_map);
  const auto order = tile_order<kCluster>(block.tokens, count_tiles(block.classes, kTileN));
  unsigned blocks = 0;
  if (status.ok()) status = persistent_blocks(kernel, order, &blocks);
  if (!status.ok()) return status;
  const Scores scores = make_scores(block, call.terms, call.targets);
  const auto features = static_cast<int>(operands.features);
  MEMEFF_LAUNCH_CLUSTERS(kCluster, kernel, dim3(blocks), dim3(kThreads), kSharedBytes, stream, x, w,
                         stored_map, scores, features, order, rest...);
  return launch_status();
}

}  // namespace memeff::cuda::sm90
