// What the products of a gradient G with respect to the scores, [classes, tokens], have in common,
// whether G lies in memory (gradient_products.cu) or is made of stored scores on the way
// (stored_products.cu): which tiles of G count, and what becomes of C.
//
// Tiles of G that count as zero are neither loaded nor multiplied. k advances by such a tile, 128,
// two steps of 64: a warp of the producer's group looks at 32 marks at once (ballot) and visits
// those that are set; a consumer warp need not know which they are, only how many, and counts them
// while the first are on their way.
//
// Epilogue: fp32 sums leave as boxes of 64 x 32 by TMA, which with `accumulate` adds them in L2: no
// block reads, or waits for, what it adds to. Each element is added to once per launch, so results
// do not depend on timing. Rounded results leave as boxes of 64 x 64. Updates that need the old
// value (kAddNative, kSplit*) read and write two adjacent elements per thread and access: 16 bytes
// of a row per quad, half sectors that L2 joins.
//
// A product may run beside the one before it (ProductOutput::beside). Its blocks then start on
// whatever multiprocessors that one has left idle; they are more than fit at a time, of a few tiles
// each, so that those that start late are few.
#pragma once

#include "cuda/common/weight_update.cuh"
#include "cuda/launch.h"
#include "cuda/sm90/tile_store.cuh"

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
  bool beside;  // of ProductOutput
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
    if (at < to.columns) update_adjacent(to.update, pair, scale, gradient + at, remainder + at);
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

// What the launcher passes on: C [rows, columns] of T and, unless it is updated by plain accesses,
// the map by which it leaves.
template <class T>
Status make_destination(int64_t rows, int64_t columns, const ProductOutput& output, Destination* to,
                        TensorMap* map) {
  if (output.sums == nullptr && is_split(output.update) &&
      (output.split.remainder == nullptr || !std::is_same_v<T, __nv_bfloat16>))
    return {"split sums are those of bfloat16 gradients and need a remainder"};
  *to = {Leaves::kByUpdate, static_cast<int>(rows), static_cast<int>(columns),
         output.gradient,   output.gradient_stride, output.split,
         output.update,     output.scale,           output.beside};
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
