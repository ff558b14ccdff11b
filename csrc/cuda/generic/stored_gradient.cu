// From stored scores to the gradient with respect to the products, in place, any architecture.
//
//   E [classes, tokens] fp16 = exp(z - m), m [tiles, tokens] fp32, the maximum over kStoredTile
//   classes  ->  (E exp(m - shift) (softmax + entropy (z - centre)) + weighted w_v) slope,
//   slope = 1 - (z / softcap)^2, in 16 bits, with z = m + log E where a term needs it; the entry of an
//   index target is given
//
// A thread block of 8 warps owns 256 adjacent tokens, 8 (16 bytes) per lane, and one tile of
// classes, 16 per warp. A lane first folds exp(m - shift) and softmax of its tokens into one factor
// each; most losses then take one product per score (kFull false). No shared memory. Moves
// 4 classes tokens bytes; bound by memory.
//
// For the gradient of the bias the thread block takes all tokens of its classes, one tile of tokens after
// the other, and adds gradients up before they are rounded: a warp sums the tokens of a row, whose sum
// stays in a lane of its own. A fixed order, which the number of tokens determines.
//
// Numerics: fp32, one rounding. E = 0 means p = 0, whatever its z was, so that a soft cap's
// derivative is not needed; with `weighted` it would be.
#include "core/math.h"
#include "cuda/common/logit_gradient.cuh"
#include "cuda/common/token_sum.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kLanes = 32, kWarps = 8;
constexpr int kTokens = kPerVector<__half>;  // of a lane
constexpr int kTile = kLanes * kTokens;      // tokens of a thread block
constexpr int kRows = kStoredTile / kWarps;  // classes of a warp
static_assert(kRows <= kLanes, "a lane for each row's sum");
constexpr int kBatch = 4;  // of them loaded before the warp works on them

struct StoredArguments {
  StoredScores scores;
  int64_t tiles_per_block, blocks_per_row;  // tiles of tokens
  Block block;
  LogitTransform<float> transform;
  const int64_t* index;
  Coefficients coefficients;
  const float* target_gradient;
  BiasSums bias;  // from the block's first class on
};

// dz/du dz from E
template <bool kFull>
MEMEFF_DEVICE float gradient_of(float e, float weight, const StoredFactors& f,
                                const LogitTransform<float>& transform) {
  float gradient = softmax_gradient(e, f.softmax);
  if (!kFull || f.left_out) return gradient;
  if (e == 0.f) return gradient + f.weighted * weight;  // NaN where lse is
  const float log_e = logf(e);
  if (f.entropy != 0.f) gradient += e * f.entropy * (f.above_centre + log_e);
  return (gradient + f.weighted * weight) * transform.slope_of_logit(f.max + log_e);
}

// Rows [begin, end) of a warp's tokens; adds their sums to row_sum, row `begin` + r in lane r.
template <class G, bool kFull>
MEMEFF_DEVICE void convert_tile(const StoredArguments& arguments, int64_t class_tile,
                                int64_t token_tile, int64_t begin, int64_t end, float* row_sum) {
  const int64_t token = token_tile * kTile + static_cast<int>(threadIdx.x) * kTokens;
  const int count = count_left<kTokens>(token, arguments.block.tokens);
  StoredFactors factors[kTokens];
  {
    TokenCoefficients<float> c[kTokens];
    load_coefficients(c, arguments.coefficients, token, count);
    float max[kTokens];
    load(max, arguments.scores.maxima + class_tile * arguments.scores.maxima_stride + token, count);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) factors[i] = stored_factors(c[i], max[i]);
  }
  // Bit r: a token of this thread has its target in row `begin` + r. Which one is read again there: few
  // rows have any, and all targets would take registers that there are not.
  unsigned rows_of_targets = 0;
  {
    int target[kTokens];
    load_targets(target, arguments.index, arguments.block, token, count);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (target[i] >= begin && target[i] < end && !factors[i].left_out)
        rows_of_targets |= 1u << (target[i] - begin);
  }

  auto* const scores = static_cast<__half*>(arguments.scores.data);
  for (int64_t v = begin; v < end; v += kBatch) {
    __half e[kBatch][kTokens];
#pragma unroll
    for (int r = 0; r < kBatch; ++r)
      if (v + r < end) load(e[r], scores + (v + r) * arguments.scores.stride + token, count);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      if (v + r >= end) continue;
      const float weight = kFull ? arguments.transform.weight_of(v + r) : 1.f;
      float gradient[kTokens];
      G rounded[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
        gradient[i] = gradient_of<kFull>(widen(e[r][i]), weight, factors[i], arguments.transform);
      if ((rows_of_targets >> (v + r - begin) & 1) != 0) {
        int target[kTokens];
        load_targets(target, arguments.index, arguments.block, token, count);
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
          if (target[i] == v + r && !factors[i].left_out)
            gradient[i] = arguments.target_gradient[token + i];
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) rounded[i] = narrow<G>(gradient[i]);
      store(reinterpret_cast<G*>(scores + (v + r) * arguments.scores.stride) + token, rounded,
            count);
      if (arguments.bias.sums != nullptr)
        add_to_row(row_sum, static_cast<int>(v + r - begin),
                   sum_of_tokens(gradient, arguments.bias.factors, token, count));
    }
  }
}

