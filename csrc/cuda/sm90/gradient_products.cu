// The two products of a gradient G with respect to the scores, [classes, tokens], on sm_90a:
//
//   grad_input    C [tokens, features]  = G^T W      sum over classes
//   grad_weight   C [classes, features] = G x        sum over tokens
//
// W [classes, features], x [tokens, features]. One kernel: rows of C are the columns or the rows of
// G, so A = G is MN-major or K-major; B has k as its rows both times, MN-major. Nothing is
// transposed in memory: wgmma reads either kind. The pipeline, its tiles of 128 x 256 of C and its
// map of shared memory are pipeline.cuh's. C must not overlap G: other blocks may still read what
// one overwrites.
//
// Tiles of G that count as zero are neither loaded nor multiplied. k advances by such a tile, 128,
// two steps of 64: the producer's warp looks at 32 marks at once (ballot) and visits those that are
// set; a consumer warp need not know which they are, only how many, and counts them while the first
// are on their way. Such products run without clusters: the two rows of tiles of a cluster are
// marked differently, but must go through the same steps, so each block would wait for the other's.
// At a density p they would go through 2 p - p^2 of all tiles instead of p, which costs more than
// shared loads save.
//
// Epilogue: fp32 sums leave as boxes of 64 x 32 by TMA, which with `accumulate` adds them in L2: no
// block reads, or waits for, what it adds to. Each element is added to once per launch, so results
// do not depend on timing. Rounded results leave as boxes of 64 x 64. Updates that need the old
// value (kAddNative, kSplit*) read and write two adjacent elements per thread and access: 16 bytes
// of a row per quad, half sectors that L2 joins.
//
// Work: 2 classes tokens features FLOPs each; at 8192 x 128256 x 4096, 8.6 TFLOP, predicted 13.4 ms
// on an H100 or H200 (docs/kernels-sm90.md). grad_input has tokens * features / 32768 tiles of C,
// each a long sum: 1024 there, 7.8 rounds of 132 blocks; with fewer tiles than SMs some stay idle.
// grad_weight has many tiles of short sums: one takes 16 * tokens cycles of tensor cores and moves
// 128 KiB of fp32, or 64 KiB.
#include "cuda/common/weight_update.cuh"
#include "cuda/launch.h"
#include "cuda/sm90/tile_store.cuh"

