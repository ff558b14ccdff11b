// A tile of C = A B^T on tensor cores: [kRows, kColumns] of C per thread block, operands 16 bit,
// k contiguous, fp32 accumulation.
//
//            kColumns = 128 (B rows)
//          +---------------+---------------+
//          | warp 0        | warp 4        |   8 warps, 4 x 2; each computes 32 x 64 of C as
//          | warp 1        | warp 5        |   2 x 8 products mma.m16n8k16 per 16 of k
//  kRows   | warp 2        | warp 6        |
//  = 128   | warp 3        | warp 7        |
//          +---------------+---------------+
//
// Slices of kDepth = 32 of k of both operands pass through a ring of kStages buffers in shared
// memory (16 KiB each). cp.async fills the buffer that all threads have left; one barrier per slice
// says so.
//
// A row of a slice is 64 bytes, four chunks of 16. Chunk c of row r lies at position
// c ^ (r / 2 % 4) of the row, so that the 8 rows that ldmatrix reads at once (same c) cover all 32
// banks.
#pragma once

#include "cuda/common/vector_io.cuh"
#include "cuda/ptx/sm80.cuh"

namespace memeff::cuda::sm80 {

constexpr int kRows = 128, kColumns = 128, kDepth = 32, kStages = 3;
constexpr int kThreads = 256;
constexpr int kWarpRows = 32, kWarpColumns = 64;
constexpr int kOperandBytes = kRows * kDepth * 2;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
constexpr int kChunk = 8;  // elements of 16 bytes

MEMEFF_DEVICE uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kDepth * 2 + ((chunk ^ (row / 2 % 4)) << 4));
}

// A row-major matrix [rows, depth] whose rows are operands.
template <class T>
struct Operand {
  const T* data;
  int64_t rows, depth, stride;
};

// Starts to copy rows [first_row, first_row + 128) x [first_k, first_k + 32) to shared memory;
// zeros where the matrix ends. Rows that are not 16-byte aligned go through registers.
template <bool kAligned, class T>
MEMEFF_DEVICE void load_slice(unsigned char* to, const Operand<T>& from, int64_t first_row,
                              int64_t first_k) {
  constexpr int kChunksPerRow = kDepth / kChunk;
#pragma unroll
  for (int pass = 0; pass < kRows * kChunksPerRow / kThreads; ++pass) {
    const int i = pass * kThreads + threadIdx.x;
    const int row = i / kChunksPerRow, chunk = i % kChunksPerRow;
    const int64_t k = first_k + chunk * kChunk;
    int64_t present = first_row + row < from.rows ? from.depth - k : 0;
    present = present < 0 ? 0 : present > kChunk ? kChunk : present;
    // An address inside the matrix even when nothing is read from it.
    const T* source = present > 0 ? from.data + (first_row + row) * from.stride + k : from.data;
    unsigned char* target = to + chunk_offset(row, chunk);
    if constexpr (kAligned) {
      ptx::cp_async_16(ptx::shared_address(target), source, static_cast<int>(present * sizeof(T)));
    } else {
      T values[kChunk];
#pragma unroll
      for (int e = 0; e < kChunk; ++e) values[e] = e < present ? source[e] : narrow<T>(0.f);
      store(reinterpret_cast<T*>(target), values);
    }
  }
}

// What a warp holds of the tile of C.
struct Accumulators {
  float value[2][8][4];  // [16 rows][8 columns][mma fragment]

  MEMEFF_DEVICE void clear() {
#pragma unroll
    for (auto& rows : value)
#pragma unroll
      for (auto& columns : rows)
#pragma unroll
        for (float& x : columns) x = 0.f;
  }
};

MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            __nv_bfloat16) {
  ptx::mma_m16n8k16_bf16(d, a, b);
}
MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  ptx::mma_m16n8k16_fp16(d, a, b);
}

// Adds the product of one slice.
template <class T>
MEMEFF_DEVICE void multiply_slice(Accumulators& c, const unsigned char* stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp % 4 * kWarpRows, first_column = warp / 4 * kWarpColumns;
  const uint32_t a_base = ptx::shared_address(stage), b_base = a_base + kOperandBytes;
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    // ldmatrix takes its four 8x8 matrices in the order of the fragment's registers: for A rows
    // 0-7, 8-15 of the left half of k, then of the right; for B both halves of k of 8 columns,
    // twice.
    uint32_t a[2][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ptx::ldmatrix_x4(a[i],
                       a_base + chunk_offset(first_row + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      ptx::ldmatrix_x4(b[j], b_base + chunk_offset(first_column + j * 16 + lane % 8 + lane / 16 * 8,
                                                   k * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply(c.value[i][j], a[i], pair, T{});
      }
  }
}

// Which element of the tile c.value[i][j][e] of this thread is.
MEMEFF_DEVICE int row_in_tile(int i, int e) {
  return threadIdx.x / 32 % 4 * kWarpRows + i * 16 + e / 2 * 8 + threadIdx.x % 32 / 4;
}
MEMEFF_DEVICE int column_in_tile(int j, int e) {
  return threadIdx.x / 128 * kWarpColumns + j * 8 + threadIdx.x % 4 * 2 + e % 2;
}

}  // namespace memeff::cuda::sm80
