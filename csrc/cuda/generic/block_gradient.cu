// From stored products to the gradient with respect to them, in place, any architecture.
//
//   du[v,t] = dz[v,t] (1 - (z / softcap)^2), dz as in Coefficients (kernel_arguments.h)     [classes, tokens]
//
// A thread block of 256 threads is `lanes` threads along the tokens (32 to 256, by how many there
// are), each with 16 bytes of a row, by 256 / lanes groups of rows. A thread loads the coefficients
// of its tokens once for all rows of its group, then walks over these kBatch at a time. No shared
// memory. Moves classes * tokens * (sizeof(T) + sizeof(G)) bytes; bound by memory.
//
// Float products may become 16-bit gradients. Token t of a row then moves from byte 4 t to byte
// 2 t, where other threads may still have to read, so a thread block owns whole rows and passes
// over their tokens in ascending steps: in each, all threads read, meet, and only then write. What
// a step that ends at token b overwrites lies below byte 2 b; everything below byte 4 b has been
// read. Gradients as wide as the products have no such order: every step is a thread block of its
// own.
//
// Numerics: everything in T, one rounding. The entry of an index target has a form of its own
// (target_gradient in logit_gradient.cuh) and is stored after the others.
#include "core/math.h"
#include "cuda/common/logit_gradient.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;

template <class T>
struct GradientArguments {
  T* products;
  int64_t stride;
  int64_t steps_per_block, blocks_per_row;  // along the tokens
  int64_t rows_per_thread;                  // a multiple of kBatch
  Block block;
  LogitTransform<T> transform;
  const int64_t* index;
  ProbabilityTargets<T> probabilities;
  Coefficients coefficients;
  const double* token_scale;  // [tokens] or null
};

// What a thread needs for every row of the tokens that it owns.
template <class T, int kTokens>
struct Tokens {
  int64_t first;
  int count;
  unsigned left_out;  // bit i: token i has no gradient, whatever its logits
  TokenCoefficients<T> coefficients[kTokens];
  T scale[kTokens];  // of the logits
};

// Class probabilities are rare: their coefficients are read again for every row, so that they occupy
// no registers elsewhere.
template <int kTokens, class T>
MEMEFF_DEVICE void add_probabilities(T (&dz)[kTokens], int64_t v, T weight,
                                     const Tokens<T, kTokens>& tokens,
                                     const GradientArguments<T>& arguments) {
  T coefficients[kTokens];
  load(coefficients, static_cast<const T*>(arguments.coefficients.target) + tokens.first,
       tokens.count);
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
    if (i < tokens.count)
      dz[i] += coefficients[i] * weight * arguments.probabilities.at(tokens.first + i, v);
}

// Rows v to v + kBatch - 1 of those tokens.
template <class G, int kTokens, class T>
MEMEFF_DEVICE void convert_batch(int64_t v, const Tokens<T, kTokens>& tokens,
                                 const GradientArguments<T>& arguments) {
  const auto& transform = arguments.transform;
  T* const row = arguments.products + v * arguments.stride;
  T u[kBatch][kTokens];
  G gradient[kBatch][kTokens];
#pragma unroll
  for (int r = 0; r < kBatch; ++r)
    if (v + r < arguments.block.classes)
      load(u[r], row + r * arguments.stride + tokens.first, tokens.count);
#pragma unroll
  for (int r = 0; r < kBatch; ++r) {
    if (v + r >= arguments.block.classes) continue;
    const T bias = transform.bias_of(v + r);
    const T weight = transform.weight_of(v + r);
    T from_target[kTokens] = {};
    if (arguments.probabilities.data != nullptr)
      add_probabilities(from_target, v + r, weight, tokens, arguments);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const T scaled = transform.scaled(u[r][i], bias);
      const T z = transform.capped(scaled) * tokens.scale[i];
      const T dz = tokens.coefficients[i].gradient(z, weight) + from_target[i];
      // A token that is left out may have NaN logits, its gradient is zero.
      gradient[r][i] =
          narrow<G>((tokens.left_out >> i & 1) != 0 ? T(0) : dz * transform.slope(scaled));
    }
  }
  if (sizeof(G) < sizeof(T)) __syncthreads();
#pragma unroll
  for (int r = 0; r < kBatch; ++r)
    if (v + r < arguments.block.classes)
      store(reinterpret_cast<G*>(row + r * arguments.stride) + tokens.first, gradient[r],
            tokens.count);
}