namespace memeff::cuda::sm90 {

namespace {

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
  uint16_t* remainder;
  int64_t remainder_stride;
  WeightUpdate update;
  const float* scale;
};

// The thread's pairs of one row, c[0], c[1], c[4], c[5], ..., join the gradient.
template <class T>
MEMEFF_DEVICE void update_row(const float* c, const Destination& to, int64_t row, int column,
                              float scale) {
  if (row >= to.rows) return;
  T* const gradient = static_cast<T*>(to.gradient) + row * to.gradient_stride;
  uint16_t* const remainder = to.remainder + row * to.remainder_stride;
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

template <class T, Major kMajorOfG, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    gradient_product_kernel(const __grid_constant__ TensorMap g,
                            const __grid_constant__ TensorMap other,
                            const __grid_constant__ TensorMap out, Marks marks, Destination to,
                            TileOrder<kCluster> order) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using A = OperandTile<kMajorOfG, kTileM>;
  using B = OperandTile<Major::kMn, kTileN, kCluster>;
  MEMEFF_DYNAMIC_SHARED(shared_memory);
  auto ring = start_ring<kCluster>(shared_memory);

  if (is_producer()) {
    ptx::decrease_registers<kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    for (int number = order.first(); number < order.count(); number += order.stride()) {
      int row, column;
      order.place(number, &row, &column);
      const KTiles k_tiles = marks.of_row(row);
      for (int first = 0; first < k_tiles.count; first += 32) {
        uint32_t left = k_tiles.next_32(first);
        for (; left != 0; left &= left - 1) {
          const int k = (first + __ffs(static_cast<int>(left)) - 1) * kTileK;
          if (lane_index() != 0) continue;
          for (int step = 0; step < kStepsPerTile; ++step)
            load_step<A, B>(ring, &g, &other, row * kTileM, column * kTileN, k + step * kStepK);
        }
      }
    }
    if (lane_index() == 0) finish_loads(ring);
    return;
  }

  ptx::increase_registers<kConsumerRegisters>();
  BoxStore boxes(shared_memory);
  for (int number = order.first(); number < order.count(); number += order.stride()) {
    int row, column;
    order.place(number, &row, &column);
    float c[kTileN / 2];
    multiply<T, A, B>(c, ring, marks.of_row(row).surviving() * kStepsPerTile);
    write_tile<T>(c, to, &out, boxes, row * kTileM + consumer_group() * kGroupM, column * kTileN);
  }
  boxes.finish();
#endif
}

bool is_split(WeightUpdate update) {
  return update != WeightUpdate::kWrite && update != WeightUpdate::kAddNative;
}

// rows: of C, k: what is summed over.
template <class T, Major kMajorOfG, int kCluster>
Status launch(int64_t rows, int64_t k, const GradientOperands& operands, const Marks& marks,
              const ProductOutput& output, void* stream) {
  if (output.sums == nullptr && is_split(output.update) &&
      (output.remainder == nullptr || !std::is_same_v<T, __nv_bfloat16>))
    return {"split sums are those of bfloat16 gradients and need a remainder"};
  const bool g_is_transposed = kMajorOfG == Major::kMn;
  TensorMap g, other, out{};
  Status status = OperandTile<kMajorOfG, kTileM>::map(
      operands.gradient, map_element<T>(), g_is_transposed ? rows : k, g_is_transposed ? k : rows,
      operands.gradient_stride, &g);
  if (status.ok())
    status = OperandTile<Major::kMn, kTileN, kCluster>::map(
        operands.other, map_element<T>(), operands.features, k, operands.other_stride, &other);
  Destination to{
      Leaves::kByUpdate,       static_cast<int>(rows), static_cast<int>(operands.features),
      output.gradient,         output.gradient_stride, output.remainder,
      output.remainder_stride, output.update,          output.scale};
  TensorMapLayout box;
  box.columns = static_cast<uint64_t>(operands.features);
  box.rows = static_cast<uint64_t>(rows);
  box.box_rows = kGroupM;
  if (output.sums != nullptr) {
    to.leaves = output.accumulate ? Leaves::kAddedToSums : Leaves::kAsSums;
    box.base = output.sums;
    box.element = TensorMapElement::kFloat32;
    box.row_bytes = static_cast<uint64_t>(output.sums_stride) * 4;
    box.box_columns = 32;
  } else if (output.update == WeightUpdate::kWrite) {
    to.leaves = Leaves::kRounded;
    box.base = output.gradient;
    box.element = map_element<T>();
    box.row_bytes = static_cast<uint64_t>(output.gradient_stride) * 2;
    box.box_columns = kPanel;
  }
  if (status.ok() && to.leaves != Leaves::kByUpdate) status = make_tensor_map(box, &out);
  const auto order = tile_order<kCluster>(rows, count_tiles(operands.features, kTileN));
  const auto kernel = gradient_product_kernel<T, kMajorOfG, kCluster>;
  unsigned blocks = 0;
  if (status.ok()) status = persistent_blocks(kernel, order, &blocks);
  if (!status.ok()) return status;
  MEMEFF_LAUNCH_CLUSTERS(kCluster, kernel, dim3(blocks), dim3(kThreads), kSharedBytes, stream, g,
                         other, out, marks, to, order);
  return launch_status();
}

template <int kCluster>
Status grad_input(int64_t classes, int64_t tokens, const GradientOperands& operands,
                  const ProductOutput& output, void* stream) {
  if (tokens == 0) return {};
  if (!accepts(operands, output))
    return {"grad_input_product: sm90 needs rows that start at multiples of 16 bytes"};
  const Marks marks{operands.tiles, 1, operands.tiles_stride, count_tiles(classes, kTileK)};
  const auto typed = operands.dtype == DType::kBFloat16
                         ? launch<__nv_bfloat16, Major::kMn, kCluster>
                         : launch<__half, Major::kMn, kCluster>;
  return typed(tokens, classes, operands, marks, output, stream);
}

template <int kCluster>
Status grad_weight(int64_t classes, int64_t tokens, const GradientOperands& operands,
                   const ProductOutput& output, void* stream) {
  if (classes == 0) return {};
  if (!accepts(operands, output))
    return {"grad_weight_product: sm90 needs rows that start at multiples of 16 bytes"};
  const Marks marks{operands.tiles, operands.tiles_stride, 1, count_tiles(tokens, kTileK)};
  const auto typed = operands.dtype == DType::kBFloat16 ? launch<__nv_bfloat16, Major::kK, kCluster>
                                                        : launch<__half, Major::kK, kCluster>;
  return typed(classes, tokens, operands, marks, output, stream);
}

}  // namespace

Status grad_input_product(int64_t classes, int64_t tokens, const GradientOperands& operands,
                          const ProductOutput& output, void* stream) {
  return grad_input<1>(classes, tokens, operands, output, stream);
}

Status grad_weight_product(int64_t classes, int64_t tokens, const GradientOperands& operands,
                           const ProductOutput& output, void* stream) {
  return grad_weight<1>(classes, tokens, operands, output, stream);
}

}  // namespace memeff::cuda::sm90

namespace memeff::cuda::sm90x2 {

Status grad_input_product(int64_t classes, int64_t tokens, const GradientOperands& operands,
                          const ProductOutput& output, void* stream) {
  const auto run = operands.tiles == nullptr ? sm90::grad_input<2> : sm90::grad_input<1>;
  return run(classes, tokens, operands, output, stream);
}

Status grad_weight_product(int64_t classes, int64_t tokens, const GradientOperands& operands,
                           const ProductOutput& output, void* stream) {
  const auto run = operands.tiles == nullptr ? sm90::grad_weight<2> : sm90::grad_weight<1>;
  return run(classes, tokens, operands, output, stream);
}

}  // namespace memeff::cuda::sm90x2
