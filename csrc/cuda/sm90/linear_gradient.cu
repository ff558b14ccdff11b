// The gradient with respect to the products u = x W^T, from products computed again, on sm_90a.
//
//   dz_v = p_v (softmax + entropy (z_v - centre)) + weighted w_v,  p_v = exp(z_v - shift)
//   du_v = dz_v (1 - (z_v / softcap)^2)                       [classes, tokens], as in kernel_arguments.h
//
// x [tokens, features], W [classes, features]; the gradient has their type. One coefficient of each
// kind per token. The pipeline, its tiles of 128 tokens x 256 classes and its map of shared memory
// are pipeline.cuh's.
//
// M is tokens, as in linear_statistics.cu: a thread's 128 accumulators need the coefficients of two
// tokens only. Results are transposed on the way to shared memory and are stored by TMA.
//
// Marks: a tile of 128 classes x 128 tokens counts unless every token's mass in it, sum p, is less
// than mass_per_class * classes, and no target lies in it. The quad sums a token's mass; the 8
// consumer warps vote through shared memory.
//
// The gradient of the bias: before a box of 64 classes x 64 tokens is rounded each warp sums its 16 tokens
// by shuffles, and the 4 warps of the group meet in shared memory, between the box's barriers.
//
// Numerics: fp32, rounded once. The exponential's relative error, 2^-22 near p = 1 and 2^-18 at
// e^-60, is far below the rounding of the result; the target's entry is target_gradient's.
//
// Work: 2 tokens classes features FLOPs, and 2 bytes written per score. At 8192 x 128256 x 4096:
// 8.6 TFLOP, predicted 13.8 ms on an H100 or H200 (docs/kernels-sm90.md).
#include "cuda/common/logit_gradient.cuh"
#include "cuda/sm90/logits.cuh"

namespace memeff::cuda::sm90 {

namespace {

// Votes of the consumer warps on two halves, two sets: the next tile's may come before the last
// have been counted.
using Votes = uint32_t[2][kHalves][kConsumerWarps];
// Sums of 16 tokens each, of the classes of a box.
using WarpSums = float[kConsumerWarps][kPanel];
static_assert(sizeof(Votes) + sizeof(WarpSums) <= kScratchBytes);

// What the soft cap is applied to (Scores::to_scaled), of a half from the thread's first class on, becomes
// gradients. Returns whether the warp
// has anything in it that keeps the tile.
MEMEFF_DEVICE bool to_gradient(float (&z)[kHalfCount], int first,
                               const TokenCoefficients<float> (&coefficients)[2],
                               const int (&target)[2], const Scores& scores, bool has_target,
                               float smallest_mass) {
  const LogitTransform<float>& transform = scores.transform;
  float target_scaled[2] = {};
  if (has_target) {
#pragma unroll
    for (int k = 0; k < kClassesPerThread; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (class_offset(k) == target[r] - first) target_scaled[r] = z[accumulator(r, k)];
  }

  bool keep = has_target;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const TokenCoefficients<float>& c = coefficients[r];
    const bool nothing = c.all_zero();
    float mass = 0.f;
#pragma unroll
    for (int k = 0; k < kClassesPerThread; ++k) {
      float& scaled = z[accumulator(r, k)];
      const bool exists = class_offset(k) < scores.classes - first;
      // Capped, -inf past the last class would be a class like others.
      const float value = transform.softcap == 0.f ? scaled
                          : exists                 ? transform.capped(scaled)
                                                   : -INFINITY;
      const float p = fast_exp(value - c.shift);
      mass += p;
      float dz = p * c.softmax;
      if (c.entropy != 0.f && value != -INFINITY) dz += p * c.entropy * (value - c.centre);
      if (c.weighted != 0.f && exists)
        dz += c.weighted * transform.weight_of(first + class_offset(k));
      if (transform.softcap != 0.f) dz *= transform.slope(scaled);
      scaled = nothing ? 0.f : dz;
    }
    mass = quad_sum(mass);
    keep |= !nothing && !(mass < smallest_mass);
  }

  if (has_target) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool mine = target[r] >= 0 && !coefficients[r].all_zero();
      const float du = mine ? coefficients[r].target_gradient(transform.capped(target_scaled[r]),
                                                              transform.weight_of(target[r])) *
                                  transform.slope(target_scaled[r])
                            : 0.f;
#pragma unroll
      for (int k = 0; k < kClassesPerThread; ++k)
        if (mine && class_offset(k) == target[r] - first) z[accumulator(r, k)] = du;
    }
  }
  return __any_sync(~0u, keep) != 0;
}

