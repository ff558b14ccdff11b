// Results on their way from accumulators to global memory, through shared memory and TMA.
//
// A box is 64 rows of 128 bytes with 128-byte swizzle: 64 x 64 16-bit numbers, or 64 x 32 floats.
// Each consumer warpgroup owns two: while TMA reads one, the other is filled. TMA needs no
// registers and no thread's time, so stores overlap with the next box and with the next tile's main
// loop, and it clips what reaches past the end of the tensor: rows to whole 16 bytes, so that
// padding behind a row may be written, too (seen on an H100: triton-lang/triton issue 11583).
//
// In a row, 16-byte piece p lies at p ^ (row % 8). stmatrix then hits all 32 banks once; the 8-byte
// stores of floats meet 2 to a bank.
#pragma once

#include "cuda/common/vector_io.cuh"
#include "cuda/sm90/pipeline.cuh"

namespace memeff::cuda::sm90 {

MEMEFF_DEVICE unsigned char* piece_of(unsigned char* box, int row, int piece) {
  return box + row * 128 + ((piece ^ (row % 8)) << 4);
}

MEMEFF_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, static_cast<const void*>(&pair), sizeof bits);
  return bits;
}
MEMEFF_DEVICE uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, static_cast<const void*>(&pair), sizeof bits);
  return bits;
}

// The two boxes of this thread's warpgroup. All its threads call begin, fill the box, call end.
class BoxStore {
 public:
  MEMEFF_DEVICE explicit BoxStore(unsigned char* shared_memory)
      : boxes_(shared_memory + kBoxesAt + consumer_group() * 2 * kBoxBytes),
        barrier_(kBoxBarrier + consumer_group()),
        issues_(threadIdx.x % kGroupThreads == 0) {}

  // A box that TMA has finished reading.
  MEMEFF_DEVICE unsigned char* begin() {
    if (issues_) ptx::bulk_wait_read<1>();  // all but the other box
    ptx::bar_sync(barrier_, kGroupThreads);
    return boxes_ + current_ * kBoxBytes;
  }

  // The box goes to `column`, `row` of the tensor, or is added there.
  MEMEFF_DEVICE void end(const TensorMap* map, int column, int row, bool add = false) {
    ptx::fence_proxy_async();
    ptx::bar_sync(barrier_, kGroupThreads);
    if (issues_) {
      const uint32_t box = ptx::shared_address(boxes_ + current_ * kBoxBytes);
      if (add)
        ptx::tma_reduce_add_2d(map, box, column, row);
      else
        ptx::tma_store_2d(map, box, column, row);
      ptx::bulk_commit();
    }
    current_ ^= 1;
  }

  // Before the thread ends: its boxes are gone once the block's shared memory is.
  MEMEFF_DEVICE void finish() {
    if (issues_) ptx::bulk_wait_read<0>();
  }

 private:
  unsigned char* boxes_;
  int barrier_;  // named barrier of the warpgroup
  bool issues_;
  int current_ = 0;
};

// ---- accumulators to boxes; c are consecutive accumulators, see mainloop() ----

// Pairs of adjacent columns that a thread has of a box of 16-bit numbers: pair i are the accumulators
// 2 i and 2 i + 1 of 32.
constexpr int kPairsOfBox = 16;

// Address of the lane's row of 16 bytes, the one it brings to the j-th of 4 ldmatrix or stmatrix of a
// box. The matrices of one: rows 0-7 and 8-15 of 8 columns, then of the next 8. (Derived from the
// box's address rather than added to it: 4 offsets, known before the first tile, would be spilled.)
MEMEFF_DEVICE uint32_t matrix_row(uint32_t box, int j) {
  const int lane = lane_index(), row = warp_of_group() * 16 + lane % 16;
  return (box + row * 128 + ((lane / 16 ^ row % 8) << 4)) ^ j << 5;
}

// 64 rows x 64 columns, of which pair(i) gives the thread's share.
template <class Pair>
MEMEFF_DEVICE void fill_box_of_pairs(unsigned char* box, const Pair& pair) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t r[4] = {pair(4 * j), pair(4 * j + 1), pair(4 * j + 2), pair(4 * j + 3)};
    ptx::stmatrix_x4(matrix_row(ptx::shared_address(box), j), r);
  }
}

// The reverse, of the box that TMA has filled `offset` behind another.
MEMEFF_DEVICE void read_box(uint32_t (&pairs)[kPairsOfBox], uint32_t box, int offset) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, matrix_row(box, j) + offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[4 * j + i] = r[i];
  }
}

// 64 rows x 64 columns of the product become rows of T.
template <class T>
MEMEFF_DEVICE void fill_box(unsigned char* box, const float* c) {
  fill_box_of_pairs(box, [&](int i) { return pack(c[2 * i], c[2 * i + 1], T{}); });
}

// 64 rows x 64 columns of the product, transposed: a row of the box is a column.
template <class T>
MEMEFF_DEVICE void fill_box_transposed(unsigned char* box, const float* c) {
  const int lane = lane_index();
  const int column = lane / 16 * 8 + lane % 8, piece = warp_of_group() * 2 + lane / 8 % 2;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* v = c + 8 * j;
    const uint32_t r[4] = {pack(v[0], v[1], T{}), pack(v[2], v[3], T{}), pack(v[4], v[5], T{}),
                           pack(v[6], v[7], T{})};
    ptx::stmatrix_x4_trans(ptx::shared_address(piece_of(box, 16 * j + column, piece)), r);
  }
}

// 64 rows x 32 columns of the product as floats. Addresses are derived as in matrix_row().
MEMEFF_DEVICE void fill_box_of_floats(unsigned char* box, const float* c) {
  const int lane = lane_index(), row = warp_of_group() * 16 + lane / 4;
  const uint32_t begin = ptx::shared_address(box);
  const uint32_t first = begin + row * 128 + ((lane % 4 / 2 ^ row % 8) << 4) + lane % 2 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float pair[2] = {c[4 * j + 2 * half], c[4 * j + 2 * half + 1]};
      unsigned char* const at = box + ((first ^ j << 5) - begin) + half * 8 * 128;
      store(reinterpret_cast<float*>(at), pair);
    }
  }
}

}  // namespace memeff::cuda::sm90