// kFull: with soft cap, entropy, weighted.
template <class G, bool kFull>
__global__ void __launch_bounds__(kLanes* kWarps, 2)
    stored_gradient_kernel(StoredArguments arguments) {
  const int64_t class_tile = blockIdx.x / arguments.blocks_per_row;
  const int64_t first = blockIdx.x % arguments.blocks_per_row * arguments.tiles_per_block;
  const int64_t begin = class_tile * kStoredTile + static_cast<int>(threadIdx.y) * kRows;
  const int64_t classes = arguments.block.classes;
  const int64_t end = begin + kRows < classes ? begin + kRows : classes;
  float row_sum = 0.f;
  for (int64_t tile = first; tile < first + arguments.tiles_per_block; ++tile)
    convert_tile<G, kFull>(arguments, class_tile, tile, begin, end, &row_sum);
  const int64_t row = begin + static_cast<int>(threadIdx.x);
  if (arguments.bias.sums != nullptr && row < end) arguments.bias.sums[row] += row_sum;
}

// 4 instantiations: 2 types, with and without what few losses need.
template <class G>
Status launch(const StoredArguments& arguments, bool full, void* stream) {
  const auto kernel = full ? stored_gradient_kernel<G, true> : stored_gradient_kernel<G, false>;
  const int64_t blocks = arguments.blocks_per_row * ceil_div(arguments.block.classes, kStoredTile);
  MEMEFF_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kLanes, kWarps), 0, stream,
                arguments);
  return launch_status();
}

}  // namespace

Status stored_gradient(const StoredGradient& call, void* stream) {
  const Block& block = call.block;
  const Coefficients& coefficients = call.coefficients;
  if (block.tokens == 0 || block.classes == 0) return {};
  if (block.first_class % kStoredTile != 0)
    return {"stored_gradient: the block begins inside a tile of classes"};
  if (call.targets.probabilities != nullptr)
    return {"stored_gradient: class probabilities need stored products"};
  if (call.terms.softcap != 0 && coefficients.weighted != nullptr)
    return {"stored_gradient: softcap with `weighted` needs stored products"};
  if (call.targets.index != nullptr && call.target_gradient == nullptr)
    return {"stored_gradient: index targets need target_gradient"};
  StoredArguments arguments;
  arguments.scores = call.scores;
  const int64_t token_tiles = ceil_div(block.tokens, kTile);
  const bool sums = call.bias.sums != nullptr;
  arguments.tiles_per_block = sums ? token_tiles : 1;
  arguments.blocks_per_row = sums ? 1 : token_tiles;
  arguments.block = block;
  arguments.transform = logit_transform<float>(call.terms, block.first_class);
  arguments.index = call.targets.index;
  arguments.coefficients = coefficients;
  arguments.target_gradient = call.target_gradient;
  arguments.bias = call.bias;
  if (sums) arguments.bias.sums += block.first_class;
  const bool full = call.terms.softcap != 0 || coefficients.entropy != nullptr ||
                    coefficients.weighted != nullptr;
  switch (call.gradient_dtype) {
    case DType::kBFloat16: return launch<__nv_bfloat16>(arguments, full, stream);
    case DType::kFloat16: return launch<__half>(arguments, full, stream);
    default: return {"stored_gradient: gradients are bfloat16 or float16"};
  }
}

}  // namespace memeff::cuda
