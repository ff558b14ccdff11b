// Softmax statistics of a block of logits, any architecture and dtype.
//
//   logits [tokens, classes] -> max, sum exp(z - max), target logit, ... per token
//
// One thread block per token. Each thread walks over the row in steps of blockDim vectors of 16
// bytes and keeps a running maximum and sum (online softmax), so the row is read once; the partial
// results are then merged by shuffles and, across warps, through shared memory (one state per warp,
// 1 KiB). Bound by memory: classes * sizeof(T) bytes per token, a few flops per byte.
//
// Numerics: everything in the accumulation type; one exp per logit, and one more per vector when
// the maximum moves. The order of summation is fixed by classes and blockDim alone.
#include "cuda/common/online_softmax.cuh"

namespace memeff::cuda {

namespace {

template <class A>
struct StatisticsArguments {
  int64_t classes, row_stride, first_class;
  LogitTransform<A> transform;
  ClassTerms<A> terms;
  const int64_t* target;
  A *max, *sum, *target_out, *target_mass, *weighted, *entropy;
  int64_t* argmax;
  bool continues;
};

// Takes in kCount logits of adjacent classes.
template <int kCount, class T, class A>
MEMEFF_DEVICE void accumulate(RowState<A>& state, const T* row, int64_t token, int64_t column,
                              const StatisticsArguments<A>& arguments) {
  T raw[kCount];
  load(raw, row + column);
  A z[kCount];
  A new_max = state.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    z[i] = arguments.transform.logit(widen(raw[i]), column + i);
    if (z[i] > new_max) state.argmax = arguments.first_class + column + i;
    new_max = larger(new_max, z[i]);
  }
  if (new_max != state.max) state.rescale(new_max);
  const A reference = reference_of(new_max);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A exp_z = exponential(z[i] - reference);
    state.sum += exp_z;
    // p z tends to 0 as z tends to -inf
    if (arguments.entropy != nullptr && z[i] != A(-INFINITY)) state.entropy += exp_z * z[i];
    if (arguments.weighted != nullptr) state.weighted += arguments.terms.weight(column + i) * z[i];
    if (arguments.terms.probabilities != nullptr) {
      const A q =
          arguments.terms.weight(column + i) * arguments.terms.probability(token, column + i);
      // 0 * -inf: a class that is not wanted does not matter
      if (q != A(0)) state.target += q * z[i];
      state.target_mass += q;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(512, sizeof(T) == 8 ? 1 : 2)
    row_statistics_kernel(const T* logits, StatisticsArguments<Accumulation<T>> arguments) {
  using A = Accumulation<T>;
  MEMEFF_SHARED_ARRAY(RowState<A>, scratch, kMaxWarps);
  const int64_t token = blockIdx.x;
  const T* row = logits + token * arguments.row_stride;

  RowState<A> state;
  state.argmax = arguments.first_class + arguments.classes;  // after every real class
  int64_t vectors_end = 0;
  if (is_vector_aligned(row)) {
    vectors_end = arguments.classes / kPerVector<T> * kPerVector<T>;
    for (int64_t column = int64_t{kPerVector<T>} * threadIdx.x; column < vectors_end;
         column += int64_t{kPerVector<T>} * blockDim.x)
      accumulate<kPerVector<T>>(state, row, token, column, arguments);
  }
  for (int64_t column = vectors_end + threadIdx.x; column < arguments.classes; column += blockDim.x)
    accumulate<1>(state, row, token, column, arguments);

  merge_block(state, scratch);
  if (threadIdx.x != 0) return;

  if (arguments.target != nullptr) {
    const int64_t column = arguments.target[token] - arguments.first_class;
    if (column >= 0 && column < arguments.classes)
      state.target = arguments.transform.logit(widen(row[column]), column);
  }
  if (arguments.continues) {
    RowState<A> earlier;
    earlier.max = arguments.max[token];
    earlier.sum = arguments.sum[token];
    if (arguments.target_out != nullptr) earlier.target = arguments.target_out[token];
    if (arguments.target_mass != nullptr) earlier.target_mass = arguments.target_mass[token];
    if (arguments.weighted != nullptr) earlier.weighted = arguments.weighted[token];
    if (arguments.entropy != nullptr) earlier.entropy = arguments.entropy[token];
    if (arguments.argmax != nullptr) earlier.argmax = arguments.argmax[token];
    earlier.merge(state);
    state = earlier;
  }
  arguments.max[token] = state.max;
  arguments.sum[token] = state.sum;
  if (arguments.target_out != nullptr) arguments.target_out[token] = state.target;
  if (arguments.target_mass != nullptr) arguments.target_mass[token] = state.target_mass;
  if (arguments.weighted != nullptr) arguments.weighted[token] = state.weighted;
  if (arguments.entropy != nullptr) arguments.entropy[token] = state.entropy;
  if (arguments.argmax != nullptr) arguments.argmax[token] = state.argmax;
}

template <class T>
Status launch(const LogitsBlock& block, const TokenStatistics& statistics, bool continues,
              void* stream) {
  using A = Accumulation<T>;
  StatisticsArguments<A> arguments;
  arguments.classes = block.classes;
  arguments.row_stride = block.row_stride;
  arguments.first_class = block.first_class;
  arguments.transform = logit_transform<A>(block);
  arguments.terms = class_terms<A>(block);
  arguments.target = block.target;
  arguments.max = static_cast<A*>(statistics.max);
  arguments.sum = static_cast<A*>(statistics.sum);
  arguments.target_out = static_cast<A*>(statistics.target);
  arguments.target_mass = static_cast<A*>(statistics.target_mass);
  arguments.weighted = static_cast<A*>(statistics.weighted);
  arguments.entropy = static_cast<A*>(statistics.entropy);
  arguments.argmax = statistics.argmax;
  arguments.continues = continues;

  const auto* logits = static_cast<const T*>(block.logits);
  MEMEFF_LAUNCH(row_statistics_kernel<T>, dim3(static_cast<unsigned>(block.tokens)),
                dim3(threads_per_row(block.classes, kPerVector<T>)), 0, stream, logits, arguments);
  return launch_status();
}

}  // namespace

Status row_statistics(const LogitsBlock& block, const TokenStatistics& statistics, bool continues,
                      void* stream) {
  if (block.tokens == 0) return {};
  if (statistics.max == nullptr || statistics.sum == nullptr)
    return {"row_statistics: max and sum must be given"};
  switch (block.dtype) {
    case DType::kBFloat16: return launch<__nv_bfloat16>(block, statistics, continues, stream);
    case DType::kFloat16: return launch<__half>(block, statistics, continues, stream);
    case DType::kFloat32: return launch<float>(block, statistics, continues, stream);
    case DType::kFloat64: return launch<double>(block, statistics, continues, stream);
  }
  return {"row_statistics: unknown dtype"};
}

}  // namespace memeff::cuda