// What the warps of this warpgroup have put into `sums` goes to the partial sums of the classes from
// `first_class` on.
MEMEFF_DEVICE void write_partials(const BiasPartials& partials, const WarpSums& sums,
                                  int first_token, int first_class, const Scores& scores) {
  static_assert(kGroupM == kBiasTokens && kGroupThreads >= kPanel);
  const int column = static_cast<int>(threadIdx.x) % kGroupThreads, v = first_class + column;
  if (column >= kPanel || v >= scores.classes || first_token >= scores.tokens) return;
  float sum = 0.f;
  for (int warp = 0; warp < 4; ++warp) sum += sums[4 * consumer_group() + warp][column];
  partials.sums[v * partials.stride + first_token / kBiasTokens] = sum;
}

// Once per tile, all consumers: who has voted for the marks of its two halves.
MEMEFF_DEVICE void write_marks(Votes& votes, int set, const GradientMarks& marks, int token_tile,
                               int first_class, const Scores& scores) {
  ptx::bar_sync(kVotesBarrier, kConsumerGroups * kGroupThreads);
  const int half = static_cast<int>(threadIdx.x) - kGroupThreads;
  if (half >= kHalves || first_class + half * kHalfN >= scores.classes ||
      token_tile * kTileM >= scores.tokens)
    return;
  uint32_t keep = 0;
  for (const uint32_t vote : votes[set][half]) keep |= vote;
  const int64_t class_tile = first_class / kHalfN + half;
  marks.tiles[class_tile * marks.stride + token_tile] = static_cast<uint8_t>(keep);
}

// Of 2 kLeft sums of this lane's classes, half go to a lane with other tokens, whose other half comes here.
template <int kLeft>
MEMEFF_DEVICE void halve(float (&sums)[kPanel / 4]) {
  constexpr int kOther = 2 * kLeft;  // lane 16, 8 or 4 away
  const bool upper = (lane_index() & kOther) != 0;
#pragma unroll
  for (int k = 0; k < kLeft; ++k) {
    const float kept = upper ? sums[k + kLeft] : sums[k];
    const float given = upper ? sums[k] : sums[k + kLeft];
    sums[k] = kept + __shfl_xor_sync(~0u, given, kOther);
  }
}

// Of the gradients of a box, sums over the warp's 16 tokens: each lane gets those of classes 2 lane and
// the next of 64.
MEMEFF_DEVICE void sum_over_warp(float* to, const float* z, const float* factors, int first_token,
                                 int tokens) {
  constexpr int kCount = kPanel / 4;
  float factor[2], sums[kCount];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = first_token + row_in_tile(r);
    factor[r] = factors == nullptr || token >= tokens ? 1.f : factors[token];
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    sums[k] = factor[0] * z[accumulator(0, k)] + factor[1] * z[accumulator(1, k)];
  halve<8>(sums), halve<4>(sums), halve<2>(sums);
  const float pair[2] = {sums[0], sums[1]};
  store(to + 2 * lane_index(), pair);
}

