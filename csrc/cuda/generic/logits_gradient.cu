// From logits to their gradient in place, any architecture and dtype.
//
//   dz_v = p_v (A + B z_v) + C [v == y] + S w_v,   du_v = dz_v * dz/du,   p_v = exp(z_v - lse)
//
// One thread block per token; the row is read once and written once, 16 bytes at a time. No shared
// memory. Bound by memory: classes * (sizeof(T) + sizeof(G)) bytes per token.
//
// Float logits may become 16-bit gradients: element v then moves from byte 4 v of the row to byte 2
// v, where another thread may still have to read. So all threads of the block read their share of a
// step, meet, and only then write; what a step overwrites was read in this step or an earlier one.
//
// Numerics: p is formed, and the target's part subtracted, in the accumulation type; one rounding.
#include "cuda/common/logit_transform.cuh"

namespace memeff::cuda {

namespace {

template <class A>
struct GradientArguments {
  int64_t classes, row_stride, first_class;
  LogitTransform<A> transform;
  ClassTerms<A> terms;
  const int64_t* target;
  const A *lse, *softmax, *entropy, *target_coefficient, *weighted;
};

// The coefficients of one token.
template <class A>
struct TokenCoefficients {
  A lse, softmax, entropy, target, weighted;
  int64_t target_column;  // of index targets; outside the block when the target is elsewhere

  MEMEFF_DEVICE bool all_zero() const {
    return softmax == A(0) && entropy == A(0) && target == A(0) && weighted == A(0);
  }
};

template <class A>
MEMEFF_DEVICE TokenCoefficients<A> coefficients_of(const GradientArguments<A>& arguments,
                                                   int64_t token) {
  TokenCoefficients<A> c;
  c.lse = arguments.lse[token];
  c.softmax = arguments.softmax[token];
  c.entropy = arguments.entropy == nullptr ? A(0) : arguments.entropy[token];
  c.target = arguments.target_coefficient[token];
  c.weighted = arguments.weighted == nullptr ? A(0) : arguments.weighted[token];
  c.target_column =
      arguments.target == nullptr ? -1 : arguments.target[token] - arguments.first_class;
  return c;
}

template <class A>
MEMEFF_DEVICE A gradient_of(A u, int64_t token, int64_t column, const TokenCoefficients<A>& c,
                            const GradientArguments<A>& arguments) {
  const A z = arguments.transform.logit(u, column);
  const A p = exponential(z - c.lse);
  A dz = p * c.softmax;
  // p z tends to 0 as z tends to -inf
  if (c.entropy != A(0) && z != A(-INFINITY)) dz += p * c.entropy * z;
  if (arguments.terms.probabilities != nullptr)
    dz += c.target * arguments.terms.weight(column) * arguments.terms.probability(token, column);
  else if (column == c.target_column)
    dz += c.target;
  if (c.weighted != A(0)) dz += c.weighted * arguments.terms.weight(column);
  return dz * arguments.transform.slope(z);
}

// Columns [begin, end), kCount at a time; end - begin is a multiple of kCount.
template <int kCount, class T, class G>
MEMEFF_DEVICE void convert_columns(T* row, int64_t token, int64_t begin, int64_t end,
                                   const TokenCoefficients<Accumulation<T>>& c,
                                   const GradientArguments<Accumulation<T>>& arguments) {
  constexpr bool kNarrows = sizeof(G) < sizeof(T);
  G* gradient_row = reinterpret_cast<G*>(row);
  const int64_t step = int64_t{kCount} * blockDim.x;
  // Every thread takes part in every step, because of the barriers.
  for (int64_t first = begin; first < end; first += step) {
    const int64_t column = first + int64_t{kCount} * threadIdx.x;
    const bool mine = column < end;
    G gradient[kCount];
    if (mine) {
      T raw[kCount];
      load(raw, row + column);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        gradient[i] = narrow<G>(gradient_of(widen(raw[i]), token, column + i, c, arguments));
    }
    if (kNarrows) __syncthreads();
    if (mine) store(gradient_row + column, gradient);
  }
}

template <class T, class G>
__global__ void __launch_bounds__(512, 2)
    logits_gradient_kernel(T* logits, GradientArguments<Accumulation<T>> arguments) {
  const int64_t token = blockIdx.x;
  T* row = logits + token * arguments.row_stride;
  const auto c = coefficients_of(arguments, token);
  if (c.all_zero()) {  // an ignored token: its logits may be NaN, its gradient is not
    for (int64_t column = threadIdx.x; column < arguments.classes; column += blockDim.x)
      reinterpret_cast<G*>(row)[column] = narrow<G>(Accumulation<T>(0));
    return;
  }
  int64_t vectors_end = 0;
  if (is_vector_aligned(row)) {
    vectors_end = arguments.classes / kPerVector<T> * kPerVector<T>;
    convert_columns<kPerVector<T>, T, G>(row, token, 0, vectors_end, c, arguments);
  }
  convert_columns<1, T, G>(row, token, vectors_end, arguments.classes, c, arguments);
}

template <class T, class G>
Status launch(const LogitsBlock& block, const GradientCoefficients& coefficients, void* stream) {
  using A = Accumulation<T>;
  GradientArguments<A> arguments;
  arguments.classes = block.classes;
  arguments.row_stride = block.row_stride;
  arguments.first_class = block.first_class;
  arguments.transform = logit_transform<A>(block);
  arguments.terms = class_terms<A>(block);
  arguments.target = block.target;
  arguments.lse = static_cast<const A*>(coefficients.lse);
  arguments.softmax = static_cast<const A*>(coefficients.softmax);
  arguments.entropy = static_cast<const A*>(coefficients.entropy);
  arguments.target_coefficient = static_cast<const A*>(coefficients.target);
  arguments.weighted = static_cast<const A*>(coefficients.weighted);

  const auto kernel = logits_gradient_kernel<T, G>;
  auto* logits = static_cast<T*>(block.logits);
  MEMEFF_LAUNCH(kernel, dim3(static_cast<unsigned>(block.tokens)),
                dim3(threads_per_row(block.classes, kPerVector<T>)), 0, stream, logits, arguments);
  return launch_status();
}

}  // namespace

Status logits_gradient(const LogitsBlock& block, const GradientCoefficients& coefficients,
                       DType gradient_dtype, void* stream) {
  if (block.tokens == 0 || block.classes == 0) return {};
  if (block.dtype == DType::kFloat32 && gradient_dtype == DType::kBFloat16)
    return launch<float, __nv_bfloat16>(block, coefficients, stream);
  if (block.dtype == DType::kFloat32 && gradient_dtype == DType::kFloat16)
    return launch<float, __half>(block, coefficients, stream);
  if (block.dtype != gradient_dtype)
    return {"logits_gradient: the gradient has the logits' dtype, or 16 bits for float logits"};
  switch (block.dtype) {
    case DType::kBFloat16: return launch<__nv_bfloat16, __nv_bfloat16>(block, coefficients, stream);
    case DType::kFloat16: return launch<__half, __half>(block, coefficients, stream);
    case DType::kFloat32: return launch<float, float>(block, coefficients, stream);
    case DType::kFloat64: return launch<double, double>(block, coefficients, stream);
  }
  return {"logits_gradient: unknown dtype"};
}

}  // namespace memeff::cuda
