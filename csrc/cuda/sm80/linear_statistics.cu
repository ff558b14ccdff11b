// Softmax statistics of logits that are never stored: matrix product and online softmax in one
// kernel.
//
//   u = x W^T   ->   max_v z, sum_v exp(z - max), z_y, ... per token
//
// A thread block computes 128 tokens x a range of classes, tile by tile of 128 classes
// (gemm_tile.cuh). After each tile the accumulators are folded into running statistics in
// registers: every thread owns 2 of 8 adjacent columns of 4 rows, so it keeps 4 states. At the end
// the 4 lanes that share a row merge by shuffles, then the two warps that share a row through
// shared memory. Ranges of classes are merged by a second, tiny kernel, in ascending order: results
// do not depend on timing.
//
// x is read once per range, W once per 128 tokens; 2 tokens features classes FLOPs on tensor cores.
// Shared memory: 3 stages of 16 KiB. Numerics: fp32 accumulators, nothing is rounded to 16 bits.
#include "cuda/common/online_softmax.cuh"
#include "cuda/sm80/gemm_tile.cuh"

namespace memeff::cuda {

namespace {

using namespace sm80;

struct Epilogue {
  LogitTransform<float> transform;
  const float* class_weight;  // of column 0, or null
  const int64_t* target;
  int64_t first_class;
};

// Statistics of every range of classes: [ranges, tokens].
template <bool kFull>
using State = RowState<float, kFull>;

// Folds the tile whose first column is `first_column` into the states of the thread's four rows.
template <bool kFull>
MEMEFF_DEVICE void fold_tile(State<kFull> (&states)[4], const Accumulators& c, int64_t first_column,
                             int64_t classes, const int64_t (&target)[4],
                             const Epilogue& epilogue) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    State<kFull>& state = states[r];
    float z[16];
    float new_max = state.max;
#pragma unroll
    for (int v = 0; v < 16; ++v) {
      const int j = v / 2, e = r % 2 * 2 + v % 2;
      const int64_t column = first_column + column_in_tile(j, e);
      z[v] = -INFINITY;  // beyond the last class
      if (column >= classes) continue;
      z[v] = epilogue.transform.logit(c.value[r / 2][j][e], column);
      if (kFull && z[v] > new_max) state.argmax = epilogue.first_class + column;
      if (column == target[r]) state.target = z[v];
      if (kFull)
        state.weighted +=
            (epilogue.class_weight == nullptr ? 1.f : epilogue.class_weight[column]) * z[v];
      new_max = larger(new_max, z[v]);
    }
    state.rescale(new_max);
    const float reference = reference_of(new_max);
#pragma unroll
    for (int v = 0; v < 16; ++v) {
      const float exp_z = exponential(z[v] - reference);
      state.sum += exp_z;
      if (kFull && z[v] != -INFINITY) state.entropy += exp_z * z[v];
    }
  }
}

