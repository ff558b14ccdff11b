// Softmax statistics of logits of which at most 16-bit scores are stored: matrix product and
// softmax in one kernel.
//
//   x [tokens, features], W [classes, features]:   u = x W^T, z of u (kernel_arguments.h)
//   per token and tile of 128 classes:   max_v z,  sum_v exp(z - max),  and on request
//                                        sum_v exp(z - max) (z - max),  sum_v w_v z,  argmax
//   per token:                           z_y, written by the one thread that meets the target
//   kStore, per tile of 128 classes:     E [classes, tokens] = exp(z - max) in fp16
//
// A thread block computes one tile of 128 tokens x 128 classes (logits_tile.cuh). The 4 lanes that
// share 8 rows agree on their maxima by shuffles, the two warps that share a row through shared memory;
// then they add up the same way, and 4 lanes keep the states of 2 rows each. With kStore, E is stored
// transposed. A fixed tree: the statistics of a token depend neither on timing, nor on other tokens,
// nor on whether scores are stored.
//
// Shared memory: 48 KiB of pipeline; after the last slice the same memory takes E (34 KiB) and what
// warps exchange. Two blocks of 128 threads per SM. x is read once per 128 classes, W once per 128
// tokens, both mostly from L2; 2 tokens features classes FLOPs on tensor cores, and an exponential
// per logit, 1 per 2 features FLOPs.
// Numerics: fp32 accumulators; sums are of fp32 exponentials, not of the rounded E.
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/sm80/logits_tile.cuh"

namespace memeff::cuda::sm80 {

namespace {

template <bool kFull>
using State = SoftmaxState<float, kFull>;

constexpr int kNoClass = 0x7fffffff;

// Kernel argument: where results go.
struct Results {
  PartialStatistics partials;
  float* target_logit;
  __half* scores;
  int64_t scores_stride;
};

// ---- stored scores ----

// Rows of classes, 128 tokens each. The 16 bytes between rows let the 8 rows that a warp writes at
// once cover all banks.
constexpr int kScoresRowBytes = kRows * 2 + 16;
constexpr int kScoresBytes = kColumns * kScoresRowBytes;

MEMEFF_DEVICE uint32_t pack(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}

// Writes `c`, rounded, to shared memory, transposed. Lanes whose tokens are neighbours swap halves
// first, so that each has a pair of adjacent tokens of one class.
MEMEFF_DEVICE void put_scores(unsigned char* to, const Accumulators& c) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool odd = thread / 4 % 2 != 0;  // of two neighbouring tokens
#pragma unroll
  for (int i = 0; i < kWarpRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
      const uint32_t upper = pack(c.value[i][j][0], c.value[i][j][1]);  // classes v, v + 1
      const uint32_t lower = pack(c.value[i][j][2], c.value[i][j][3]);  // 8 tokens on
      // The even lane keeps class v, the odd one v + 1; low half: upper row, high half: lower row.
      const uint32_t class_0 = (upper & 0xffffu) | lower << 16;
      const uint32_t class_1 = upper >> 16 | (lower & 0xffff0000u);
      const uint32_t kept = odd ? class_1 : class_0;
      const uint32_t received = __shfl_xor_sync(~0u, odd ? class_0 : class_1, 4);
      const uint32_t even_token = odd ? received : kept, odd_token = odd ? kept : received;
      const int column = column_in_tile(j * 2) + (odd ? 1 : 0);
      const int token = row_in_tile(i * 2) & ~1;
      auto* row = reinterpret_cast<uint32_t*>(to + column * kScoresRowBytes + token * 2);
      row[0] = (even_token & 0xffffu) | odd_token << 16;
      row[4] = even_token >> 16 | (odd_token & 0xffff0000u);  // 8 tokens on
    }
}

// Copies what all threads have put to rows `to`, "stride" elements apart, 16 bytes at a time where
// rows are aligned.
MEMEFF_DEVICE void store_scores(const unsigned char* from, __half* to, int64_t stride,
                                int64_t classes, int64_t tokens) {
  constexpr int kChunksPerRow = kRows / kChunk;
#pragma unroll 4
  for (int i = threadIdx.x; i < kColumns * kChunksPerRow; i += kThreads) {
    const int row = i / kChunksPerRow, first = i % kChunksPerRow * kChunk;
    if (row >= classes || first >= tokens) continue;
    __half values[kChunk];
    load(values, reinterpret_cast<const __half*>(from + row * kScoresRowBytes + first * 2));
    store(to + row * stride + first, values, count_left<kChunk>(first, tokens));
  }
}

// ---- statistics of a tile ----

// Shared memory after the pipeline.
constexpr int kMaximaAt = kScoresBytes;               // float [2 halves of the classes][kRows]
constexpr int kStatesAt = kMaximaAt + 2 * kRows * 4;  // State [kRows]
static_assert(kStatesAt + kRows * sizeof(State<true>) <= kPipelineBytes);

// Products to logits, in place; -inf beyond the last class. Loops are repeated rather than their
// conditions, which are the same for the whole launch.
MEMEFF_DEVICE void to_logits(Accumulators& c, const LogitBlock& logits, int64_t first_class) {
  const LogitTransform<float>& transform = logits.transform;
  const int classes = count_left<kColumns>(first_class, logits.block.classes);
  if (transform.bias != nullptr) {
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v) {
      if (column_in_tile(v) >= classes) continue;
      const float bias = transform.bias[first_class + column_in_tile(v)];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) c.at(r, v) += bias;
    }
  }
  if (transform.softcap != 0.f) {
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v)
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) c.at(r, v) = transform.logit(c.at(r, v), 0.f);
  } else {
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v)
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) c.at(r, v) *= transform.scale;
  }
  if (classes == kColumns) return;
