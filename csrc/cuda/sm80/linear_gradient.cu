// The gradient with respect to u = x W^T, whose logits are computed again and never stored.
//
//   x [tokens, features], W [classes, features]:   u = x W^T, z of u (launch.h)
//   G[v, n] = dz/du' (p_v (softmax + entropy z_v) + target's term + weighted w_v)   [classes, tokens]
//   p_v = exp(z_v - shift);   dz/du' = 1 - (z / softcap)^2, without logit_scale, which the per-token
//                             coefficients contain (Coefficients, launch.h)
//
// One thread block per tile of 128 tokens x 128 classes (logits_tile.cuh); the gradient is made in
// the accumulators, row by row, and leaves through shared memory as 16 bytes of adjacent tokens.
// The target's entry, softmax expm1(z_y - shift) + target_rest, replaces what the row's loop made.
// With `tiles`, sums of p per token and tile decide whether products may skip the tile.
//
// Shared memory: 48 KiB of pipeline; then the same memory takes G (34 KiB) and the masses. Two
// blocks of 128 threads per SM. x and W are read once per 128 classes and tokens, mostly from L2;
// 2 tokens features classes FLOPs on tensor cores, 2 tokens classes bytes written.
// Numerics: everything in fp32, G rounded once to nearest.
#include "cuda/sm80/logits_tile.cuh"

namespace memeff::cuda::sm80 {

namespace {

// Kernel argument: which tiles carry mass (launch.h); null: nobody asks.
struct TileMarks {
  uint8_t* tiles;
  int64_t stride;
  float mass_per_class;
};

// Shared memory after the pipeline.
constexpr int kMassesAt = kTransposedBytes;          // float [2 halves of the classes][kRows]
constexpr int kVotesAt = kMassesAt + 2 * kRows * 4;  // uint32_t [warps]
static_assert(kVotesAt + kThreads / 32 * 4 <= kPipelineBytes);

// Logits to gradients, in place. mass[r] is the sum of the thread's probabilities of its row r, 0 for
// tokens without a gradient.
MEMEFF_DEVICE void to_gradient(Accumulators& c, const LogitBlock& logits,
                               const Coefficients& coefficients, int64_t first_token,
                               int64_t first_class, float (&mass)[kThreadRows]) {
  const LogitTransform<float>& transform = logits.transform;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t token = first_token + row_in_tile(r);
    TokenCoefficients<float> loaded[1];
    load_coefficients(loaded, coefficients, token, token < logits.block.tokens ? 1 : 0);
    const TokenCoefficients<float>& of_token = loaded[0];
    const bool present = !of_token.all_zero();
    const int target = present ? target_in_tile(logits, first_class, token) : -1;
    float target_z = 0.f;
    bool target_is_mine = false;
    mass[r] = 0.f;
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v) {
      const float z = c.at(r, v);
      if (column_in_tile(v) == target) {
        target_z = z;
        target_is_mine = true;
      }
      float weight = 0.f;
      const int64_t column = first_class + column_in_tile(v);
      if (of_token.weighted != 0.f && column < logits.block.classes)
        weight = transform.weight_of(column);
      mass[r] += exponential(z - of_token.shift);
      const float du = of_token.gradient(z, weight) * transform.slope(z);
      c.at(r, v) = present ? du : 0.f;
    }
    if (!present) mass[r] = 0.f;
    if (!target_is_mine) continue;
    const float du = of_token.target_gradient(target_z, transform.weight_of(first_class + target)) *
                     transform.slope(target_z);
#pragma unroll
    for (int v = 0; v < kThreadColumns; ++v)
      if (column_in_tile(v) == target) c.at(r, v) = du;
  }
}