// Two blocks per SM hide each other's barriers; the full statistics take too many registers for
// that.
template <class T, bool kAligned, bool kFull>
__global__ void __launch_bounds__(kThreads, kFull ? 1 : 2)
    linear_statistics_kernel(Operand<T> x, Operand<T> w, Epilogue epilogue, int tiles_per_range,
                             State<true>* partial) {
  MEMEFF_DYNAMIC_SHARED(stages);
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int64_t first_tile = int64_t{blockIdx.y} * tiles_per_range;
  const int64_t all_tiles = (w.rows + kColumns - 1) / kColumns;
  const int64_t tiles =
      all_tiles - first_tile < tiles_per_range ? all_tiles - first_tile : tiles_per_range;
  const int64_t slices = (x.depth + kDepth - 1) / kDepth;
  const int64_t steps = tiles * slices;

  // Step s: slice s % slices of k of tile s / slices, in buffer s % kStages.
  const auto start_load = [&](int64_t step) {
    if (step < steps) {
      unsigned char* stage = stages + step % kStages * kStageBytes;
      const int64_t k = step % slices * kDepth;
      load_slice<kAligned>(stage, x, first_row, k);
      load_slice<kAligned>(stage + kOperandBytes, w, (first_tile + step / slices) * kColumns, k);
    }
    ptx::cp_async_commit();  // also when empty: the wait below counts groups
  };

  State<kFull> states[4];
  int64_t target[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t token = first_row + row_in_tile(r / 2, r % 2 * 2);
    states[r].argmax = epilogue.first_class + w.rows;  // after every real class
    target[r] = epilogue.target != nullptr && token < x.rows
                    ? epilogue.target[token] - epilogue.first_class
                    : -1;
  }

  for (int stage = 0; stage < kStages - 1; ++stage) start_load(stage);
  Accumulators c;
  c.clear();
  for (int64_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    // This step's slice has arrived for everybody, and everybody has left the buffer of the
    // previous step, which the next load overwrites.
    __syncthreads();
    start_load(step + kStages - 1);
    multiply_slice<T>(c, stages + step % kStages * kStageBytes);
    if (step % slices == slices - 1) {
      fold_tile(states, c, (first_tile + step / slices) * kColumns, w.rows, target, epilogue);
      c.clear();
    }
  }
  // No copy is in flight: the last groups are empty.

  auto* right_half =
      reinterpret_cast<State<kFull>*>(stages);  // [kRows], by the warps of columns 64+
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    states[r].merge(state_of_lane(states[r], 1));
    states[r].merge(state_of_lane(states[r], 2));
    if (threadIdx.x >= kThreads / 2 && threadIdx.x % 4 == 0)
      right_half[row_in_tile(r / 2, r % 2 * 2)] = states[r];
  }
  __syncthreads();
  if (threadIdx.x >= kThreads / 2 || threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = row_in_tile(r / 2, r % 2 * 2);
    if (first_row + row >= x.rows) continue;
    states[r].merge(right_half[row]);
    State<true>& out = partial[int64_t{blockIdx.y} * x.rows + first_row + row];
    out.max = states[r].max;
    out.sum = states[r].sum;
    out.target = states[r].target;
    if (!kFull) continue;
    out.entropy = states[r].entropy;
    out.weighted = states[r].weighted;
    out.argmax = states[r].argmax;
  }
}

// One thread per token.
template <bool kFull>
__global__ void merge_ranges_kernel(const State<true>* partial, int64_t tokens, int ranges,
                                    bool continues, float* max, float* sum, float* target,
                                    float* weighted, float* entropy, int64_t* argmax) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (token >= tokens) return;
  State<kFull> state;
  if (continues) {
    state.max = max[token];
    state.sum = sum[token];
    if (target != nullptr) state.target = target[token];
    if (kFull && weighted != nullptr) state.weighted = weighted[token];
    if (kFull && entropy != nullptr) state.entropy = entropy[token];
    if (kFull && argmax != nullptr) state.argmax = argmax[token];
  }
  for (int range = 0; range < ranges; ++range) {
    const State<true>& from = partial[range * tokens + token];
    State<kFull> other;
    other.max = from.max;
    other.sum = from.sum;
    other.target = from.target;
    if (kFull) {
      other.entropy = from.entropy;
      other.weighted = from.weighted;
      other.argmax = from.argmax;
    }
    state.merge(other);
  }
  max[token] = state.max;
  sum[token] = state.sum;
  if (target != nullptr) target[token] = state.target;
  if (kFull && weighted != nullptr) weighted[token] = state.weighted;
  if (kFull && entropy != nullptr) entropy[token] = state.entropy;
  if (kFull && argmax != nullptr) argmax[token] = state.argmax;
}

// Ranges of classes: enough blocks for two waves of a large GPU, whatever the GPU, so that results
// are the same everywhere.
struct Ranges {
  int count, tiles_each;
};
Ranges divide_classes(int64_t tokens, int64_t classes) {
  constexpr int64_t kWantedBlocks = 2 * 132;
  const int64_t tiles = (classes + kColumns - 1) / kColumns;
  const int64_t row_tiles = (tokens + kRows - 1) / kRows;
  const int64_t wanted = (kWantedBlocks + row_tiles - 1) / row_tiles;
  const int64_t each = (tiles + wanted - 1) / wanted;
  return {static_cast<int>((tiles + each - 1) / each), static_cast<int>(each)};
}

template <class T>
bool chunks_are_aligned(const Operand<T>& operand) {
  return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && operand.stride % kChunk == 0;
}

