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
// Tiles of G that count as zero: gradient_tiles.cuh; the epilogue: gradient_epilogue.cuh. Products that
// leave out tiles run without clusters: other k tiles count for either of a cluster's two rows of tiles,
// but both must go through the same steps, so each block would wait for the other's. At a density p they would go
// through 2 p - p^2 of all tiles instead of p, which costs more than shared loads save.
//
// Work: 2 classes tokens features FLOPs each; at 8192 x 128256 x 4096, 8.6 TFLOP, predicted 13.4 ms
// on an H100 or H200 (docs/kernels-sm90.md). grad_input has tokens * features / 32768 tiles of C,
// each a long sum: 1024 there, 7.8 rounds of 132 blocks; with fewer tiles than SMs some stay idle.
// grad_weight has many tiles of short sums: one takes 16 * tokens cycles of tensor cores and moves
// 128 KiB of fp32, or 64 KiB.
#include "cuda/sm90/gradient_launch.cuh"

namespace memeff::cuda::sm90 {

namespace {

template <class T, Major kMajorOfG, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    gradient_product_kernel(const __grid_constant__ TensorMap g,
                            const __grid_constant__ TensorMap other,
                            const __grid_constant__ OutputMaps out,
                            const __grid_constant__ Work work, Destination to,
                            const __grid_constant__ TileOrder<kCluster> order) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using A = OperandTile<kMajorOfG, kTileM>;
  using B = OperandTile<Major::kMn, kTileN, kCluster>;
  MEMEFF_DYNAMIC_SHARED(shared_memory);
  ptx::launch_dependents();
  auto ring = start_ring<kCluster>(shared_memory);
  TilesOfBlock<kCluster> tiles(order, work);
  ProductTile tile;

  if (is_producer()) {
    ptx::decrease_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    while (tiles.next(&tile)) {
      load_tile<A, B>(ring, shared_memory, &g, &other, tile, work);
      load_source(ring, to, out, tile.row * kTileM, tile.column * kTileN);
    }
    finish_loads(ring);
    return;
  }

  ptx::increase_registers<kConsumerRegisters>();
  BoxStore boxes(shared_memory);
  while (tiles.next(&tile)) {
    const int row = tile.row * kTileM + consumer_group() * kGroupM, column = tile.column * kTileN;
    RowExponents exponents(to, row, column);
    float c[kTileN / 2];
    mainloop<T, A, B>(c, ring, tile.steps());
    write_tile<T>(c, to, out, exponents, ring, boxes, row, column);
  }
  boxes.finish();
  if (to.outlasts_previous(kCluster)) ptx::wait_for_grid();
#endif
}

template <class T, Major kMajorOfG, int kCluster>
Status launch(const GradientProduct& call, void* stream) {
  const auto kernel = gradient_product_kernel<T, kMajorOfG, kCluster>;
  return launch_product<T, kMajorOfG, kCluster>(kernel, map_element<T>(), call, stream);
}

template <Major kMajorOfG, int kCluster>
Status run(const GradientProduct& call, void* stream) {
  const bool bf16 = call.operands.dtype == DType::kBFloat16;
  return (bf16 ? launch<__nv_bfloat16, kMajorOfG, kCluster>
               : launch<__half, kMajorOfG, kCluster>)(call, stream);
}

template <Major kMajorOfG, int kCluster>
Status select(const GradientProduct& call, void* stream) {
  const Status checked = check(call);
  if (!checked.ok()) return checked;
  if (!accepts(call.operands, call.output))
    return {"gradient product: sm90 needs rows that start at multiples of 16 bytes"};
  const bool skips = call.operands.list.rows != nullptr;
  return (skips ? run<kMajorOfG, 1> : run<kMajorOfG, kCluster>)(call, stream);
}

}  // namespace

template <int kCluster>
Status grad_input_product(const GradientProduct& call, void* stream) {
  if (call.block.tokens == 0) return {};
  return select<Major::kMn, kCluster>(call, stream);
}
template Status grad_input_product<1>(const GradientProduct& call, void* stream);
template Status grad_input_product<2>(const GradientProduct& call, void* stream);

template <int kCluster>
Status grad_weight_product(const GradientProduct& call, void* stream) {
  if (call.block.classes == 0) return {};
  return select<Major::kK, kCluster>(call, stream);
}
template Status grad_weight_product<1>(const GradientProduct& call, void* stream);
template Status grad_weight_product<2>(const GradientProduct& call, void* stream);

}  // namespace memeff::cuda::sm90
