// A tile of C = A B on tensor cores: 128 x 128 of C per thread block, 16-bit operands, fp32
// accumulation. What the kernels of this folder have in common.
//
//            kColumns = 128
//          +---------------+---------------+
//          | warp 0        | warp 2        |   4 warps, 2 x 2; each computes 64 x 64 of C as
//  kRows   |               |               |   4 x 8 products mma.m16n8k16 per 16 of k
//  = 128   +---------------+---------------+
//          | warp 1        | warp 3        |
//          +---------------+---------------+
//
// Why 64 x 64 per warp: per 16 of k a warp reads 4 KiB from shared memory for 64 K multiply-adds.
// An SM of sm_80 does those in 64 cycles, its shared memory delivers 4 KiB in 32; tiles of 32 x 64
// would need all of that bandwidth (24 of 32 cycles, and 8 more for the copies that fill it). The
// accumulators take 128 registers per thread, so two blocks of 128 threads fit an SM: one computes
// while the other waits at a barrier or is in its epilogue.
//
// Slices of kDepth = 32 of k of both operands pass through a ring of kStages buffers in shared
// memory, 8 KiB per operand. cp.async fills the buffer that all threads have left; one barrier per
// slice says so. Three stages (48 KiB) let two blocks fit also the 100 KiB of sm_86 and sm_89.
//
// A slice lies in shared memory as it lies in global memory, in chunks of 16 bytes: 128 rows of 4
// chunks where k is contiguous, 32 rows of 16 chunks where the tile's index is (ldmatrix then
// transposes). Within its row a chunk is moved (chunk_offset) so that the 8 rows that ldmatrix
// reads at once, all at the same chunk, cover all 32 banks.
#pragma once

#include "core/math.h"
#include "cuda/common/vector_io.cuh"
#include "cuda/ptx/sm80.cuh"

namespace memeff::cuda::sm80 {

constexpr int kRows = 128, kColumns = 128, kDepth = 32, kStages = 3;
constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 2;
constexpr int kWarpRows = 64, kWarpColumns = 64;
constexpr int kOperandBytes = kRows * kDepth * 2;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kPipelineBytes = kStages * kStageBytes;
constexpr int kChunk = 8;  // elements of 16 bytes

// A row-major matrix in global memory.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;
};

template <class T>
bool chunks_are_aligned(const Matrix<T>& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride % kChunk == 0;
}

// ---- slices ----

// Which index of an operand is contiguous in memory: k, or the row of A or column of B.
enum class Contiguous { kDepth, kTile };

template <int kBoxColumns>
MEMEFF_DEVICE uint32_t chunk_offset(int row, int chunk) {
  static_assert(kBoxColumns == 32 || kBoxColumns == 128);
  // Rows of 64 bytes: two of them span the banks, so pairs of rows are moved alike.
  const int moved = kBoxColumns == 32 ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8);
  return static_cast<uint32_t>(row * kBoxColumns * 2 + moved * 16);
}