template <class T, bool kAligned, bool kFull>
Status launch(const LinearLogits& logits, const TokenStatistics& statistics, bool continues,
              void* workspace, void* stream) {
  const Operand<T> x{static_cast<const T*>(logits.input), logits.tokens, logits.features,
                     logits.input_stride};
  const Operand<T> w{static_cast<const T*>(logits.weight), logits.classes, logits.features,
                     logits.weight_stride};
  const auto* bias = static_cast<const float*>(logits.bias);
  const auto* weight = static_cast<const float*>(logits.class_weight);
  const Epilogue epilogue{
      {bias == nullptr ? nullptr : bias + logits.first_class,
       static_cast<float>(logits.logit_scale), static_cast<float>(logits.softcap)},
      weight == nullptr ? nullptr : weight + logits.first_class,
      logits.target,
      logits.first_class};
  const Ranges ranges = divide_classes(logits.tokens, logits.classes);
  const int tiles_per_range = ranges.tiles_each;
  auto* partial = static_cast<State<true>*>(workspace);
  const auto row_tiles = static_cast<unsigned>((logits.tokens + kRows - 1) / kRows);

  const auto kernel = linear_statistics_kernel<T, kAligned, kFull>;
  const Status allowed = allow_shared_memory(kernel, kSharedBytes);
  if (!allowed.ok()) return allowed;
  MEMEFF_LAUNCH(kernel, dim3(row_tiles, static_cast<unsigned>(ranges.count)), dim3(kThreads),
                kSharedBytes, stream, x, w, epilogue, tiles_per_range, partial);

  const int64_t tokens = logits.tokens;
  const int count = ranges.count;
  auto* max = static_cast<float*>(statistics.max);
  auto* sum = static_cast<float*>(statistics.sum);
  auto* target = static_cast<float*>(statistics.target);
  auto* weighted = static_cast<float*>(statistics.weighted);
  auto* entropy = static_cast<float*>(statistics.entropy);
  int64_t* argmax = statistics.argmax;
  MEMEFF_LAUNCH(merge_ranges_kernel<kFull>, dim3(static_cast<unsigned>((tokens + 127) / 128)),
                dim3(128), 0, stream, partial, tokens, count, continues, max, sum, target, weighted,
                entropy, argmax);
  return launch_status();
}

template <class T>
Status select(const LinearLogits& logits, const TokenStatistics& statistics, bool continues,
              void* workspace, void* stream) {
  const bool aligned = chunks_are_aligned(Operand<T>{static_cast<const T*>(logits.input), 0, 0,
                                                     logits.input_stride}) &&
                       chunks_are_aligned(Operand<T>{static_cast<const T*>(logits.weight), 0, 0,
                                                     logits.weight_stride});
  const bool full = statistics.weighted != nullptr || statistics.entropy != nullptr ||
                    statistics.argmax != nullptr;
  if (aligned && full)
    return launch<T, true, true>(logits, statistics, continues, workspace, stream);
  if (aligned) return launch<T, true, false>(logits, statistics, continues, workspace, stream);
  if (full) return launch<T, false, true>(logits, statistics, continues, workspace, stream);
  return launch<T, false, false>(logits, statistics, continues, workspace, stream);
}

}  // namespace

int64_t linear_statistics_workspace(int64_t tokens, int64_t classes) {
  if (tokens == 0 || classes == 0) return 0;
  return divide_classes(tokens, classes).count * tokens * static_cast<int64_t>(sizeof(State<true>));
}

Status linear_statistics(const LinearLogits& logits, const TokenStatistics& statistics,
                         bool continues, void* workspace, void* stream) {
  if (logits.tokens == 0 || logits.classes == 0) return {};
  if (statistics.max == nullptr || statistics.sum == nullptr)
    return {"linear_statistics: max and sum must be given"};
  if (statistics.target_mass != nullptr)
    return {"linear_statistics: class probabilities need stored logits"};
  switch (logits.dtype) {
    case DType::kBFloat16:
      return select<__nv_bfloat16>(logits, statistics, continues, workspace, stream);
    case DType::kFloat16: return select<__half>(logits, statistics, continues, workspace, stream);
    default: return {"linear_statistics: inputs are bfloat16 or float16"};
  }
}

}  // namespace memeff::cuda
