// Softmax statistics of a block of stored products, any architecture.
//
//   u [classes, tokens] -> max_v z, sum_v exp(z_v - max), ... per token and range of classes
//
// A thread block of 8 warps owns kTile adjacent tokens (32 lanes x 16 bytes: 128 floats or 64
// doubles) and one range of classes. Each lane keeps the running statistics (online softmax) of its
// tokens in registers; warp w takes classes 4 w to 4 w + 3 of every 32, four loads of 512 bytes in
// flight per warp. So nothing is reduced across lanes; at the end the warps' states meet in shared
// memory (8 to 32 KiB) and are merged in the order of the warps: results depend on
// classes_per_range alone.
//
// Moves classes * tokens * sizeof(A) bytes, once; bound by memory. Class probabilities come one by
// one, whatever their strides.
//
// Numerics: everything in A; one exp per logit, one more per token and four classes when the
// maximum moves.
#include "core/math.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kLanes = 32, kWarps = 8;
constexpr int kBatch = 4;  // classes that a warp loads before it works on them
template <class A>
constexpr int kTile = kLanes * kPerVector<A>;  // tokens of a thread block

template <class A>
struct StatisticsArguments {
  const A* products;
  int64_t stride, classes_per_range, token_tiles;
  Block block;
  LogitTransform<A> transform;
  const int64_t* index;
  ProbabilityTargets<A> probabilities;
  PartialStatistics partials;
  A* target_logit;
  const double* token_scale;  // [tokens] or null
};

// Sums over class probabilities q of one token.
template <class A>
struct ProbabilitySums {
  A dot = A(0), mass = A(0), plain = A(0);  // of w q z, w q, q z

  MEMEFF_DEVICE void add(A q, A w, A z) {
    // A class that is not wanted does not matter, even where z is -inf.
    if (q * w != A(0)) dot += q * w * z;
    if (q != A(0)) plain += q * z;
    mass += q * w;
  }
};

// Arrays [kWarps, kTile] in shared memory, in which warps hand over what they found.
template <class A, bool kFull>
struct Exchange {
  static constexpr int kFields = kFull ? 7 : 2;
  A* values;
  int32_t* argmax;

  MEMEFF_DEVICE A& at(int field, int warp, int token) const {
    return values[(field * kWarps + warp) * kTile<A> + token];
  }
  MEMEFF_DEVICE void put(int warp, int token, const SoftmaxState<A, kFull>& state,
                         const ProbabilitySums<A>& sums) const {
    at(0, warp, token) = state.max;
    at(1, warp, token) = state.sum;
    if (!kFull) return;
    at(2, warp, token) = state.entropy;
    at(3, warp, token) = state.smooth;
    at(4, warp, token) = sums.dot;
    at(5, warp, token) = sums.mass;
    at(6, warp, token) = sums.plain;
    argmax[warp * kTile<A> + token] = state.argmax;
  }
  MEMEFF_DEVICE void merge_into(SoftmaxState<A, kFull>& state, ProbabilitySums<A>& sums, int warp,
                                int token) const {
    SoftmaxState<A, kFull> other;
    other.max = at(0, warp, token);
    other.sum = at(1, warp, token);
    if (kFull) {
      other.entropy = at(2, warp, token);
      other.smooth = at(3, warp, token);
      other.argmax = argmax[warp * kTile<A> + token];
      sums.dot += at(4, warp, token);
      sums.mass += at(5, warp, token);
      sums.plain += at(6, warp, token);
    }
    state.merge(other);
  }
};

