// Elementwise work on rows of gradients, any architecture: sums into a gradient, copies, scaling.
//
//   update_rows     gradient <- scale * sums, or another update of core/weight_update.h; the sums may be
//                   in parts, which are added one after the other
//   copy_rows       to <- from, of the same type or to fp32                        [rows, columns]
//   multiply_rows   to[row] <- factors[row] * from[row]                            [rows, columns]
//   find_non_finite_rows   found <- 1 if a row whose factor is 0 is not finite     [rows, columns]
//   scale_gradient  gradient <- scale * from                                       [n]
//
// Each thread handles kColumns adjacent elements of a row; a thread block of 256 threads is `lanes`
// along a row by 256 / lanes rows. Everything is read once and written once; no shared memory.
//
// Numerics: in the accumulation type, one rounding to the gradient's type; split sums are not rounded
// at all, or to the codes of compact sums, whose blocks of 64 columns 8 neighbouring lanes share
// (common/weight_update.cuh).
#include "core/math.h"
#include "cuda/common/weight_update.cuh"
#include "cuda/generic_kernels.h"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a thread: 16 bytes of a 16-bit gradient, 32 of its fp32 sums

// Launches a kernel over the matrix [rows, columns] of `call`.
template <class Call>
Status launch(void (*kernel)(Call, int64_t), const Call& call, void* stream) {
  if (call.rows == 0 || call.columns == 0) return {};
  const unsigned lanes = threads_along(call.columns, kColumns, kThreads);
  const int64_t blocks_per_row = ceil_div(call.columns, lanes * kColumns);
  const auto blocks = static_cast<unsigned>(blocks_per_row * ceil_div(call.rows, kThreads / lanes));
  MEMEFF_LAUNCH(kernel, dim3(blocks), dim3(lanes, kThreads / lanes), 0, stream, call,
                blocks_per_row);
  return launch_status();
}

// Where a thread of such a kernel works; nowhere when count is 0.
struct RowPosition {
  int64_t row, column;
  int count;
};

MEMEFF_DEVICE RowPosition row_position(int64_t blocks_per_row, int64_t rows, int64_t columns) {
  RowPosition at;
  at.row = blockIdx.x / blocks_per_row * blockDim.y + threadIdx.y;
  at.column = (blockIdx.x % blocks_per_row * blockDim.x + threadIdx.x) * kColumns;
  at.count = at.row < rows ? count_left<kColumns>(at.column, columns) : 0;
  return at;
}

template <class G>
__global__ void __launch_bounds__(kThreads)
    update_rows_kernel(RowUpdate update, int64_t blocks_per_row) {
  using A = Accumulation<G>;
  // Threads that have no columns stay for the others' shuffles.
  const RowPosition at = row_position(blocks_per_row, update.rows, update.columns);
  const auto* scales = static_cast<const A*>(update.scale);
  const bool scaled = scales != nullptr && at.count > 0;
  const A scale = scaled ? scales[at.row * update.scale_stride] : A(1);
  A sums[kColumns];
  const A* from = static_cast<const A*>(update.sums) + at.row * update.sums_stride + at.column;
  load(sums, from, at.count);
  for (int64_t part = 1; part < update.parts; ++part) {
    A more[kColumns];
    from += update.part_stride;
    load(more, from, at.count);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += more[i];
  }
  update_gradient(update.update, sums, scale, static_cast<G*>(update.gradient),
                  update.gradient_stride, update.split, at.row, at.column, at.count);
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(RowCopy copy, int64_t blocks_per_row) {
  const RowPosition at = row_position(blocks_per_row, copy.rows, copy.columns);
  if (at.count == 0) return;
  From values[kColumns];
  To converted[kColumns];
  load(values, static_cast<const From*>(copy.from) + at.row * copy.from_stride + at.column,
       at.count);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if constexpr (std::is_same_v<From, To>) {
      converted[i] = values[i];
    } else {
      converted[i] = static_cast<To>(widen(values[i]));
    }
  }
  store(static_cast<To*>(copy.to) + at.row * copy.to_stride + at.column, converted, at.count);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    multiply_rows_kernel(RowProduct call, int64_t blocks_per_row) {
  const RowPosition at = row_position(blocks_per_row, call.rows, call.columns);
  if (at.count == 0) return;
  const auto factor = static_cast<Accumulation<T>>(call.factors[at.row]);
  T values[kColumns] = {};
  if (factor != 0) {
    load(values, static_cast<const T*>(call.from) + at.row * call.from_stride + at.column,
         at.count);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = narrow<T>(widen(values[i]) * factor);
  }
  store(static_cast<T*>(call.to) + at.row * call.to_stride + at.column, values, at.count);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    find_non_finite_rows_kernel(NonFiniteRows call, int64_t blocks_per_row) {
  const RowPosition at = row_position(blocks_per_row, call.rows, call.columns);
  if (at.count == 0 || call.factors[at.row] != 0.f) return;
  T values[kColumns];
  load(values, static_cast<const T*>(call.matrix) + at.row * call.stride + at.column, at.count);
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) finite &= isfinite(widen(values[i])) != 0;
  if (!finite) atomicMax(call.found, 1);
}

// As many thread blocks as a large GPU holds at a time; each walks over the array in steps of all.
constexpr int64_t kScaleBlocks = 2048;

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_gradient_kernel(const T* from, T* to, int64_t n, const double* scale) {
  if (*scale == 1.0 && from == to) return;
  const auto factor = static_cast<Accumulation<T>>(*scale);
  const int64_t step = int64_t{gridDim.x} * kThreads * kColumns;
  for (int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kColumns; first < n;
       first += step) {
    T values[kColumns];
    const int count = count_left<kColumns>(first, n);
    load(values, from + first, count);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) values[i] = narrow<T>(widen(values[i]) * factor);
    store(to + first, values, count);
  }
}

}  // namespace

