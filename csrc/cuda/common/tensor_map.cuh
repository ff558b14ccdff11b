// Descriptions of two-dimensional tensors for TMA, made on the host and passed to kernels as
// __grid_constant__ arguments.
#pragma once

#include "cuda/common/device.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace memeff {

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

enum class TensorMapElement { kBFloat16, kFloat16, kFloat32 };

struct TensorMapLayout {
  void* base = nullptr;  // multiple of 16
  TensorMapElement element = TensorMapElement::kBFloat16;
  uint64_t columns = 0, rows = 0;
  uint64_t row_bytes = 0;    // distance of rows, a multiple of 16
  uint32_t box_columns = 0;  // the tile that one copy moves; at most 128 bytes wide
  uint32_t box_rows = 0;     // at most 256
  bool swizzle = true;       // 128-byte swizzle, which wgmma operands need
};

static inline Status make_tensor_map(const TensorMapLayout& layout, TensorMap* map) {
  const uint32_t element_bytes = layout.element == TensorMapElement::kFloat32 ? 4 : 2;
#if defined(__CUDACC__)
  // The encoder lives in libcuda, which a build machine need not have: it is looked up at run time.
  void* encoder = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encoder, 12000, cudaEnableDefault,
                                       &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return {"the CUDA driver has no cuTensorMapEncodeTiled"};
  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  const cuuint64_t size[2] = {layout.columns, layout.rows};
  const cuuint64_t stride[1] = {layout.row_bytes};
  const cuuint32_t box[2] = {layout.box_columns, layout.box_rows};
  const cuuint32_t step[2] = {1, 1};
  (void)element_bytes;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encoder)(
      map, types[static_cast<int>(layout.element)], 2, layout.base, size, stride, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      layout.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return {"cuTensorMapEncodeTiled refused the tensor"};
#else
  // What the driver's documentation demands.
  const uint64_t box_bytes = uint64_t{layout.box_columns} * element_bytes;
  const auto is_size = [](uint64_t n) { return n > 0 && n <= uint64_t{1} << 32; };
  const auto is_box = [](uint32_t n) { return n > 0 && n <= 256; };
  if (reinterpret_cast<uintptr_t>(layout.base) % 16 != 0 || !is_size(layout.columns) ||
      !is_size(layout.rows) || layout.row_bytes % 16 != 0 || layout.row_bytes >> 40 != 0 ||
      layout.row_bytes < layout.columns * element_bytes || !is_box(layout.box_columns) ||
      !is_box(layout.box_rows) || box_bytes % 16 != 0 || (layout.swizzle && box_bytes > 128))
    return {"the emulated cuTensorMapEncodeTiled refuses the tensor"};
  map->base = static_cast<unsigned char*>(layout.base);
  map->columns = layout.columns;
  map->rows = layout.rows;
  map->row_bytes = layout.row_bytes;
  map->box_columns = layout.box_columns;
  map->box_rows = layout.box_rows;
  map->element_bytes = element_bytes;
  map->swizzle_bytes = layout.swizzle ? 128 : 0;
#endif
  return {};
}

}  // namespace memeff
