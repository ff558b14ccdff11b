// Which tiles of a gradient count.
//
// A product of a gradient G [classes, tokens] may leave out tiles of kStoredTile classes by kTokenTile
// tokens that are marked 0. A row of tiles of its result is a sum over "k tiles": tiles of classes for
// grad_input, of tokens for grad_weight.
#pragma once

#include "cuda/kernel_arguments.h"

namespace memeff::cuda {

constexpr int64_t kTokenTile = 128;

/// TileMarks as the kernels take them that compute gradients.
struct GradientMarks {
  uint8_t* tiles;  // null: not requested
  int64_t stride;
  float mass_per_class;
};

/// Where a kernel marks tiles, or reads their marks. It marks a tile 0 where no target lies in it and
/// each token that has a gradient has a probability mass of less than mass * (classes of the tile) /
/// vocab there, else 1.
struct TileMarks {
  uint8_t* marks = nullptr;  // [ceil(classes / kStoredTile), ceil(tokens / kTokenTile)]; null: none
  int64_t stride = 0;
  double mass = 0;
  int64_t vocab = 1;

  GradientMarks of_gradient() const {
    return {marks, stride, static_cast<float>(mass / static_cast<double>(vocab))};
  }
};

/// A row of tiles of the result, and how many of its k tiles count.
struct WorkRow {
  int32_t row, count;
};
struct WorkList {
  const WorkRow* rows = nullptr;  // all rows of tiles by decreasing count; null: every tile counts
  // [rows of tiles, k tiles]: of each row those that count, in ascending order, then nothing
  const int32_t* k_tiles = nullptr;
};

/// Bytes of the list of `rows` rows of tiles, each a sum over `k_tiles` k tiles.
constexpr int64_t work_list_bytes(int64_t rows, int64_t k_tiles) {
  return rows * (static_cast<int64_t>(sizeof(WorkRow)) + 4 * (1 + k_tiles));
}

enum class ProductOfGradient { kGradInput, kGradWeight };

/// A product of a gradient whose tiles are marked.
struct MarkedProduct {
  ProductOfGradient product = ProductOfGradient::kGradInput;
  int64_t classes = 0, tokens = 0;
  TileMarks marks;
};
/// Lists what the product has to do. `memory`, on the device, has work_list_bytes() and starts at a
/// multiple of 8; the list points into it.
Status make_work_list(const MarkedProduct& marked, void* memory, WorkList* list, void* stream);

}  // namespace memeff::cuda
