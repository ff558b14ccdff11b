// The gradient with respect to u = x W^T, whose logits are computed again and never stored.
//
//   x [tokens, features], W [classes, features]:   u = x W^T, z of u (kernel_arguments.h)
//   G [classes, tokens] = (p_v (softmax + entropy (z_v - centre)) + target's term + weighted w_v)
//                         slope(z_v)
//   p_v = exp(z_v - shift),  slope = dz/du of the soft cap; coefficients: kernel_arguments.h
//
// One thread block per tile of 128 tokens x 128 classes (logits_tile.cuh). The epilogue stores through
// shared memory, where 4 tokens of one class become the work of one thread: their coefficients stay
// in its registers while it walks over classes, and 16 lanes store 128 bytes of adjacent tokens; for the
// gradient of the bias they add up the 64 before they are rounded.
// (Made in the accumulators, the same arithmetic is unrolled 128 times: 250 KB of code.) With
// `tiles`, sums of p per token and tile decide whether products may skip the tile.
//
// Shared memory: 48 KiB of pipeline; then the same memory takes half of the products (33 KiB) and
// the masses. Two blocks of 128 threads per SM. x is read once per 128 classes, W once per 128
// tokens, mostly from L2; 2 tokens features classes FLOPs on tensor cores, 2 tokens classes bytes
// written. Numerics: everything in fp32, G rounded once to nearest; the entry of a target has a form
// of its own (logit_gradient.cuh).
#include "cuda/common/token_sum.cuh"
#include "cuda/sm80/logits_tile.cuh"

namespace memeff::cuda::sm80 {

namespace {

// Shared memory after the pipeline: products of 64 tokens, classes adjacent. Rows are 133 floats
// apart, and rows 32 and up 2 floats further, so that 16 tokens (4 apart) x 2 classes, which a warp
// reads at once, cover all banks.
MEMEFF_DEVICE int staged_at(int token, int v) { return token * 133 + token / 32 * 2 + v; }
constexpr int kMassesAt = (kWarpRows * 133 + 2) * 4;
constexpr int kWarps = kThreads / 32;
constexpr int kVotesAt = kMassesAt + kWarps * kRows * 4;
static_assert(kVotesAt + kWarps * 4 <= kPipelineBytes);
using Masses = float[kWarps][kRows];  // sums over the classes of each warp

// How the 64 x 128 are divided: 4 tokens and every 8th class per thread. (The coefficients of 8 tokens
// and all accumulators are more than its registers.)
constexpr int kTokens = 4;
constexpr int kTokenThreads = kWarpRows / kTokens, kClassThreads = kThreads / kTokenThreads;
static_assert(2 * kTokenThreads == 32, "a warp has two threads for each token");

// The sum of a class over the 64 tokens from `first` on, of which each of 16 adjacent lanes has a part.
static_assert(kWarpRows == kBiasTokens);
MEMEFF_DEVICE void put_partial(const BiasPartials& partials, int64_t in_block, int64_t first,
                               int64_t tokens, float part) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // The other lanes may have no class left.
  const unsigned mask = lane < kTokenThreads ? 0xffffu : 0xffff0000u;
#pragma unroll
  for (int other = kTokenThreads / 2; other > 0; other /= 2)
    part += __shfl_xor_sync(mask, part, other);
  if (lane % kTokenThreads == 0 && first < tokens)
    partials.sums[in_block * partials.stride + first / kBiasTokens] = part;
}

// Gradients of 64 tokens, from `half` of the tile on; sums of their probabilities to `masses`.
template <class T>
MEMEFF_DEVICE void put_gradients(const float* staged, Masses& masses, const LogitBlock& logits,
                                 Coefficients coefficients, int64_t first_token,
                                 int64_t first_class, int half, T* gradient, int64_t stride,
                                 const BiasPartials& partials) {
  const LogitTransform<float>& transform = logits.transform;
  const int thread = static_cast<int>(threadIdx.x);
  const int staged_token = thread % kTokenThreads * kTokens;
  const int64_t token = first_token + half + staged_token;
  const int count = count_left<kTokens>(token, logits.block.tokens);
  TokenCoefficients<float> of_token[kTokens];
  load_coefficients(of_token, coefficients, token, count);
  int target[kTokens];  // of tokens that have a gradient
  load_targets(target, logits.target, logits.block, token, count);
  unsigned left_out = 0;  // bit e: token e has no gradient, whatever its logits
#pragma unroll
  for (int e = 0; e < kTokens; ++e)
    if (of_token[e].all_zero()) left_out |= 1u << e, target[e] = -1;

  float mass[kTokens] = {};
#pragma unroll 1
  for (int v = thread / kTokenThreads; v < kColumns; v += kClassThreads) {
    const int in_block = static_cast<int>(first_class) + v;
    if (in_block >= logits.block.classes) break;
    const float bias = transform.bias_of(in_block), weight = transform.weight_of(in_block);
    float du[kTokens];
    T values[kTokens];
#pragma unroll
    for (int e = 0; e < kTokens; ++e) {
      const TokenCoefficients<float>& c = of_token[e];
      const float scaled = transform.scaled(staged[staged_at(staged_token + e, v)], bias);
      const float z = transform.capped(scaled);
      mass[e] += exponential(z - c.shift);
      du[e] = (left_out >> e & 1) != 0 ? 0.f : c.gradient(z, weight) * transform.slope(scaled);
    }
#pragma unroll
    for (int e = 0; e < kTokens; ++e) {
      if (target[e] != in_block) continue;
      // What targets alone need is loaded here: above, it would take registers that there are not.
      TokenCoefficients<float> c[1];
      load_coefficients(c, coefficients, token + e, 1);
      const float scaled = transform.scaled(staged[staged_at(staged_token + e, v)], bias);
      du[e] = c[0].target_gradient(transform.capped(scaled), weight) * transform.slope(scaled);
    }
#pragma unroll
    for (int e = 0; e < kTokens; ++e) values[e] = narrow<T>(du[e]);
    store(gradient + int64_t{in_block} * stride + token, values, count);
    if (partials.sums != nullptr)
      put_partial(partials, in_block, first_token + half, logits.block.tokens,
                  sum_of_tokens(du, partials.factors, token, count));
  }
#pragma unroll
  for (int e = 0; e < kTokens; ++e) {
    float sum = (left_out >> e & 1) != 0 ? 0.f : mass[e];  // no gradient, nothing to lose
    sum += __shfl_xor_sync(~0u, sum, kTokenThreads);
    if (thread % 32 < kTokenThreads) masses[thread / 32][half + staged_token + e] = sum;
  }
}

// Marks the tile 1 unless each token's mass in it is small and no target lies in it.
MEMEFF_DEVICE void mark_tile(unsigned char* shared, const Masses& masses, const LogitBlock& logits,
                             int64_t first_token, int64_t first_class, const GradientMarks& marks) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* votes = reinterpret_cast<uint32_t*>(shared + kVotesAt);
  __syncthreads();  // masses are complete
  static_assert(kThreads == kRows, "one token per thread");
  float mass = 0.f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) mass += masses[warp][thread];
  const int classes = count_left<kColumns>(first_class, logits.block.classes);
  const float limit = marks.mass_per_class * static_cast<float>(classes);
  const bool has_target = target_in_tile(logits, first_class, first_token + thread) >= 0;
  const unsigned vote = __ballot_sync(~0u, has_target || !(mass < limit));  // NaN counts
  if (thread % 32 == 0) votes[thread / 32] = vote;
  __syncthreads();
  if (thread != 0) return;
  uint32_t any = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) any |= votes[warp];
  marks.tiles[first_class / kColumns * marks.stride + first_token / kRows] = any != 0 ? 1 : 0;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    linear_gradient_kernel(Matrix<T> x, Matrix<T> w, LogitBlock logits, unsigned token_tiles,
                           unsigned class_tiles, Coefficients coefficients, T* gradient,
                           int64_t stride, GradientMarks marks, BiasPartials partials) {
  MEMEFF_DYNAMIC_SHARED(shared);
  const TileIndex index = tile_of_block(token_tiles, class_tiles);
  const int64_t first_token = int64_t{index.row} * kRows;
  const int64_t first_class = int64_t{index.column} * kColumns;
  Accumulators c;
  multiply_tile<kAligned>(shared, x, w, first_token, first_class, c);

  auto* staged = reinterpret_cast<float*>(shared);
  auto& masses = *reinterpret_cast<Masses*>(shared + kMassesAt);
#pragma unroll 1
  for (int half = 0; half < kRows; half += kWarpRows) {
    __syncthreads();  // all have left the pipeline, or the other half
    for_rows_of_half(c, half, [&](int token, int v, float value, float next) {
      staged[staged_at(token, v)] = value;
      staged[staged_at(token, v + 1)] = next;
    });
    __syncthreads();
    put_gradients(staged, masses, logits, coefficients, first_token, first_class, half, gradient,
                  stride, partials);
  }
  if (marks.tiles != nullptr) mark_tile(shared, masses, logits, first_token, first_class, marks);
}

