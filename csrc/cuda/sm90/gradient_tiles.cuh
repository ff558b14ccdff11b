// What the products of a gradient G with respect to the scores, [classes, tokens], have in common,
// whether G lies in memory (gradient_products.cu) or is made of stored scores on the way
// (stored_products.cu): which tiles of G count. What becomes of C: gradient_epilogue.cuh.
//
// Tiles of G that count as zero are neither loaded nor multiplied: k advances from one tile of the
// list (WorkList), 128, to the next, two steps of 64. All warps of a block, the producer's and the
// consumers', go through the same tiles of C (TilesOfBlock) and read from the list how many k tiles
// each has; only who loads needs to know which. Without a list all count, in TileOrder's order; with
// one, work is divided by WorkSchedule, evenly whatever the marks, and tiles of C that have no work and
// would not change are left out.
#pragma once

#include "cuda/sm90/kernels.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/work_schedule.h"

namespace memeff::cuda::sm90 {

// Steps of k that make a tile of G.
constexpr int kTileK = static_cast<int>(kStoredTile), kStepsPerTile = kTileK / kStepK;
static_assert(kStoredTile == kTokenTile && kTileM == kTileK);

// A tile of C, and the tiles of G that its sums are over.
struct ProductTile {
  int row, column;
  const int32_t* k_tiles;  // that count, or null: all do
  int count;

  // The first k of tile `i` of those that count.
  MEMEFF_DEVICE int k(int i) const { return (k_tiles == nullptr ? i : k_tiles[i]) * kTileK; }
  MEMEFF_DEVICE int steps() const { return count * kStepsPerTile; }
};

// Kernel argument: all there is to do.
struct Work {
  WorkList list;
  int k_tiles;     // of G, along k
  bool only_adds;  // tiles of C without any that count stay as they are
  RowMask mask;
  int depth;  // k in all
};

// The tiles of C that this block computes, one after the other.
template <int kCluster>
class TilesOfBlock {
 public:
  MEMEFF_DEVICE TilesOfBlock(const TileOrder<kCluster>& order, const Work& work)
      : order_(order), work_(work) {}

  MEMEFF_DEVICE bool next(ProductTile* tile) {
    if constexpr (kCluster == 1)
      if (work_.list.rows != nullptr) return next_of_list(tile);
    const int number = TileOrder<kCluster>::first() + turn_ * TileOrder<kCluster>::stride();
    if (number >= order_.count()) return false;
    ++turn_;
    order_.place(number, &tile->row, &tile->column);
    tile->k_tiles = nullptr;
    tile->count = work_.k_tiles;
    return true;
  }

 private:
  MEMEFF_DEVICE bool next_of_list(ProductTile* tile) {
    const WorkSchedule schedule(order_.rows, order_.columns, static_cast<int>(blockIdx.x),
                                static_cast<int>(gridDim.x));
    int rank;
    while (schedule.next(&turn_, &rank, &tile->column)) {
      const WorkRow row = work_.list.rows[rank];
      if (row.count == 0 && work_.only_adds) continue;
      tile->row = row.row;
      tile->k_tiles = work_.list.k_tiles + int64_t{row.row} * work_.k_tiles;
      tile->count = row.count;
      return true;
    }
    return false;
  }

  const TileOrder<kCluster>& order_;
  const Work& work_;
  int turn_ = 0;
};

// The producer's thread: loads all steps of a tile of C.
template <class A, class B, int kCluster>
MEMEFF_DEVICE void load_tile(Ring<kCluster>& ring, unsigned char* shared_memory, const TensorMap* a,
                             const TensorMap* b, const ProductTile& tile, const Work& work) {
  const bool masks = work.mask.factors != nullptr && *work.mask.needed != 0;
  for (int i = 0; i < tile.count; ++i) {
    const int k = tile.k(i);
    for (int step = 0; step < kStepsPerTile; ++step) {
      const int row = tile.row * kTileM, column = tile.column * kTileN;
      if (masks)
        load_masked_step<A, B>(ring, shared_memory, a, b, row, column, k + step * kStepK,
                               work.mask.factors, work.depth);
      else
        load_step<A, B>(ring, a, b, row, column, k + step * kStepK);
    }
  }
}

}  // namespace memeff::cuda::sm90