template <class T, class G>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    block_gradient_kernel(GradientArguments<T> arguments) {
  constexpr int kTokens = kPerVector<T>;  // of a thread
  const Block& block = arguments.block;
  const auto& transform = arguments.transform;
  const int64_t group = blockIdx.x / arguments.blocks_per_row * blockDim.y + threadIdx.y;
  const int64_t first_step = blockIdx.x % arguments.blocks_per_row * arguments.steps_per_block;
  const int64_t begin = group * arguments.rows_per_thread;
  const int64_t end = begin + arguments.rows_per_thread;  // may lie beyond the last class

  // All threads take part in every step and batch, because of the barriers.
  for (int64_t step = first_step; step < first_step + arguments.steps_per_block; ++step) {
    Tokens<T, kTokens> tokens;
    tokens.first = (step * blockDim.x + threadIdx.x) * kTokens;
    tokens.count = count_left<kTokens>(tokens.first, block.tokens);
    load_coefficients(tokens.coefficients, arguments.coefficients, tokens.first, tokens.count);
    tokens.left_out = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      tokens.left_out |= (tokens.coefficients[i].all_zero() ? 1u : 0u) << i;
      tokens.scale[i] =
          scale_of_token<T>(arguments.token_scale, tokens.first + i, i < tokens.count);
    }
    int target[kTokens];
    load_targets(target, arguments.index, block, tokens.first, tokens.count);

    T target_gradient[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (target[i] < begin || target[i] >= end) target[i] = -1;  // not in my rows
      if (target[i] < 0) continue;
      const T u = arguments.products[target[i] * arguments.stride + tokens.first + i];
      const T scaled = transform.scaled(u, transform.bias_of(target[i]));
      const T z = transform.capped(scaled) * tokens.scale[i];
      const T dz = tokens.coefficients[i].target_gradient(z, transform.weight_of(target[i]));
      target_gradient[i] = tokens.coefficients[i].all_zero() ? T(0) : dz * transform.slope(scaled);
    }
    for (int64_t v = begin; v < end; v += kBatch) convert_batch<G>(v, tokens, arguments);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (target[i] >= 0)
        reinterpret_cast<G*>(arguments.products + target[i] * arguments.stride)[tokens.first + i] =
            narrow<G>(target_gradient[i]);
  }
}

// 4 instantiations: (T, G) = (float, float), (float, bf16), (float, fp16), (double, double).
template <class T, class G>
Status launch(const BlockGradient& call, void* stream) {
  const Block& block = call.block;
  GradientArguments<T> arguments;
  arguments.products = static_cast<T*>(call.products);
  arguments.stride = call.stride;
  arguments.block = block;
  arguments.transform = logit_transform<T>(call.terms, block.first_class);
  arguments.coefficients = call.coefficients;
  arguments.token_scale = call.token_scale;
  // Targets without coefficients are none.
  const Targets counted = call.coefficients.target == nullptr ? Targets{} : call.targets;
  arguments.index = counted.index;
  arguments.probabilities = probability_targets<T>(counted, block.first_class);

  const unsigned lanes = threads_along(block.tokens, kPerVector<T>, kThreads);
  const int64_t steps = ceil_div(block.tokens, lanes * kPerVector<T>);
  const bool narrows = sizeof(G) < sizeof(T);
  arguments.steps_per_block = narrows ? steps : 1;
  arguments.blocks_per_row = narrows ? 1 : steps;
  // Many rows per thread load the coefficients less often; few keep a large GPU busy.
  constexpr int64_t kEnoughBlocks = 1024;
  const unsigned groups = kThreads / lanes;
  const auto blocks = [&](int64_t rows) {
    return arguments.blocks_per_row * ceil_div(block.classes, rows * groups);
  };
  arguments.rows_per_thread = blocks(4 * kBatch) >= kEnoughBlocks ? 4 * kBatch : kBatch;
  const dim3 grid(static_cast<unsigned>(blocks(arguments.rows_per_thread)));
  const auto kernel = block_gradient_kernel<T, G>;
  MEMEFF_LAUNCH(kernel, grid, dim3(lanes, groups), 0, stream, arguments);
  return launch_status();
}

}  // namespace

Status block_gradient(const BlockGradient& call, void* stream) {
  const DType from = call.dtype, to = call.gradient_dtype;
  if (call.block.tokens == 0 || call.block.classes == 0) return {};
  if (from == DType::kFloat64 && to == DType::kFloat64) return launch<double, double>(call, stream);
  if (from == DType::kFloat32 && to == DType::kFloat32) return launch<float, float>(call, stream);
  if (from == DType::kFloat32 && to == DType::kBFloat16)
    return launch<float, __nv_bfloat16>(call, stream);
  if (from == DType::kFloat32 && to == DType::kFloat16) return launch<float, __half>(call, stream);
  return {"block_gradient: from float32 to float32 or 16 bits, or from float64 to float64"};
}

}  // namespace memeff::cuda
