// gemm through torch: on a GPU that is cuBLAS, with torch's handles, workspaces, settings and current
// stream. (Under the emulator the same code multiplies CPU tensors.)
#include "cuda/gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "cuda/runtime.h"

#if !defined(MEMEFF_GEMM_DEVICE)
#define MEMEFF_GEMM_DEVICE at::kCUDA
#endif

namespace memeff::cuda {
namespace {

constexpr at::DeviceType kDeviceType = MEMEFF_GEMM_DEVICE;

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return at::kBFloat16;
    case DType::kFloat16: return at::kHalf;
    case DType::kFloat32: return at::kFloat;
    case DType::kFloat64: return at::kDouble;
  }
  return at::kFloat;
}

at::Device current_device() {
  if (kDeviceType == at::kCPU) return at::kCPU;
  return c10::impl::VirtualGuardImpl(kDeviceType).getDevice();
}

at::Tensor view_of(const void* data, DType dtype, at::Device device, int64_t rows, int64_t columns,
                   int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  // With the device given, torch need not ask the driver where the pointer belongs.
  return at::for_blob(const_cast<void*>(data), sizes)
      .strides(strides)
      .options(at::TensorOptions().dtype(scalar_type(dtype)).device(device))
      .target_device(device)
      .make_tensor();
}

at::Tensor view_of(const Matrix& m, at::Device device) {
  return view_of(m.data, m.dtype, device, m.rows, m.columns, m.row_stride, m.column_stride);
}

void multiply(const at::Tensor& a, const at::Tensor& b, bool accumulate, at::Tensor& c) {
  // With few rows or columns a CPU's library adds up all terms one after the other, as no GPU's does.
  constexpr int64_t kFew = 16;
  if (kDeviceType == at::kCPU && std::min(c.size(0), c.size(1)) < kFew) {
    const at::Tensor exact = at::mm(a.to(at::kDouble), b.to(at::kDouble));
    accumulate ? c.add_(exact) : c.copy_(exact);
    return;
  }
  if (a.scalar_type() == c.scalar_type()) {
    accumulate ? at::addmm_out(c, c, a, b) : at::mm_out(c, a, b);
  } else {  // 16-bit operands, fp32 sums
    accumulate ? at::addmm_out(c, c, a, b, at::kFloat) : at::mm_out(c, a, b, at::kFloat);
  }
}

/// A piece of at most `rows` and `columns` of a matrix, from the given ones on.
at::Tensor piece(const at::Tensor& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return m.narrow(0, row, std::min(rows, m.size(0) - row))
      .narrow(1, column, std::min(columns, m.size(1) - column));
}

/// C (+)= A B with both operands upcast. At any time one piece of each is alive: upcast_bytes().
void multiply_upcast(const at::Tensor& a, const at::Tensor& b, bool accumulate,
                     const at::Tensor& c) {
  const int64_t inner = std::max<int64_t>(1, a.size(1));  // C is zeroed if there is nothing to sum
  for (int64_t k = 0; k < inner; k += kUpcastDepth) {
    for (int64_t column = 0; column < c.size(1); column += kUpcastColumns) {
      const at::Tensor right = piece(b, k, kUpcastDepth, column, kUpcastColumns).to(at::kFloat);
      for (int64_t row = 0; row < c.size(0); row += kUpcastRows) {
        at::Tensor out = piece(c, row, kUpcastRows, column, kUpcastColumns);
        multiply(piece(a, row, kUpcastRows, k, kUpcastDepth).to(at::kFloat), right,
                 accumulate || k > 0, out);
      }
    }
  }
}

}  // namespace

void gemm(const Matrix& a, const Matrix& b, bool accumulate, void* c, int64_t c_stride) {
  if (a.rows == 0 || b.columns == 0) return;
  const at::Device device = current_device();
  const at::Tensor left = view_of(a, device), right = view_of(b, device);
  at::Tensor out = view_of(c, accumulation_dtype(a.dtype), device, a.rows, b.columns, c_stride, 1);
  // torch's products on a CPU have no fp32 results of 16-bit operands.
  const bool on_cpu = kDeviceType == at::kCPU && is_16_bit(a.dtype);
  if (on_cpu || upcasts(a.dtype, current_gpu()))
    multiply_upcast(left, right, accumulate, out);
  else
    multiply(left, right, accumulate, out);
}

}  // namespace memeff::cuda