#pragma unroll
  for (int v = 0; v < kThreadColumns; ++v) {
    if (column_in_tile(v) < classes) continue;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) c.at(r, v) = -INFINITY;
  }
}

MEMEFF_DEVICE void write_target_logits(Accumulators& c, const LogitBlock& logits,
                                       int64_t first_token, int64_t first_class,
                                       float* target_logit) {
  if (target_logit == nullptr) return;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t token = first_token + row_in_tile(r);
    const int target = target_in_tile(logits, first_class, token);
    if (target < 0) continue;
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v)
      if (column_in_tile(v) == target) target_logit[token] = c.at(r, v);
  }
}

// sums[r] += sum w z over the thread's columns. Column by column, so that weights take no
// registers.
MEMEFF_DEVICE void add_weighted(float (&sums)[kThreadRows], Accumulators& c,
                                const LogitBlock& logits, int64_t first_class) {
#pragma unroll
  for (int v = 0; v < kThreadColumns; ++v) {
    const int64_t column = first_class + column_in_tile(v);
    if (column >= logits.block.classes) continue;
    const float weight = logits.transform.weight_of(column);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) sums[r] += weight * c.at(r, v);
  }
}

// 4 lanes share 8 rows; each keeps the states of two.
constexpr int kKeptRows = kThreadRows / 4;
MEMEFF_DEVICE int kept_row(int s) {
  return row_in_tile(static_cast<int>(threadIdx.x) % 4 * kKeptRows + s);
}

// The states of the warp's 64 classes, relative to the maximum of all 128. With kStore, exp(z - max)
// stays in `c`.
template <bool kFull, bool kStore>
MEMEFF_DEVICE void fold_tile(State<kFull> (&kept)[kKeptRows], Accumulators& c,
                             unsigned char* shared, const LogitBlock& logits, int64_t first_class) {
  const int thread = static_cast<int>(threadIdx.x), half = thread / 64;
  float max[kThreadRows];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    max[r] = c.at(r, 0);
#pragma unroll
    for (int v = 1; v < kThreadColumns; ++v) max[r] = ptx::max_or_nan(max[r], c.at(r, v));
    max[r] = quad_max(max[r]);
  }
  auto* maxima = reinterpret_cast<float*>(shared + kMaximaAt);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r)
    if (thread % 4 == 0) maxima[half * kRows + row_in_tile(r)] = max[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r)
    max[r] = ptx::max_or_nan(max[r], maxima[(1 - half) * kRows + row_in_tile(r)]);

  float smooth[kThreadRows] = {};
  if (kFull) add_weighted(smooth, c, logits, first_class);

#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    State<kFull> row;
    row.max = max[r];
    row.argmax = kNoClass;
    const float reference = reference_of(max[r]);
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v) {
      const float z = c.at(r, v), exp_z = exponential(z - reference);
      row.sum += exp_z;
      if (kStore) c.at(r, v) = exp_z;
      if (!kFull) continue;
      if (exp_z > 0.f) row.entropy += exp_z * (z - reference);  // 0 * -inf is 0
      if (z == max[r]) row.argmax = min(row.argmax, column_in_tile(v));
    }
    row.sum = quad_sum(row.sum);
    if (kFull) {
      row.entropy = quad_sum(row.entropy);
      row.smooth = quad_sum(smooth[r]);
      row.argmax = quad_min(row.argmax);
      if (row.argmax != kNoClass)
        row.argmax += static_cast<int>(logits.block.first_class + first_class);
    }
    if (thread % 4 == r / kKeptRows) kept[r % kKeptRows] = row;
  }
}

