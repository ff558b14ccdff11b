// The two products that end the backward pass, of a gradient G with respect to x W^T:
//
//   grad_input   C [tokens, features]  = G^T W      k runs over classes
//   grad_weight  C [classes, features] = G x        k runs over tokens
//   G [classes, tokens] with adjacent tokens, W [classes, features], x [tokens, features]
//
// A thread block computes a tile of 128 x 128 of C (gemm_tile.cuh). No operand is copied or
// transposed beforehand: G as the first operand of grad_input, and W and x as second operands, are
// contiguous along the tile, not along k, and ldmatrix transposes them on the way to registers.
// Blocks go down groups of 16 rows of tiles (tile_of_block): those that run together then read G
// and W or x from L2.
//
// Tiles of 128 x 128 of G that are not in the product's list (WorkList) count as zero: the loads step
// from entry to entry, and a tile that is left out costs no load and no product. Blocks then take the
// rows of tiles in the list's order, those with most work first, as GPUs start blocks in the order of
// their index and whenever one ends: what is left for the end is small. Where results are only added
// to, blocks without work end at once.
//
// The epilogue stores the tile of C through shared memory, 8 adjacent elements per thread, in a loop that is
// short for all its ways to go: to fp32 sums or into the 16-bit gradient (ProductOutput, fused_kernels.h),
// scaled and rounded, added, or split over the gradient and a remainder that together hold the
// unscaled fp32 sum of several calls, or as the gradient's compact sum of several calls, whose blocks
// of 64 columns 8 neighbouring lanes share.
//
// Shared memory: 48 KiB of pipeline, later 34 KiB for half of C. Two blocks of 128 threads per SM.
// Per call 2 tokens features classes FLOPs; of its operands a block reads 256 k elements, mostly from
// L2. Numerics: fp32 accumulators over all of k, one rounding.
#include "cuda/common/weight_update.cuh"
#include "cuda/sm80/gemm_tile.cuh"
#include "cuda/sm80/kernels.h"

namespace memeff::cuda::sm80 {

namespace {

// ---- which tiles of G count ----

constexpr int kDepthTile = 128;  // of k: the extent of a tile that counts or not
static_assert(kDepthTile == kStoredTile && kDepthTile == kTokenTile && kRows == kDepthTile);

// Kernel argument: which tiles of G count, and whether tiles of C for which none does stay as they are.
struct Work {
  WorkList list;
  bool only_adds;
  RowMask mask;

  MEMEFF_DEVICE const float* row_factors() const {
    return mask.factors != nullptr && *mask.needed != 0 ? mask.factors : nullptr;
  }
};

// A block's tile of C, and the k tiles that its sums are over.
struct ProductTile {
  TileIndex index;
  const int32_t* k_tiles;  // that count, or null: all do
  int count;