// Where one operand's slices come from: rows of A or columns of B from `first` on. A thread copies
// the same chunk of several rows of each slice, so that all it computes per chunk is an addition
// and whether the row exists. Zeros where the matrix ends. A matrix whose rows are not 16-byte
// aligned goes through registers.
template <bool kAligned, Contiguous kContiguous, class T>
class SliceSource {
 public:
  MEMEFF_DEVICE SliceSource(const Matrix<T>& from, int64_t first) : stride_(from.stride) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / kChunksPerRow, chunk = thread % kChunksPerRow;
    offset_ = chunk_offset<kBoxColumns>(row, chunk);
    if constexpr (kContiguous == Contiguous::kDepth) {
      origin_ = from.data + (first + row) * stride_ + chunk * kChunk;
      depth_ = from.columns - chunk * kChunk;
      tile_left_ = count_left<kRows>(first + row, from.rows);
    } else {
      origin_ = from.data + row * stride_ + first + chunk * kChunk;
      depth_ = from.rows - row;
      tile_left_ = count_left<kChunk>(first + chunk * kChunk, from.columns);
    }
  }

  // Starts to copy the slice that begins at k. Rows of k whose factor is 0 count as zeros; no factors:
  // all rows count.
  MEMEFF_DEVICE void load(unsigned char* to, int64_t k, const float* factors = nullptr) const {
    constexpr bool kDepthAdjacent = kContiguous == Contiguous::kDepth;
    const T* source = origin_ + (kDepthAdjacent ? k : k * stride_);
    const int columns = kDepthAdjacent ? count_left<kChunk>(k, depth_) : tile_left_;
    const int rows = kDepthAdjacent ? tile_left_ : count_left<kDepth>(k, depth_);
    // One chunk at a time through registers: the accumulators leave room for no more.
#pragma unroll(kAligned ? kBoxRows / kRowsAtOnce : 1)
    for (int row = 0; row < kBoxRows; row += kRowsAtOnce) {
      int present = row < rows ? columns : 0;
      if constexpr (!kDepthAdjacent)
        if (factors != nullptr && present > 0 &&
            factors[k + row + static_cast<int>(threadIdx.x) / kChunksPerRow] == 0.f)
          present = 0;
      unsigned char* target = to + offset_ + row * kBoxColumns * 2;
      if constexpr (kAligned) {
        ptx::cp_async_16(ptx::shared_address(target), source,
                         present * static_cast<int>(sizeof(T)));
      } else {
        T values[kChunk];
        memeff::cuda::load(values, source, present);
        store(reinterpret_cast<T*>(target), values);
      }
      source += kRowsAtOnce * stride_;
    }
  }

 private:
  static constexpr int kBoxColumns = kContiguous == Contiguous::kDepth ? kDepth : kColumns;
  static constexpr int kBoxRows = kOperandBytes / 2 / kBoxColumns;
  static constexpr int kChunksPerRow = kBoxColumns / kChunk;
  static constexpr int kRowsAtOnce = kThreads / kChunksPerRow;
  static_assert(kRowsAtOnce % 8 == 0, "chunk_offset moves all of a thread's chunks alike");

  const T* origin_;  // of the thread's first chunk of the slice at k = 0
  int64_t stride_;
  int64_t depth_;    // what is left of k from that chunk on
  int tile_left_;    // and of the tile's index
  uint32_t offset_;  // in shared memory
};

// ---- products ----

// What a thread holds of the tile of C: 16 columns of each of 8 rows.
constexpr int kThreadRows = 8, kThreadColumns = 16;

struct Accumulators {
  float value[kWarpRows / 16][kWarpColumns / 8][4];  // [16 rows][8 columns][mma fragment]

  MEMEFF_DEVICE float& at(int row, int column) {
    return value[row / 2][column / 2][row % 2 * 2 + column % 2];
  }
  MEMEFF_DEVICE void clear() {
#pragma unroll
    for (auto& rows : value)
#pragma unroll
      for (auto& columns : rows)
#pragma unroll
        for (float& x : columns) x = 0.f;
  }
};

// Where at(row, column) of this thread lies in the tile.
MEMEFF_DEVICE int row_in_tile(int row) {
  const int thread = static_cast<int>(threadIdx.x);
  return thread / 32 % 2 * kWarpRows + row * 8 + thread % 32 / 4;
}
MEMEFF_DEVICE int column_in_tile(int column) {
  const int thread = static_cast<int>(threadIdx.x);
  return thread / 64 * kWarpColumns + column / 2 * 8 + thread % 4 * 2 + column % 2;
}

// ldmatrix takes its four 8x8 matrices in the order of the fragment's registers. For A: rows 0-7,
// 8-15 of the left half of k, then of the right.
template <Contiguous kContiguous>
MEMEFF_DEVICE void load_a(uint32_t (&a)[4], uint32_t slice, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kContiguous == Contiguous::kDepth)
    ptx::ldmatrix_x4(a, slice + chunk_offset<kDepth>(row + lane % 16, k / kChunk + lane / 16));
  else
    ptx::ldmatrix_x4_trans(
        a, slice + chunk_offset<kRows>(k + lane % 8 + lane / 16 * 8, row / kChunk + lane / 8 % 2));
}

