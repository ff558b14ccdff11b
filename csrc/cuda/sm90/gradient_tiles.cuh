// What the products of a gradient G with respect to the scores, [classes, tokens], have in common,
// whether G lies in memory (gradient_products.cu) or is made of stored scores on the way
// (stored_products.cu): which tiles of G count. What becomes of C: gradient_epilogue.cuh.
//
// Tiles of G that count as zero are neither loaded nor multiplied. k advances by such a tile, 128,
// two steps of 64: a warp of the producer's group looks at 32 marks at once (ballot) and visits
// those that are set; a consumer warp need not know which they are, only how many, and counts them
// while the first are on their way.
#pragma once

#include "cuda/launch.h"
#include "cuda/sm90/pipeline.cuh"

namespace memeff::cuda::sm90 {

// Steps of k that make a tile of G.
constexpr int kTileK = static_cast<int>(kStoredTile), kStepsPerTile = kTileK / kStepK;
static_assert(kStoredTile == kTokenTile && kTileM == kTileK);

// Which tiles of G count, for the sums of one tile of C.
struct KTiles {
  const uint8_t* marks;  // of the first tile, or null: all count
  int64_t stride;
  int count;

  // Bit i: tile first + i counts. The whole warp asks.
  MEMEFF_DEVICE uint32_t next_32(int first) const {
    const int mine = first + lane_index();
    return __ballot_sync(~0u, mine < count && (marks == nullptr || marks[mine * stride] != 0));
  }
  // body(k): the first k of every tile that counts. The whole warp calls it.
  template <class Body>
  MEMEFF_DEVICE void for_each(const Body& body) const {
    for (int first = 0; first < count; first += 32)
      for (uint32_t left = next_32(first); left != 0; left &= left - 1)
        body((first + __ffs(static_cast<int>(left)) - 1) * kTileK);
  }
  MEMEFF_DEVICE int surviving() const {
    if (marks == nullptr) return count;
    int n = 0;
#pragma unroll 8
    for (int first = 0; first < count; first += 32) n += __popc(next_32(first));
    return n;
  }
};

// The marks of G as seen from C: row tiles of C and k are its tokens and classes, or the reverse.
struct Marks {
  const uint8_t* tiles;
  int64_t row_stride, k_stride;
  int k_count;

  MEMEFF_DEVICE KTiles of_row(int row) const {
    return {tiles == nullptr ? nullptr : tiles + row * row_stride, k_stride, k_count};
  }
};

}  // namespace memeff::cuda::sm90
