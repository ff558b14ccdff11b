// From stored products to scores that are kept in 16 bits, with the statistics of tiles of classes; any
// architecture.
//
//   u [classes, tokens] fp32  ->  E = exp(z - m) [classes, tokens] fp16, and per token and tile of
//   kStoredTile classes m = max_v z, sum_v exp(z_v - m), ...
//
// A thread block of 8 warps owns 128 adjacent tokens, 4 (16 bytes) per lane, and one tile of classes, 16
// per warp. Its logits stay in registers, 64 of a thread: the products are read once, with all loads in
// flight together. The warps agree on the maxima through shared memory (4 KiB); each then writes its E
// and hands over its sums (4 KiB, 16 KiB with what few losses need), which 128 threads add up in the order
// of the warps: results do not depend on timing.
//
// Scores that are not kept have the same statistics, bit by bit.
//
// Moves 6 classes tokens bytes; bound by memory, by the L2 cache where the products fit it.
//
// Numerics: fp32; sums are of fp32 exponentials, not of the rounded E.
#include "core/math.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kLanes = 32, kWarps = 8;
constexpr int kTokens = kPerVector<float>;   // of a lane
constexpr int kTile = kLanes * kTokens;      // tokens of a thread block
constexpr int kRows = kStoredTile / kWarps;  // classes of a warp

struct KeepArguments {
  const float* products;
  int64_t stride, token_tiles;
  Block block;
  LogitTransform<float> transform;
  const int64_t* index;
  PartialStatistics partials;
  float* target_logit;
  __half* scores;  // null: not kept
  int64_t scores_stride;
};

// kFull: everything; else max, sum and the target's logit.
template <bool kFull>
__global__ void __launch_bounds__(kLanes* kWarps, 2) keep_scores_kernel(KeepArguments arguments) {
  constexpr int kFullCount = kFull ? kWarps * kTile : 1;
  MEMEFF_SHARED_ARRAY(float, maxima, kWarps* kTile);
  MEMEFF_SHARED_ARRAY(float, sums, kWarps* kTile);
  MEMEFF_SHARED_ARRAY(float, entropies, kFullCount);
  MEMEFF_SHARED_ARRAY(float, smooths, kFullCount);
  MEMEFF_SHARED_ARRAY(int32_t, argmaxima, kFullCount);

  const Block& block = arguments.block;
  const auto& transform = arguments.transform;
  const int warp = threadIdx.y, lane = threadIdx.x;
  const int64_t class_tile = blockIdx.x / arguments.token_tiles;
  const int64_t first_token = blockIdx.x % arguments.token_tiles * kTile;
  const int64_t token = first_token + lane * kTokens;
  const int count = count_left<kTokens>(token, block.tokens);
  const int64_t begin = class_tile * kStoredTile + warp * kRows;
  const int rows = count_left<kRows>(begin, block.classes);
  const auto first_of_tile = static_cast<int32_t>(block.first_class + class_tile * kStoredTile);

  float z[kRows][kTokens];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (r < rows) load(z[r], arguments.products + (begin + r) * arguments.stride + token, count);

  SoftmaxState<float, kFull> states[kTokens];
#pragma unroll
  for (auto& state : states) state.argmax = first_of_tile;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
    const float bias = transform.bias_of(begin + r);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      z[r][i] = transform.logit(z[r][i], bias);
      if (kFull && z[r][i] > states[i].max)
        states[i].argmax = static_cast<int32_t>(block.first_class + begin + r);
      states[i].max = larger(states[i].max, z[r][i]);
    }
  }
  const int at = warp * kTile + lane * kTokens;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    maxima[at + i] = states[i].max;
    if (kFull) argmaxima[at + i] = states[i].argmax;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
    for (int other = 0; other < kWarps; ++other)
      states[i].max = larger(states[i].max, maxima[other * kTile + lane * kTokens + i]);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
    __half kept[kTokens];
    const float weight = kFull ? transform.weight_of(begin + r) : 1.f;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      auto& state = states[i];
      const float shifted = z[r][i] - reference_of(state.max), e = exponential(shifted);
      kept[i] = narrow<__half>(e);
      state.sum += e;
      if (!kFull) continue;
      if (z[r][i] != -INFINITY) state.entropy += e * shifted;  // x exp x tends to 0 as x to -inf
      if (arguments.partials.smooth != nullptr) state.smooth += weight * z[r][i];
    }
    if (arguments.scores != nullptr)
      store(arguments.scores + (begin + r) * arguments.scores_stride + token, kept, count);
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    sums[at + i] = states[i].sum;
    if (kFull) entropies[at + i] = states[i].entropy, smooths[at + i] = states[i].smooth;
  }
  __syncthreads();

  const int mine = warp * kLanes + lane;  // of the tile's tokens
  const int64_t my_token = first_token + mine;
  if (mine >= kTile || my_token >= block.tokens) return;
  SoftmaxState<float, kFull> merged;
  merged.argmax = first_of_tile;
  for (int from = 0; from < kWarps; ++from) {
    const int there = from * kTile + mine;
    // The first of equal maxima.
    if (kFull && maxima[there] > merged.max) merged.argmax = argmaxima[there];
    merged.max = larger(merged.max, maxima[there]);
    merged.sum += sums[there];
    if (kFull) merged.entropy += entropies[there], merged.smooth += smooths[there];
  }
  merged.write(arguments.partials, class_tile, my_token);
  if (arguments.target_logit == nullptr || arguments.index == nullptr) return;
  const int64_t v = arguments.index[my_token] - block.first_class;
  if (v / kStoredTile == class_tile && v >= 0 && v < block.classes)
    arguments.target_logit[my_token] =
        transform.logit(arguments.products[v * arguments.stride + my_token], transform.bias_of(v));
}

}  // namespace

Status keep_scores(const KeptScores& call, void* stream) {
  const Block& block = call.block;
  if (block.tokens == 0 || block.classes == 0) return {};
  if (call.partials.max == nullptr || call.partials.sum == nullptr)
    return {"keep_scores: max and sum must be given"};
  if (call.targets.probabilities != nullptr)
    return {"keep_scores: class probabilities need stored products"};
  KeepArguments arguments;
  arguments.products = call.products;
  arguments.stride = call.stride;
  arguments.token_tiles = ceil_div(block.tokens, kTile);
  arguments.block = block;
  arguments.transform = logit_transform<float>(call.terms, block.first_class);
  arguments.index = call.targets.index;
  arguments.partials = call.partials;
  arguments.target_logit = call.target_logit;
  arguments.scores = static_cast<__half*>(call.scores);
  arguments.scores_stride = call.scores_stride;
  const auto kernel =
      wants_full(call.partials) ? keep_scores_kernel<true> : keep_scores_kernel<false>;
  const int64_t tiles = ceil_div(block.classes, kStoredTile);
  const dim3 grid(static_cast<unsigned>(tiles * arguments.token_tiles));
  MEMEFF_LAUNCH(kernel, grid, dim3(kLanes, kWarps), 0, stream, arguments);
  return launch_status();
}

}  // namespace memeff::cuda