template <class T, bool kAligned>
Status launch(const LinearMatrices<T>& of, const LinearGradient& call, void* stream) {
  // Targets without coefficients are none.
  const bool targets = call.coefficients.target != nullptr;
  const LogitBlock logits = logit_block(call.block, call.terms, targets ? call.targets : Targets{});
  const auto token_tiles = static_cast<unsigned>(ceil_div(call.block.tokens, kRows));
  const auto class_tiles = static_cast<unsigned>(ceil_div(call.block.classes, kColumns));
  const auto kernel = linear_gradient_kernel<T, kAligned>;
  const Status allowed = allow_shared_memory(kernel, kPipelineBytes);
  if (!allowed.ok()) return allowed;
  const GradientMarks marks = call.marks.of_gradient();
  MEMEFF_LAUNCH(kernel, dim3(token_tiles * class_tiles), dim3(kThreads), kPipelineBytes, stream,
                of.x, of.w, logits, token_tiles, class_tiles, call.coefficients,
                static_cast<T*>(call.gradient), call.stride, marks, call.bias);
  return launch_status();
}

template <class T>
Status select(const LinearGradient& call, void* stream) {
  const LinearMatrices<T> matrices(call.operands, call.block);
  return (matrices.aligned() ? launch<T, true> : launch<T, false>)(matrices, call, stream);
}

}  // namespace

Status linear_gradient(const LinearGradient& call, void* stream) {
  if (call.block.tokens == 0 || call.block.classes == 0) return {};
  const Status checked = check(call);
  if (!checked.ok()) return checked;
  const bool bf16 = call.operands.dtype == DType::kBFloat16;
  return (bf16 ? select<__nv_bfloat16> : select<__half>)(call, stream);
}

}  // namespace memeff::cuda::sm80