// kFull: everything; else max, sum and the target's logit.
template <class A, bool kFull>
__global__ void __launch_bounds__(kLanes* kWarps, 2)
    block_statistics_kernel(StatisticsArguments<A> arguments) {
  constexpr int kTokens = kPerVector<A>;  // of a lane
  constexpr int kFields = Exchange<A, kFull>::kFields;
  MEMEFF_SHARED_ARRAY(A, values, kFields * kWarps * kTile<A>);
  MEMEFF_SHARED_ARRAY(int32_t, argmax, kFull ? kWarps* kTile<A> : 1);
  const Exchange<A, kFull> exchange{values, argmax};

  const Block& block = arguments.block;
  const auto& transform = arguments.transform;
  const int warp = threadIdx.y, lane = threadIdx.x;
  const int64_t range = blockIdx.x / arguments.token_tiles;
  const int64_t first_token = blockIdx.x % arguments.token_tiles * kTile<A>;
  const int64_t begin = range * arguments.classes_per_range;
  const int64_t end = begin + arguments.classes_per_range < block.classes
                          ? begin + arguments.classes_per_range
                          : block.classes;
  const auto first_of_range = static_cast<int32_t>(block.first_class + begin);
  const int64_t token = first_token + lane * kTokens;
  const int count = count_left<kTokens>(token, block.tokens);

  A token_scale[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
    token_scale[i] = scale_of_token<A>(arguments.token_scale, token + i, i < count);

  SoftmaxState<A, kFull> states[kTokens];
  ProbabilitySums<A> sums[kTokens];
#pragma unroll
  for (auto& state : states) state.argmax = first_of_range;

  for (int64_t v = begin + warp * kBatch; v < end; v += kWarps * kBatch) {
    A z[kBatch][kTokens];
#pragma unroll
    for (int r = 0; r < kBatch; ++r)
      if (v + r < end) load(z[r], arguments.products + (v + r) * arguments.stride + token, count);

    A new_max[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) new_max[i] = states[i].max;
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      if (v + r >= end) continue;
      const A bias = transform.bias_of(v + r);
      const A weight = kFull ? transform.weight_of(v + r) : A(1);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        z[r][i] = transform.logit(z[r][i], bias) * token_scale[i];
        if (kFull && z[r][i] > new_max[i])
          states[i].argmax = static_cast<int32_t>(block.first_class + v + r);
        new_max[i] = larger(new_max[i], z[r][i]);
        if (kFull && arguments.partials.smooth != nullptr) states[i].smooth += weight * z[r][i];
        if (kFull && arguments.probabilities.data != nullptr && i < count)
          sums[i].add(arguments.probabilities.at(token + i, v + r), weight, z[r][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (new_max[i] != states[i].max) states[i].raise(new_max[i]);
#pragma unroll
      for (int r = 0; r < kBatch; ++r)
        if (v + r < end) states[i].add(z[r][i]);
    }
  }

#pragma unroll
  for (int i = 0; i < kTokens; ++i) exchange.put(warp, lane * kTokens + i, states[i], sums[i]);
  __syncthreads();

  const int mine = warp * kLanes + lane;  // of the tile's tokens
  const int64_t my_token = first_token + mine;
  if (mine >= kTile<A> || my_token >= block.tokens) return;
  SoftmaxState<A, kFull> merged;
  ProbabilitySums<A> merged_sums;
  merged.argmax = first_of_range;
  for (int from = 0; from < kWarps; ++from) exchange.merge_into(merged, merged_sums, from, mine);

  const PartialStatistics& to = arguments.partials;
  merged.write(to, range, my_token);
  const int64_t at = range * to.stride + my_token;
  if (kFull && to.target_dot != nullptr) static_cast<A*>(to.target_dot)[at] = merged_sums.dot;
  if (kFull && to.target_mass != nullptr) static_cast<A*>(to.target_mass)[at] = merged_sums.mass;
  if (kFull && to.target_plain != nullptr) static_cast<A*>(to.target_plain)[at] = merged_sums.plain;
  if (arguments.target_logit != nullptr && arguments.index != nullptr) {
    const int64_t v = arguments.index[my_token] - block.first_class;
    if (v >= begin && v < end)
      arguments.target_logit[my_token] =
          transform.logit(arguments.products[v * arguments.stride + my_token],
                          transform.bias_of(v)) *
          scale_of_token<A>(arguments.token_scale, my_token, true);
  }
}

// 4 instantiations: 2 types, with and without what few losses need.
template <class A>
Status launch(const BlockStatistics& call, void* stream) {
  const Block& block = call.block;
  StatisticsArguments<A> arguments;
  arguments.products = static_cast<const A*>(call.products);
  arguments.stride = call.stride;
  arguments.classes_per_range = call.classes_per_range;
  arguments.token_tiles = ceil_div(block.tokens, kTile<A>);
  arguments.block = block;
  arguments.transform = logit_transform<A>(call.terms, block.first_class);
  arguments.index = call.targets.index;
  arguments.probabilities = probability_targets<A>(call.targets, block.first_class);
  arguments.partials = call.partials;
  arguments.target_logit = static_cast<A*>(call.target_logit);
  arguments.token_scale = call.token_scale;

  const bool full = wants_full(call.partials) || call.targets.probabilities != nullptr;
  const auto kernel = full ? block_statistics_kernel<A, true> : block_statistics_kernel<A, false>;
  const int64_t ranges = ceil_div(block.classes, call.classes_per_range);
  const dim3 grid(static_cast<unsigned>(ranges * arguments.token_tiles));
  MEMEFF_LAUNCH(kernel, grid, dim3(kLanes, kWarps), 0, stream, arguments);
  return launch_status();
}

}  // namespace

Status block_statistics(const BlockStatistics& call, void* stream) {
  const PartialStatistics& partials = call.partials;
  if (call.block.tokens == 0 || call.block.classes == 0) return {};
  if (partials.max == nullptr || partials.sum == nullptr)
    return {"block_statistics: max and sum must be given"};
  if (call.classes_per_range <= 0) return {"block_statistics: classes_per_range must be positive"};
  const bool wants_targets = partials.target_dot != nullptr || partials.target_mass != nullptr ||
                             partials.target_plain != nullptr;
  if (wants_targets && call.targets.probabilities == nullptr)
    return {"block_statistics: sums over targets need class probabilities"};
  switch (call.dtype) {
    case DType::kFloat32: return launch<float>(call, stream);
    case DType::kFloat64: return launch<double>(call, stream);
    default: return {"block_statistics: products are float32 or float64"};
  }
}

}  // namespace memeff::cuda
