// Softmax statistics of logits that are never stored, or are stored in 16 bits, on sm_90a.
//
//   u = x W^T  ->  z  ->  per 128 classes and token: max z, sum exp(z - max), z_y, ...
//                         (kStore) E = exp(z - max), fp16, [classes, tokens]
//
// x [tokens, features], W [classes, features], partial statistics [classes / 128, tokens]. The
// pipeline, its tiles of 128 tokens x 256 classes and its map of shared memory are pipeline.cuh's.
//
// M is tokens, so that a thread's 128 accumulators belong to two tokens: their statistics are made in
// its registers and the 4 lanes of a quad meet by shuffles. A tile is two halves of 128 classes, each
// with statistics of its own. Kept scores are transposed on the way to shared memory (stmatrix) and are
// stored by TMA while the next half is computed and the next tile multiplied. The statistics of a token
// depend neither on other tokens nor on whether scores are kept.
//
// Numerics: fp32 throughout; sums are of fp32 exponentials, not of the rounded E. The exponential's
// relative error is 2^-22 near the maximum and grows by 2^-24 per unit of z below it, where terms
// count less. E rounds to 2^-11.
//
// Work: 2 tokens classes features FLOPs. At 8192 x 128256 x 4096, 8.6 TFLOP: predicted 13.5 ms on
// an H100 or H200, 13.7 ms with kept scores (docs/kernels-sm90.md has the assumptions). Epilogue:
// per tile 32768 exponentials, 2048 cycles of the special function units, against 16 * features
// cycles of tensor cores: 3 % at 4096 features, as far as it does not overlap. Kept scores are 2.1
// GB there.
#include "cuda/common/online_softmax.cuh"
#include "cuda/sm90/logits.cuh"

namespace memeff::cuda::sm90 {

namespace {

// Where statistics go.
struct StatisticsOutput {
  PartialStatistics partials;
  float* target_logit;  // [tokens] or null
  float* kept_maxima;   // [halves, tokens] of kept scores; null where partials.max is the same
  int64_t maxima_stride;
};

// The states of the thread's two tokens from logits of 128 classes; `first` is the thread's first
// class. With kStore, z becomes exp(z - max). Maximum and argmax are the same in all lanes of a quad;
// the sums are each lane's own.
template <bool kFull, bool kStore>
MEMEFF_DEVICE void fold_half(SoftmaxState<float, kFull> (&states)[2], float (&z)[kHalfCount],
                             int first, const Scores& scores) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    auto& state = states[r];
    float half_max = -INFINITY;
#pragma unroll
    for (int k = 0; k < kClassesPerThread; ++k)
      half_max = ptx::max_or_nan(half_max, z[accumulator(r, k)]);
    half_max = quad_max(half_max);
    if (kFull) {
      int best = kHalfN;
#pragma unroll
      for (int k = 0; k < kClassesPerThread; ++k)
        if (z[accumulator(r, k)] == half_max) best = min(best, class_offset(k));
      best += first;
      best = min(best, __shfl_xor_sync(~0u, best, 1));
      best = min(best, __shfl_xor_sync(~0u, best, 2));
      if (half_max > state.max) state.argmax = static_cast<int>(scores.first_class + best);
    }
    state.max = half_max;
    const float reference = reference_of(half_max);
#pragma unroll
    for (int k = 0; k < kClassesPerThread; ++k) {
      float& value = z[accumulator(r, k)];
      const float x = value - reference, e = fast_exp(x);
      state.sum += e;
      if (kFull && class_offset(k) < scores.classes - first) {
        if (x != -INFINITY) state.entropy += e * x;
        state.smooth += scores.transform.weight_of(first + class_offset(k)) * value;
      }
      if (kStore) value = e;
    }
  }
}

// The quad's sums meet, one lane writes them.
template <bool kFull>
MEMEFF_DEVICE void write_half(SoftmaxState<float, kFull> state, int64_t half, int token,
                              const Scores& scores, const StatisticsOutput& out) {
  state.sum = quad_sum(state.sum);
  if (kFull) {
    state.entropy = quad_sum(state.entropy);
    state.smooth = quad_sum(state.smooth);
  }
  if (lane_index() % 4 != 0 || token >= scores.tokens) return;
  state.write(out.partials, half, token);
  if (out.kept_maxima != nullptr) out.kept_maxima[half * out.maxima_stride + token] = state.max;
}