// For B: both halves of k of 8 columns, then of the next 8.
template <Contiguous kContiguous>
MEMEFF_DEVICE void load_b(uint32_t (&b)[4], uint32_t slice, int column, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kContiguous == Contiguous::kDepth)
    ptx::ldmatrix_x4(b, slice + chunk_offset<kDepth>(column + lane % 8 + lane / 16 * 8,
                                                     k / kChunk + lane / 8 % 2));
  else
    ptx::ldmatrix_x4_trans(
        b, slice + chunk_offset<kColumns>(k + lane % 16, column / kChunk + lane / 16));
}

MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            __nv_bfloat16) {
  ptx::mma_m16n8k16_bf16(d, a, b);
}
MEMEFF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  ptx::mma_m16n8k16_fp16(d, a, b);
}

// Adds the product of one slice.
template <class T, Contiguous kContiguousA, Contiguous kContiguousB>
MEMEFF_DEVICE void multiply_slice(Accumulators& c, const unsigned char* stage) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = warp % 2 * kWarpRows, first_column = warp / 2 * kWarpColumns;
  const uint32_t slice_a = ptx::shared_address(stage), slice_b = slice_a + kOperandBytes;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) load_a<kContiguousA>(a[i], slice_a, first_row + i * 16, k);
#pragma unroll
    for (int j = 0; j < 4; ++j) load_b<kContiguousB>(b[j], slice_b, first_column + j * 16, k);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply(c.value[i][j], a[i], half, T{});
      }
  }
}

// Runs slices through the ring. load(stage) starts the copies of the next slice, or returns false
// when there is none left; multiply(stage) uses the oldest. Afterwards no copy is in flight, but
// threads may still be reading the last slice.
template <class Load, class Multiply>
MEMEFF_DEVICE void run_pipeline(unsigned char* stages, Load load, Multiply multiply) {
  int64_t started = 0;
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (load(stages + stage * kStageBytes)) ++started;
    ptx::cp_async_commit();  // also when empty: the wait below counts groups
  }
  int read = 0, write = kStages - 1;
  for (int64_t done = 0; done < started; ++done) {
    ptx::cp_async_wait<kStages - 2>();
    // The oldest slice has arrived for everybody, and everybody has left the buffer before it,
    // which the next load overwrites.
    __syncthreads();
    if (load(stages + write * kStageBytes)) ++started;
    ptx::cp_async_commit();
    multiply(stages + read * kStageBytes);
    read = read == kStages - 1 ? 0 : read + 1;
    write = write == kStages - 1 ? 0 : write + 1;
  }
}

// The way out through shared memory, 64 rows of C at a time (two of the four warps have them):
// calls put(row of the 64, column, value, value of the next column).
template <class Put>
MEMEFF_DEVICE void for_rows_of_half(Accumulators& c, int first_row, Put put) {
  const int mine = row_in_tile(0) / kWarpRows * kWarpRows;
  if (mine != first_row) return;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
    for (int v = 0; v < kThreadColumns; v += 2)
      put(row_in_tile(r) - first_row, column_in_tile(v), c.at(r, v), c.at(r, v + 1));
}

// ---- order of blocks ----

// Blocks start in the order of their index. Those that run at the same time (216 on 108 SMs) read
// each slice of their rows and columns of tiles once from memory, later from L2; 16 rows of tiles
// by 13.5 columns need the fewest. So tiles are numbered down groups of 16 rows.
constexpr unsigned kGroupRows = 16;

struct TileIndex {
  unsigned row, column;
};
MEMEFF_DEVICE TileIndex tile_of_block(unsigned row_tiles, unsigned column_tiles) {
  const unsigned group = blockIdx.x / (kGroupRows * column_tiles);
  const unsigned in_group = blockIdx.x % (kGroupRows * column_tiles);
  const unsigned first = group * kGroupRows;
  const unsigned height = row_tiles - first < kGroupRows ? row_tiles - first : kGroupRows;
  return {first + in_group % height, in_group / height};
}

}  // namespace memeff::cuda::sm80
