// Which matrix element sits where, according to CuTe (the layouts that NVIDIA's CUTLASS kernels are
// built on): an oracle for the emulator's fragment and swizzle maps. Kept apart from the tests that
// use it, because CuTe's headers and the emulator's macros do not go together.
#pragma once

#include <cstdint>

namespace memeff::cute_oracle {

struct Coordinate {
  int row, column;
};

// mma.m16n8k*, k = 8 or 16: A [16,k], B [k,8], D [16,8]; `value` counts a lane's elements.
Coordinate mma_a(int k, int lane, int value);
Coordinate mma_b(int k, int lane, int value);
Coordinate mma_d(int lane, int value);

// ldmatrix and stmatrix .x4 over 256 elements of 16 bits, in the order of the 32 rows of 8: the
// index of a lane's element `value` (0 to 7).
int ldmatrix_x4(bool transposed, int lane, int value);
int stmatrix_x4(bool transposed, int lane, int value);

// wgmma m64nNk16, one warpgroup: A [64,16] in registers, D [64,N].
Coordinate wgmma_a(int thread, int value);
Coordinate wgmma_d(int thread, int value);

// Shared-memory tiles of 16-bit elements with 128-byte swizzle; the offset in bytes from a
// 1024-aligned base. K-major: [rows, 64], element (row, k). MN-major: [mn, 64], element (mn, k), mn
// contiguous.
int k_major_offset(int row, int k);  // row < 128
int mn_major_offset(int mn, int k);  // mn < 128

// wgmma m64n256k16: the descriptor of A [128,64] or B [256,64] in such a tile that begins at the shared
// address `tile`, from row first_mn (of A, a multiple of 64) and the 16 k number k16 on.
std::uint64_t descriptor(bool of_a, bool mn_major, std::uint32_t tile, int first_mn, int k16);

}  // namespace memeff::cute_oracle
