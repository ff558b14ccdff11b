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
static_assert(sizeof(Votes) <= kScratchBytes);

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

template <class T, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    linear_gradient_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                           const __grid_constant__ TensorMap gradient, Scores scores, int features,
                           TileOrder<kCluster> order, Coefficients coefficients,
                           GradientMarks marks) {
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
        fill_box_transposed<T>(boxes.begin(), z + part * kPanel / 2);
        boxes.end(&gradient, row * kTileM + consumer_group() * kGroupM, first + part * kPanel);
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
                                       call.marks.of_gradient());
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
