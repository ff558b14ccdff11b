// What the products of a gradient G with respect to the scores, [classes, tokens], have in common,
// whether G lies in memory (gradient_products.cu) or is made of stored scores on the way
// (stored_products.cu): which tiles of G count, and what becomes of C.
//
// Tiles of G that count as zero are neither loaded nor multiplied: k advances from one tile of the
// list (WorkList), 128, to the next, two steps of 64. All warps of a block, the producer's and the
// consumers', go through the same tiles of C (TilesOfBlock) and read from the list how many k tiles
// each has; only who loads needs to know which. Without a list all count, in TileOrder's order; with
// one, work is divided by WorkSchedule, evenly whatever the marks, and tiles of C that have no work and
// would not change are left out.
//
// Epilogue: fp32 sums leave as boxes of 64 x 32 by TMA, which with `accumulate` adds them in L2: no
// block reads, or waits for, what it adds to. Each element is added to once per launch, so results
// do not depend on timing. Rounded results leave as boxes of 64 x 64. Updates that need the old
// value (kAddNative, kSplit*) read and write two adjacent elements per thread and access: 16 bytes
// of a row per quad, half sectors that L2 joins.
#pragma once

#include "cuda/common/weight_update.cuh"
#include "cuda/launch.h"
#include "cuda/sm90/tile_store.cuh"
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
};

// The tiles of C that this block computes, one after the other.
template <int kCluster>
class TilesOfBlock {
 public:
  MEMEFF_DEVICE TilesOfBlock(const TileOrder<kCluster>& order, const Work& work)
      : order_(order),
        work_(work),
        number_(TileOrder<kCluster>::first()),
        schedule_(order.rows, order.columns, static_cast<int>(blockIdx.x),
                  static_cast<int>(gridDim.x)) {}

  MEMEFF_DEVICE bool next(ProductTile* tile) {
    if constexpr (kCluster == 1)
      if (work_.list.rows != nullptr) return next_of_list(tile);
    if (number_ >= order_.count()) return false;
    order_.place(number_, &tile->row, &tile->column);
    tile->k_tiles = nullptr;
    tile->count = work_.k_tiles;
    number_ += TileOrder<kCluster>::stride();
    return true;
  }

 private:
  MEMEFF_DEVICE bool next_of_list(ProductTile* tile) {
    int rank;
    while (schedule_.next(&rank, &tile->column)) {
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
  int number_;
  WorkSchedule schedule_;
};

// The producer's thread: loads all steps of a tile of C.
template <class A, class B, int kCluster>
MEMEFF_DEVICE void load_tile(Ring<kCluster>& ring, const TensorMap* a, const TensorMap* b,
                             const ProductTile& tile) {
  for (int i = 0; i < tile.count; ++i) {
    const int k = tile.k(i);
    for (int step = 0; step < kStepsPerTile; ++step)
      load_step<A, B>(ring, a, b, tile.row * kTileM, tile.column * kTileN, k + step * kStepK);
  }
}

enum class Leaves { kAsSums, kAddedToSums, kRounded, kByUpdate };

// What becomes of C.
struct Destination {
  Leaves leaves;
  int rows, columns;
  void* gradient;
  int64_t gradient_stride;
  SplitSums split;
  WeightUpdate update;
  const float* scale;
};

// The thread's pairs of one row, c[0], c[1], c[4], c[5], ..., join the gradient.
template <class T>
MEMEFF_DEVICE void update_row(const float* c, const Destination& to, int64_t row, int column,
                              float scale) {
  if (row >= to.rows) return;
  T* const gradient = static_cast<T*>(to.gradient) + row * to.gradient_stride;
  uint16_t* const remainder = to.split.remainder + row * to.split.remainder_stride;
#pragma unroll
  for (int j = 0; j < kTileN / 8; ++j) {
    const int at = column + 8 * j;
    float pair[2] = {c[4 * j], c[4 * j + 1]};
    if (at < to.columns) update_gradient(to.update, pair, scale, gradient + at, remainder + at);
  }
}

// The group's 64 x 256 of C, from `row`, `column` on.
template <class T>
MEMEFF_DEVICE void write_tile(float (&c)[kTileN / 2], const Destination& to, const TensorMap* map,
                              BoxStore& boxes, int row, int column) {
  if (to.leaves == Leaves::kAsSums || to.leaves == Leaves::kAddedToSums) {
#pragma unroll
    for (int box = 0; box < kTileN / 32; ++box) {
      fill_box_of_floats(boxes.begin(), c + 16 * box);
      boxes.end(map, column + 32 * box, row, to.leaves == Leaves::kAddedToSums);
    }
    return;
  }
  const float scale = to.scale == nullptr ? 1.f : *to.scale;
  if (to.leaves == Leaves::kRounded) {
#pragma unroll
    for (float& x : c) x *= scale;
#pragma unroll
    for (int box = 0; box < kTileN / kPanel; ++box) {
      fill_box<T>(boxes.begin(), c + 32 * box);
      boxes.end(map, column + kPanel * box, row);
    }
    return;
  }
  const int my_row = row + warp_of_group() * 16 + lane_index() / 4;
  const int my_column = column + lane_index() % 4 * 2;
  update_row<T>(c, to, my_row, my_column, scale);
  update_row<T>(c + 2, to, my_row + 8, my_column, scale);
}

inline bool is_split(WeightUpdate update) {
  return update != WeightUpdate::kWrite && update != WeightUpdate::kAddNative;
}

// What the launchers pass on: the work of a product whose sums are over k, of G ...
inline Work work_of(const GradientOperands& operands, int64_t k, const ProductOutput& output) {
  return {operands.list, count_tiles(k, kTileK), output.only_adds()};
}

// ... and C [rows, columns] of T and, unless it is updated by plain accesses,
// the map by which it leaves.
template <class T>
Status make_destination(int64_t rows, int64_t columns, const ProductOutput& output, Destination* to,
                        TensorMap* map) {
  if (output.sums == nullptr && is_split(output.update) &&
      (output.split.remainder == nullptr || !std::is_same_v<T, __nv_bfloat16>))
    return {"split sums are those of bfloat16 gradients and need a remainder"};
  *to = {Leaves::kByUpdate,
         static_cast<int>(rows),
         static_cast<int>(columns),
         output.gradient,
         output.gradient_stride,
         output.split,
         output.update,
         output.scale};
  TensorMapLayout box;
  box.columns = static_cast<uint64_t>(columns);
  box.rows = static_cast<uint64_t>(rows);
  box.box_rows = kGroupM;
  if (output.sums != nullptr) {
    to->leaves = output.accumulate ? Leaves::kAddedToSums : Leaves::kAsSums;
    box.base = output.sums;
    box.element = TensorMapElement::kFloat32;
    box.row_bytes = static_cast<uint64_t>(output.sums_stride) * 4;
    box.box_columns = 32;
  } else if (output.update == WeightUpdate::kWrite) {
    to->leaves = Leaves::kRounded;
    box.base = output.gradient;
    box.element = map_element<T>();
    box.row_bytes = static_cast<uint64_t>(output.gradient_stride) * 2;
    box.box_columns = kPanel;
  } else {
    return {};
  }
  return make_tensor_map(box, map);
}

}  // namespace memeff::cuda::sm90
