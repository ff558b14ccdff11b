// The launch of the two kinds of gradient products, of G in memory (gradient_products.cu) and of stored
// scores (stored_products.cu).
#pragma once

#include "cuda/sm90/gradient_epilogue.cuh"
#include "cuda/sm90/gradient_tiles.cuh"

namespace memeff::cuda::sm90 {

// Launches a kernel that takes maps of G, or of scores in its place, and of the other operand, then
// OutputMaps, Work, Destination, TileOrder and `rest`. `element`: of the former.
template <class T, Major kMajorOfG, int kCluster, class Kernel, class... Rest>
Status launch_product(Kernel kernel, TensorMapElement element, const GradientProduct& call,
                      void* stream, const Rest&... rest) {
  const GradientOperands& operands = call.operands;
  const ProductOutput& output = call.output;
  const int64_t classes = call.block.classes, tokens = call.block.tokens;
  const bool of_input = kMajorOfG == Major::kMn;
  const int64_t rows = of_input ? tokens : classes, k = of_input ? classes : tokens;
  TensorMap g, other;
  OutputMaps out{};
  Destination to;
  Status status = make_destination<T>(rows, operands.features, output, &to, &out);
  if (status.ok())
    status = OperandTile<kMajorOfG, kTileM>::map(operands.gradient, element, tokens, classes,
                                                 operands.gradient_stride, &g);
  if (status.ok())
    status = OperandTile<Major::kMn, kTileN, kCluster>::map(
        operands.other, map_element<T>(), operands.features, k, operands.other_stride, &other);
  const auto order = tile_order<kCluster>(rows, count_tiles(operands.features, kTileN));
  unsigned blocks = 0;
  if (status.ok()) status = persistent_blocks(kernel, order, &blocks);
  if (!status.ok()) return status;
  if (output.overlaps_previous) blocks = blocks_that_share(blocks, order, k);
  const Work work{operands.list, count_tiles(k, kTileK), output.only_adds(), operands.mask,
                  static_cast<int>(k)};
  MEMEFF_LAUNCH_OVERLAPPED(output.overlaps_previous, kCluster, kernel, dim3(blocks), dim3(kThreads),
                           kSharedBytes, stream, g, other, out, work, to, order, rest...);
  return launch_status();
}

}  // namespace memeff::cuda::sm90