Status update_rows(const RowUpdate& update, void* stream) {
  if (update.update == WeightUpdate::kAccumulate) {
    if (is_16_bit(update.dtype)) return {"update_rows: gradients of 16 bits add up in split sums"};
  } else if (update.update != WeightUpdate::kWrite) {
    const bool compact = update.split.exponents != nullptr;
    if (!(compact ? is_16_bit(update.dtype) : update.dtype == DType::kBFloat16))
      return {"update_rows: split sums are bfloat16, or compact ones of 16 bits"};
    if (!compact && update.split.remainder == nullptr)
      return {"update_rows: split sums need a remainder or exponents"};
  }
  return dispatch(update.dtype, [&](auto* type) {
    return launch(update_rows_kernel<std::remove_pointer_t<decltype(type)>>, update, stream);
  });
}

Status copy_rows(const RowCopy& copy, void* stream) {
  const DType from = copy.from_dtype;
  if (from == copy.to_dtype) {
    switch (size_of(from)) {
      case 2: return launch(copy_rows_kernel<uint16_t, uint16_t>, copy, stream);
      case 4: return launch(copy_rows_kernel<float, float>, copy, stream);
      default: return launch(copy_rows_kernel<double, double>, copy, stream);
    }
  }
  if (copy.to_dtype == DType::kFloat32) {
    if (from == DType::kBFloat16)
      return launch(copy_rows_kernel<__nv_bfloat16, float>, copy, stream);
    if (from == DType::kFloat16) return launch(copy_rows_kernel<__half, float>, copy, stream);
    if (from == DType::kFloat64) return launch(copy_rows_kernel<double, float>, copy, stream);
  }
  return {"copy_rows: to the same type, or from 16 or 64 bits to float32"};
}

Status multiply_rows(const RowProduct& call, void* stream) {
  return dispatch(call.dtype, [&](auto* type) {
    return launch(multiply_rows_kernel<std::remove_pointer_t<decltype(type)>>, call, stream);
  });
}

Status find_non_finite_rows(const NonFiniteRows& call, void* stream) {
  return dispatch(call.dtype, [&](auto* type) {
    return launch(find_non_finite_rows_kernel<std::remove_pointer_t<decltype(type)>>, call, stream);
  });
}

Status scale_gradient(const void* from, void* gradient, DType dtype, int64_t n, const double* scale,
                      void* stream) {
  if (n == 0) return {};
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* source = static_cast<const T*>(from);
    auto* target = static_cast<T*>(gradient);
    const int64_t needed = ceil_div(n, kThreads * kColumns);
    const auto blocks = static_cast<unsigned>(needed < kScaleBlocks ? needed : kScaleBlocks);
    MEMEFF_LAUNCH(scale_gradient_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream, source, target,
                  n, scale);
    return launch_status();
  });
}

}  // namespace memeff::cuda
