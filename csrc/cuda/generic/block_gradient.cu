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
// Gradients that are rounded to 16 bits are added up before that, for the gradient of the bias: a warp
// sums the tokens of a row, whose sum stays in a lane of its own; when all steps are done, the warps of
// the row meet in shared memory (512 bytes). A fixed order, which the number of tokens determines.
//
// Numerics: everything in T, one rounding. The entry of an index target has a form of its own
// (target_gradient in logit_gradient.cuh).
#include "core/math.h"
#include "cuda/common/logit_gradient.cuh"
#include "cuda/common/token_sum.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;
constexpr int kMostRows = 4 * kBatch;  // of a thread
static_assert(kMostRows <= 32, "a lane for each row");

template <class T>
struct GradientArguments {
  T* products;
  int64_t stride;
  int64_t steps_per_block, blocks_per_row;  // along the tokens
  int64_t rows_per_thread;                  // a multiple of kBatch, at most kMostRows
  Block block;
  LogitTransform<T> transform;
  const int64_t* index;
  ProbabilityTargets<T> probabilities;
  Coefficients coefficients;
  const double* token_scale;  // [tokens] or null
  BiasSums bias;              // from the block's first class on
};

// What a thread needs for every row of the tokens that it owns.
template <class T, int kTokens>
struct Tokens {
  int64_t first;
  int count;
  unsigned left_out;  // bit i: token i has no gradient, whatever its logits
  TokenCoefficients<T> coefficients[kTokens];
  T scale[kTokens];            // of the logits
  int target[kTokens];         // of the group's rows, else -1
  T target_gradient[kTokens];  // of that class
};

template <class T, class G>
constexpr bool kNarrows = sizeof(G) < sizeof(T);

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

// Rows v to v + kBatch - 1 of those tokens; lanes from `first` on have their sums.
template <class G, int kTokens, class T>
MEMEFF_DEVICE void convert_batch(int64_t v, int first, const Tokens<T, kTokens>& tokens,
                                 const GradientArguments<T>& arguments, T* row_sum) {
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
    T du[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const T scaled = transform.scaled(u[r][i], bias);
      const T z = transform.capped(scaled) * tokens.scale[i];
      const T dz = tokens.coefficients[i].gradient(z, weight) + from_target[i];
      // A token that is left out may have NaN logits, its gradient is zero.
      du[i] = (tokens.left_out >> i & 1) != 0 ? T(0)
              : tokens.target[i] == v + r     ? tokens.target_gradient[i]
                                              : dz * transform.slope(scaled);
      gradient[r][i] = narrow<G>(du[i]);
    }
    if constexpr (kNarrows<T, G>)
      if (arguments.bias.sums != nullptr)
        add_to_row(row_sum, first + r,
                   sum_of_tokens(du, arguments.bias.factors, tokens.first, tokens.count));
  }
  if (kNarrows<T, G>) __syncthreads();
#pragma unroll
  for (int r = 0; r < kBatch; ++r)
    if (v + r < arguments.block.classes)
      store(reinterpret_cast<G*>(row + r * arguments.stride) + tokens.first, gradient[r],
            tokens.count);
}

// The sums of all rows to those of the bias.
MEMEFF_DEVICE void add_row_sums(float row_sum, int64_t begin,
                                const GradientArguments<float>& arguments) {
  MEMEFF_SHARED_ARRAY(float, of_warps, kThreads / 32 * kMostRows);
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  float* const of_group = of_warps + static_cast<int>(threadIdx.y) * warps * kMostRows;
  if (thread % 32 < kMostRows) of_group[thread / 32 * kMostRows + thread % 32] = row_sum;
  __syncthreads();
  const int64_t v = begin + thread;
  if (thread >= arguments.rows_per_thread || v >= arguments.block.classes) return;
  float sum = 0.f;
  for (int warp = 0; warp < warps; ++warp) sum += of_group[warp * kMostRows + thread];
  arguments.bias.sums[v] += sum;
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

  T row_sum = T(0);  // of row `begin` + lane

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
    load_targets(tokens.target, arguments.index, block, tokens.first, tokens.count);

#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      int& target = tokens.target[i];
      if (target < begin || target >= end) target = -1;  // not in my rows
      if (target < 0) continue;
      const T u = arguments.products[target * arguments.stride + tokens.first + i];
      const T scaled = transform.scaled(u, transform.bias_of(target));
      const T z = transform.capped(scaled) * tokens.scale[i];
      const T dz = tokens.coefficients[i].target_gradient(z, transform.weight_of(target));
      tokens.target_gradient[i] = dz * transform.slope(scaled);
    }
    for (int64_t v = begin; v < end; v += kBatch)
      convert_batch<G>(v, static_cast<int>(v - begin), tokens, arguments, &row_sum);
  }
  if constexpr (kNarrows<T, G>)
    if (arguments.bias.sums != nullptr) add_row_sums(row_sum, begin, arguments);
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
  arguments.bias = call.bias;
  if (call.bias.sums != nullptr) arguments.bias.sums += block.first_class;
  // Targets without coefficients are none.
  const Targets counted = call.coefficients.target == nullptr ? Targets{} : call.targets;
  arguments.index = counted.index;
  arguments.probabilities = probability_targets<T>(counted, block.first_class);

  const unsigned lanes = threads_along(block.tokens, kPerVector<T>, kThreads);
  const int64_t steps = ceil_div(block.tokens, lanes * kPerVector<T>);
  arguments.steps_per_block = kNarrows<T, G> ? steps : 1;
  arguments.blocks_per_row = kNarrows<T, G> ? 1 : steps;
  // Many rows per thread load the coefficients less often; few keep a large GPU busy.
  constexpr int64_t kEnoughBlocks = 1024;
  const unsigned groups = kThreads / lanes;
  const auto blocks = [&](int64_t rows) {
    return arguments.blocks_per_row * ceil_div(block.classes, rows * groups);
  };
  arguments.rows_per_thread = blocks(kMostRows) >= kEnoughBlocks ? kMostRows : kBatch;
  const dim3 grid(static_cast<unsigned>(blocks(arguments.rows_per_thread)));
  const auto kernel = block_gradient_kernel<T, G>;
  MEMEFF_LAUNCH(kernel, grid, dim3(lanes, groups), 0, stream, arguments);
  return launch_status();
}

}  // namespace

Status block_gradient(const BlockGradient& call, void* stream) {
  const DType from = call.dtype, to = call.gradient_dtype;
  if (call.block.tokens == 0 || call.block.classes == 0) return {};
  if (call.bias.sums != nullptr && !is_16_bit(to))
    return {"block_gradient: gradients of full precision are added up by add_bias_gradient"};
  if (from == DType::kFloat64 && to == DType::kFloat64) return launch<double, double>(call, stream);
  if (from == DType::kFloat32 && to == DType::kFloat32) return launch<float, float>(call, stream);
  if (from == DType::kFloat32 && to == DType::kBFloat16)
    return launch<float, __nv_bfloat16>(call, stream);
  if (from == DType::kFloat32 && to == DType::kFloat16) return launch<float, __half>(call, stream);
  return {"block_gradient: from float32 to float32 or 16 bits, or from float64 to float64"};
}

}  // namespace memeff::cuda