template <class T, bool kFull, bool kStore, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    linear_statistics_kernel(const __grid_constant__ TensorMap x,
                             const __grid_constant__ TensorMap w,
                             const __grid_constant__ TensorMap kept, Scores scores, int features,
                             TileOrder<kCluster> order, StatisticsOutput out) {
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
  for (int number = order.first(); number < order.count(); number += order.stride()) {
    int row, column;
    order.place(number, &row, &column);
    int token[2], target[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      token[r] = row * kTileM + row_in_tile(r);
      target[r] = scores.target_of(token[r]);
    }
    float c[kTileN / 2];
    mainloop<T, TokensOperand, Classes>(c, ring, steps);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int first = column * kTileN + half * kHalfN;
      if (first >= scores.classes) break;
      float(&z)[kHalfCount] = reinterpret_cast<float(&)[kHalfCount]>(c[half * kHalfCount]);
      const int mine = first_class_of_thread(first);
      scores.to_logits(z, mine);
      if (out.target_logit != nullptr && warp_has_target(target, first)) {
#pragma unroll
        for (int k = 0; k < kClassesPerThread; ++k)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (class_offset(k) == target[r] - mine)
              out.target_logit[token[r]] = z[accumulator(r, k)];
      }
      SoftmaxState<float, kFull> states[2];
#pragma unroll
      for (auto& state : states) state.argmax = static_cast<int>(scores.first_class + first);
      fold_half<kFull, kStore>(states, z, mine, scores);
      if (kStore) {
#pragma unroll
        for (int part = 0; part < kHalfN / kPanel; ++part) {
          fill_box_transposed<__half>(boxes.begin(), z + part * kPanel / 2);
          boxes.end(&kept, row * kTileM + consumer_group() * kGroupM, first + part * kPanel);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
        write_half<kFull>(states[r], first / kHalfN, token[r], scores, out);
    }
  }
  if (kStore) boxes.finish();
#endif
}

template <class T, bool kFull, bool kStore, int kCluster>
Status launch(const LinearStatistics& call, const StatisticsOutput& out, void* stream) {
  return launch_on_scores<T, kCluster>(linear_statistics_kernel<T, kFull, kStore, kCluster>, call,
                                       call.scores.data, call.scores.stride,
                                       TensorMapElement::kFloat16, stream, out);
}

template <class T, int kCluster>
Status select(const LinearStatistics& call, const StatisticsOutput& out, void* stream) {
  const bool store = call.scores.data != nullptr;
  const auto full = store ? launch<T, true, true, kCluster> : launch<T, true, false, kCluster>;
  const auto plain = store ? launch<T, false, true, kCluster> : launch<T, false, false, kCluster>;
  return (wants_full(out.partials) ? full : plain)(call, out, stream);
}

}  // namespace

template <int kCluster>
Status linear_statistics(const LinearStatistics& call, void* stream) {
  const Block& block = call.block;
  const PartialStatistics& partials = call.partials;
  const StoredScores& scores = call.scores;
  if (block.tokens == 0 || block.classes == 0) return {};
  const Status checked = check(call);
  if (!checked.ok()) return checked;
  if (!accepts(call.operands, scores.data, scores.stride))
    return {"linear_statistics: sm90 needs 16-bit rows that start at multiples of 16 bytes"};

  StatisticsOutput out;
  out.partials = partials;
  out.target_logit = call.target_logit;
  out.kept_maxima =
      scores.data != nullptr && scores.maxima != partials.max ? scores.maxima : nullptr;
  out.maxima_stride = scores.maxima_stride;
  const auto typed = call.operands.dtype == DType::kBFloat16 ? select<__nv_bfloat16, kCluster>
                                                             : select<__half, kCluster>;
  return typed(call, out, stream);
}
template Status linear_statistics<1>(const LinearStatistics& call, void* stream);
template Status linear_statistics<2>(const LinearStatistics& call, void* stream);

}  // namespace memeff::cuda::sm90