template <class T, bool kAligned, bool kFull, bool kStore>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    linear_statistics_kernel(Matrix<T> x, Matrix<T> w, LogitBlock logits, unsigned token_tiles,
                             unsigned class_tiles, Results results) {
  MEMEFF_DYNAMIC_SHARED(shared);
  const TileIndex index = tile_of_block(token_tiles, class_tiles);
  const int64_t first_token = int64_t{index.row} * kRows;
  const int64_t first_class = int64_t{index.column} * kColumns;
  Accumulators c;
  multiply_tile<kAligned>(shared, x, w, first_token, first_class, c);
  to_logits(c, logits, first_class);
  write_target_logits(c, logits, first_token, first_class, results.target_logit);

  __syncthreads();  // all have read the last slice
  State<kFull> kept[kKeptRows];
  fold_tile<kFull, kStore>(kept, c, shared, logits, first_class);
  if (kStore) put_scores(shared, c);
  const bool right = threadIdx.x >= kThreads / 2;                            // half of the classes
  auto* right_states = reinterpret_cast<State<kFull>*>(shared + kStatesAt);  // [kRows]
#pragma unroll
  for (int s = 0; s < kKeptRows; ++s)
    if (right) right_states[kept_row(s)] = kept[s];
  __syncthreads();
  if (kStore)
    store_scores(shared, results.scores + first_class * results.scores_stride + first_token,
                 results.scores_stride, logits.block.classes - first_class,
                 logits.block.tokens - first_token);
  if (right) return;
#pragma unroll
  for (int s = 0; s < kKeptRows; ++s) {
    const int64_t token = first_token + kept_row(s);
    if (token >= logits.block.tokens) continue;
    kept[s].merge(right_states[kept_row(s)]);
    if (kFull && kept[s].argmax == kNoClass)  // NaN: no logit is the maximum
      kept[s].argmax = static_cast<int>(logits.block.first_class + first_class);
    kept[s].write(results.partials, index.column, token);
  }
}

template <class T, bool kAligned, bool kFull, bool kStore>
Status launch(const LinearMatrices<T>& of, const LinearStatistics& call, void* stream) {
  const LogitBlock logits = logit_block(call.block, call.terms, call.targets);
  const Results results{call.partials, call.target_logit, static_cast<__half*>(call.scores.data),
                        call.scores.stride};
  const auto token_tiles = static_cast<unsigned>(ceil_div(call.block.tokens, kRows));
  const auto class_tiles = static_cast<unsigned>(ceil_div(call.block.classes, kColumns));
  const auto kernel = linear_statistics_kernel<T, kAligned, kFull, kStore>;
  const Status allowed = allow_shared_memory(kernel, kPipelineBytes);
  if (!allowed.ok()) return allowed;
  MEMEFF_LAUNCH(kernel, dim3(token_tiles * class_tiles), dim3(kThreads), kPipelineBytes, stream,
                of.x, of.w, logits, token_tiles, class_tiles, results);
  return launch_status();
}

template <class T, bool kStore>
Status select(const LinearStatistics& call, void* stream) {
  const LinearMatrices<T> matrices(call.operands, call.block);
  const auto run = !matrices.aligned()         ? launch<T, false, true, kStore>
                   : wants_full(call.partials) ? launch<T, true, true, kStore>
                                               : launch<T, true, false, kStore>;
  return run(matrices, call, stream);
}

}  // namespace

Status linear_statistics(const LinearStatistics& call, void* stream) {
  if (call.block.tokens == 0 || call.block.classes == 0) return {};
  const Status checked = check(call);
  if (!checked.ok()) return checked;
  const bool stores = call.scores.data != nullptr;
  const bool bf16 = call.operands.dtype == DType::kBFloat16;
  const auto storing = bf16 ? select<__nv_bfloat16, true> : select<__half, true>;
  const auto discarding = bf16 ? select<__nv_bfloat16, false> : select<__half, false>;
  return (stores ? storing : discarding)(call, stream);
}

}  // namespace memeff::cuda::sm80