template <class T, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    linear_gradient_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                           const __grid_constant__ TensorMap gradient, Scores scores, int features,
                           TileOrder<kCluster> order, Coefficients coefficients,
                           GradientMarks marks, BiasPartials partials) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  MEMEFF_DYNAMIC_SHARED(shared_memory);
  using Classes = ClassesOperand<kCluster>;
  auto ring = start_ring<kCluster>(shared_memory);
  const int steps = (features + kStepK - 1) / kStepK;

  if (is_producer()) {
    ptx::decrease_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    load_score_tiles(ring, &x, &w, steps, order);
    return;
  }

  ptx::increase_registers<kConsumerRegisters>();
  BoxStore boxes(shared_memory);
  auto& votes = *reinterpret_cast<Votes*>(shared_memory + kScratchAt);
  auto& sums = *reinterpret_cast<WarpSums*>(shared_memory + kScratchAt + sizeof(Votes));
  int set = 0;
  for (int number = order.first(); number < order.count(); number += order.stride(), set ^= 1) {
    int row, column;
    order.place(number, &row, &column);
    const int first_class = column * kTileN;
    TokenCoefficients<float> of_token[2];
    int target[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = row * kTileM + row_in_tile(r);
      TokenCoefficients<float> loaded[1];
      load_coefficients(loaded, coefficients, token, token < scores.tokens ? 1 : 0);
      of_token[r] = loaded[0];
      target[r] = scores.target_of(token);
    }
    float c[kTileN / 2];
    mainloop<T, TokensOperand, Classes>(c, ring, steps);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int first = first_class + half * kHalfN;
      if (first >= scores.classes) break;
      float(&z)[kHalfCount] = reinterpret_cast<float(&)[kHalfCount]>(c[half * kHalfCount]);
      const int mine = first_class_of_thread(first);
      scores.to_scaled(z, mine);
      const float smallest_mass = marks.mass_per_class * min(kHalfN, scores.classes - first);
      const bool keep = to_gradient(z, mine, of_token, target, scores,
                                    warp_has_target(target, first), smallest_mass);
      if (lane_index() == 0) votes[set][half][threadIdx.x / 32 - kGroupThreads / 32] = keep ? 1 : 0;
#pragma unroll
      for (int part = 0; part < kHalfN / kPanel; ++part) {
        const int first_token = row * kTileM + consumer_group() * kGroupM;
        const int first_of_box = first + part * kPanel;
        unsigned char* const box = boxes.begin();  // and all have read the last sums
        if (partials.sums != nullptr)
          sum_over_warp(sums[threadIdx.x / 32 - kGroupThreads / 32], z + part * kPanel / 2,
                        partials.factors, row * kTileM, scores.tokens);
        fill_box_transposed<T>(box, z + part * kPanel / 2);
        boxes.end(&gradient, first_token, first_of_box);  // and all have written theirs
        if (partials.sums != nullptr)
          write_partials(partials, sums, first_token, first_of_box, scores);
      }
    }
    if (marks.tiles != nullptr) write_marks(votes, set, marks, row, first_class, scores);
  }
  boxes.finish();
#endif
}

template <class T, int kCluster>
Status launch(const LinearGradient& call, void* stream) {
  return launch_on_scores<T, kCluster>(linear_gradient_kernel<T, kCluster>, call, call.gradient,
                                       call.stride, map_element<T>(), stream, call.coefficients,
                                       call.marks.of_gradient(), call.bias);
}

}  // namespace

template <int kCluster>
Status linear_gradient(const LinearGradient& call, void* stream) {
  if (call.block.tokens == 0 || call.block.classes == 0) return {};
  const Status checked = check(call);
  if (!checked.ok()) return checked;
  if (call.gradient == nullptr || !accepts(call.operands, call.gradient, call.stride))
    return {"linear_gradient: sm90 needs 16-bit rows that start at multiples of 16 bytes"};
  const auto typed = call.operands.dtype == DType::kBFloat16 ? launch<__nv_bfloat16, kCluster>
                                                             : launch<__half, kCluster>;
  return typed(call, stream);
}
template Status linear_gradient<1>(const LinearGradient& call, void* stream);
template Status linear_gradient<2>(const LinearGradient& call, void* stream);

}  // namespace memeff::cuda::sm90