// Marks the tile 1 unless each token's mass in it is small and no target lies in it. All threads
// have left the pipeline.
MEMEFF_DEVICE void mark_tile(unsigned char* shared, const float (&mass)[kThreadRows],
                             const LogitBlock& logits, int64_t first_token, int64_t first_class,
                             const TileMarks& marks) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* masses = reinterpret_cast<float*>(shared + kMassesAt);
  auto* votes = reinterpret_cast<uint32_t*>(shared + kVotesAt);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    float sum = mass[r] + __shfl_xor_sync(~0u, mass[r], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (thread % 4 == 0) masses[thread / 64 * kRows + row_in_tile(r)] = sum;
  }
  __syncthreads();
  static_assert(kThreads == kRows, "one token per thread");
  const int64_t classes = logits.block.classes - first_class;
  const float limit =
      marks.mass_per_class * static_cast<float>(classes < kColumns ? classes : kColumns);
  const bool has_target = target_in_tile(logits, first_class, first_token + thread) >= 0;
  // Written so that NaN counts as mass. Rows without a token have none.
  const bool counts = first_token + thread < logits.block.tokens &&
                      (has_target || !(masses[thread] + masses[kRows + thread] < limit));
  const unsigned vote = __ballot_sync(~0u, counts);
  if (thread % 32 == 0) votes[thread / 32] = vote;
  __syncthreads();
  if (thread != 0) return;
  uint32_t any = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) any |= votes[warp];
  marks.tiles[first_class / kColumns * marks.stride + first_token / kRows] = any != 0 ? 1 : 0;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    linear_gradient_kernel(Matrix<T> x, Matrix<T> w, LogitBlock logits, unsigned token_tiles,
                           unsigned class_tiles, Coefficients coefficients, T* gradient,
                           int64_t stride, TileMarks marks) {
  MEMEFF_DYNAMIC_SHARED(shared);
  const TileIndex index = tile_of_block(token_tiles, class_tiles);
  const int64_t first_token = int64_t{index.row} * kRows;
  const int64_t first_class = int64_t{index.column} * kColumns;
  Accumulators c;
  multiply_tiles<kAligned>(shared, x, w, first_token, first_class, 1, c, [](int64_t) {});
  to_logits(c, logits, first_class);
  float mass[kThreadRows];
  to_gradient(c, logits, coefficients, first_token, first_class, mass);

  __syncthreads();  // all have read the last slice
  put_transposed<T>(shared, c);
  if (marks.tiles != nullptr) mark_tile(shared, mass, logits, first_token, first_class, marks);
  __syncthreads();
  store_transposed(shared, gradient + first_class * stride + first_token, stride,
                   logits.block.classes - first_class, logits.block.tokens - first_token);
}

template <class T, bool kAligned>
Status launch(const Matrix<T>& x, const Matrix<T>& w, const LogitBlock& logits,
              const Coefficients& coefficients, T* gradient, int64_t stride, const TileMarks& marks,
              void* stream) {
  const auto token_tiles = static_cast<unsigned>(count_tiles(logits.block.tokens, kRows));
  const auto class_tiles = static_cast<unsigned>(count_tiles(logits.block.classes, kColumns));
  const auto kernel = linear_gradient_kernel<T, kAligned>;
  const Status allowed = allow_shared_memory(kernel, kPipelineBytes);
  if (!allowed.ok()) return allowed;
  MEMEFF_LAUNCH(kernel, dim3(token_tiles * class_tiles), dim3(kThreads), kPipelineBytes, stream, x,
                w, logits, token_tiles, class_tiles, coefficients, gradient, stride, marks);
  return launch_status();
}

template <class T>
Status select(const LinearOperands& operands, const LogitBlock& logits,
              const Coefficients& coefficients, void* gradient, int64_t stride,
              const TileMarks& marks, void* stream) {
  const Matrix<T> x{static_cast<const T*>(operands.input), logits.block.tokens, operands.features,
                    operands.input_stride};
  const Matrix<T> w{static_cast<const T*>(operands.weight), logits.block.classes, operands.features,
                    operands.weight_stride};
  auto* to = static_cast<T*>(gradient);
  return chunks_are_aligned(x) && chunks_are_aligned(w)
             ? launch<T, true>(x, w, logits, coefficients, to, stride, marks, stream)
             : launch<T, false>(x, w, logits, coefficients, to, stride, marks, stream);
}

}  // namespace

Status linear_gradient(const Block& block, const LinearOperands& operands, const LogitTerms& terms,
                       const Targets& targets, const Coefficients& coefficients, void* gradient,
                       int64_t stride, uint8_t* tiles, int64_t tiles_stride, double skip_mass,
                       int64_t vocab, void* stream) {
  if (block.tokens == 0 || block.classes == 0) return {};
  if (targets.probabilities != nullptr)
    return {"linear_gradient: class probabilities need stored products"};
  if (coefficients.shift == nullptr || coefficients.softmax == nullptr)
    return {"linear_gradient: shift and softmax must be given"};
  if (operands.features <= 0) return {"linear_gradient: features must be positive"};
  const TileMarks marks{tiles, tiles_stride,
                        static_cast<float>(skip_mass / static_cast<double>(vocab > 0 ? vocab : 1))};
  // Without target_rest the entry of a target is like any other.
  const LogitBlock logits =
      logit_block(block, terms, coefficients.target_rest == nullptr ? Targets{} : targets);
  switch (operands.dtype) {
    case DType::kBFloat16:
      return select<__nv_bfloat16>(operands, logits, coefficients, gradient, stride, marks, stream);
    case DType::kFloat16:
      return select<__half>(operands, logits, coefficients, gradient, stride, marks, stream);
    default: return {"linear_gradient: operands are bfloat16 or float16"};
  }
}

}  // namespace memeff::cuda::sm80