  // The first k of number `i` of them; of the one after the last: no matter what.
  MEMEFF_DEVICE int64_t k(int i) const {
    if (i == count) return 0;
    return int64_t{k_tiles == nullptr ? i : k_tiles[i]} * kDepthTile;
  }
};

MEMEFF_DEVICE ProductTile product_tile(const WorkList& list, unsigned row_tiles,
                                       unsigned column_tiles, int depth_tiles) {
  if (list.rows == nullptr) return {tile_of_block(row_tiles, column_tiles), nullptr, depth_tiles};
  const WorkRow row = list.rows[blockIdx.x / column_tiles];
  return {{static_cast<unsigned>(row.row), blockIdx.x % column_tiles},
          list.k_tiles + int64_t{row.row} * depth_tiles,
          row.count};
}

// ---- epilogue: the tile of C ----

// Kernel argument: ProductOutput, and the extent of C.
struct Destination {
  int64_t rows, columns;
  ProductOutput output;
};

// Half of the tile's rows at a time passes through shared memory, so that 16 lanes write a row of
// 128 elements, 8 each. The 8 floats between rows let the pairs of 4 rows, which half a warp writes
// at once, cover all banks.
constexpr int kStagedRow = kColumns + 8;
static_assert(kWarpRows * kStagedRow * 4 <= kPipelineBytes);

// 8 adjacent sums, the first `count` of which exist, to where they belong; zeros behind these. The
// whole warp calls it.
template <class T>
MEMEFF_DEVICE void put(float (&sums)[kChunk], const ProductOutput& to, int64_t row, int64_t column,
                       int count, float scale) {
  if (to.sums == nullptr)
    return update_gradient(to.update, sums, scale, static_cast<T*>(to.gradient), to.gradient_stride,
                           to.split, row, column, count);
  float* target = to.sums + row * to.sums_stride + column;
  if (to.accumulate) {
    float before[kChunk];
    load(before, target, count);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sums[e] += before[e];
  }
  store(target, sums, count);
}

template <class T>
MEMEFF_DEVICE void put_tile(Accumulators& c, unsigned char* shared, int64_t first_row,
                            int64_t first_column, const Destination& to) {
  auto* staged = reinterpret_cast<float*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int half = 0; half < kRows; half += kWarpRows) {
    __syncthreads();  // all have left the pipeline, or the other half
    for_rows_of_half(c, half, [&](int row, int column, float value, float next) {
      const float pair[2] = {value, next};
      store(staged + row * kStagedRow + column, pair);
    });
    __syncthreads();
    constexpr int kChunksPerRow = kColumns / kChunk;
#pragma unroll 1
    for (int i = thread; i < kWarpRows * kChunksPerRow; i += kThreads) {
      const int row = i / kChunksPerRow, column = i % kChunksPerRow * kChunk;
      const bool exists = first_row + half + row < to.rows;
      const int count = exists ? count_left<kChunk>(first_column + column, to.columns) : 0;
      float sums[kChunk];
      load(sums, staged + row * kStagedRow + column, count);
      const bool scaled = exists && to.output.scale != nullptr;
      const int64_t scale_at = (first_row + half + row) * to.output.scale_stride;
      const float scale = scaled ? to.output.scale[scale_at] : 1.f;
      put<T>(sums, to.output, first_row + half + row, first_column + column, count, scale);
    }
  }
}

// ---- the kernel ----

// C = A B, k = depth rows of `b`. `a` is G: k contiguous for grad_weight, the tile's rows for
// grad_input.
template <class T, bool kAligned, Contiguous kContiguousA>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gradient_product_kernel(Matrix<T> a, Matrix<T> b, Work work, unsigned row_tiles,
                            unsigned column_tiles, Destination to) {
  MEMEFF_DYNAMIC_SHARED(shared);
  const int64_t depth = b.rows;
  const ProductTile tile = product_tile(work.list, row_tiles, column_tiles,
                                        static_cast<int>((depth + kDepthTile - 1) / kDepthTile));
  if (tile.count == 0 && work.only_adds) return;
  const int64_t first_row = int64_t{tile.index.row} * kRows;
  const int64_t first_column = int64_t{tile.index.column} * kColumns;

  const SliceSource<kAligned, kContiguousA, T> source_a(a, first_row);
  const SliceSource<kAligned, Contiguous::kTile, T> source_b(b, first_column);
  const float* const factors = kContiguousA == Contiguous::kDepth ? work.row_factors() : nullptr;
  int next = 0, within = 0;  // number of a k tile, and k within it
  int64_t first_k = tile.k(0);
  const auto start_next = [&](unsigned char* stage) {
    if (next == tile.count) return false;
    const int64_t k = first_k + within;
    source_a.load(stage, k);
    source_b.load(stage + kOperandBytes, k, factors);
    within += kDepth;
    if (within == kDepthTile || k + kDepth >= depth) {
      first_k = tile.k(++next);
      within = 0;
    }
    return true;
  };
  Accumulators c;
  c.clear();
  run_pipeline(shared, start_next, [&](const unsigned char* stage) {
    multiply_slice<T, kContiguousA, Contiguous::kTile>(c, stage);
  });

  put_tile<T>(c, shared, first_row, first_column, to);
}

// ---- launch ----

template <class T, bool kAligned, Contiguous kContiguousA>
Status launch(const Matrix<T>& a, const Matrix<T>& b, const GradientOperands& operands,
              const Destination& to, void* stream) {
  const Work work{operands.list, to.output.only_adds(), operands.mask};
  const auto row_tiles = static_cast<unsigned>(ceil_div(to.rows, kRows));
  const auto column_tiles = static_cast<unsigned>(ceil_div(to.columns, kColumns));
  const auto kernel = gradient_product_kernel<T, kAligned, kContiguousA>;
  const Status allowed = allow_shared_memory(kernel, kPipelineBytes);
  if (!allowed.ok()) return allowed;
  MEMEFF_LAUNCH(kernel, dim3(row_tiles * column_tiles), dim3(kThreads), kPipelineBytes, stream, a,
                b, work, row_tiles, column_tiles, to);
  return launch_status();
}

template <class T, Contiguous kContiguousA>
Status select(const GradientProduct& call, void* stream) {
  const GradientOperands& operands = call.operands;
  const int64_t classes = call.block.classes, tokens = call.block.tokens;
  constexpr bool kGradInput = kContiguousA == Contiguous::kTile;
  const Matrix<T> a{static_cast<const T*>(operands.gradient), classes, tokens,
                    operands.gradient_stride};
  const Matrix<T> b{static_cast<const T*>(operands.other), kGradInput ? classes : tokens,
                    operands.features, operands.other_stride};
  const Destination to{kGradInput ? tokens : classes, operands.features, call.output};
  const bool aligned = chunks_are_aligned(a) && chunks_are_aligned(b);
  return aligned ? launch<T, true, kContiguousA>(a, b, operands, to, stream)
                 : launch<T, false, kContiguousA>(a, b, operands, to, stream);
}

template <Contiguous kContiguousA>
Status product(const GradientProduct& call, void* stream) {
  const Status checked = check(call);
  if (!checked.ok()) return checked;
  const bool bf16 = call.operands.dtype == DType::kBFloat16;
  return (bf16 ? select<__nv_bfloat16, kContiguousA> : select<__half, kContiguousA>)(call, stream);
}

}  // namespace

Status grad_input_product(const GradientProduct& call, void* stream) {
  if (call.block.tokens == 0 || call.operands.features == 0) return {};
  return product<Contiguous::kTile>(call, stream);
}

Status grad_weight_product(const GradientProduct& call, void* stream) {
  if (call.block.classes == 0 || call.operands.features == 0) return {};
  return product<Contiguous::kDepth>(call, stream);
}

}  // namespace memeff::cuda::sm80
