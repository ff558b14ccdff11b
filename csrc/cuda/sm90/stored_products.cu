// The two products of the gradient G with respect to the scores, straight from stored scores, on
// sm_90a. G is what stored_gradient would write, and is never written:
//
//   E [classes, tokens] fp16 = exp(z - m), m [tiles, tokens] fp32, the maximum of 128 classes
//   G [v, n] = E[v, n] f[n],  f = exp(m - shift) softmax;  target_gradient[n] where v is n's target
//
//   grad_input    C [tokens, features]  = G^T W      sum over classes
//   grad_weight   C [classes, features] = G x        sum over tokens
//
// W [classes, features], x [tokens, features]. The pipeline, its tiles of 128 x 256 of C and its map
// of shared memory are pipeline.cuh's; E takes the place of A in a stage, W or x that of B. Tiles of
// G that count as zero, and the epilogue: gradient_tiles.cuh. C must not overlap E.
//
// A second warp of the producer's group writes factors (score_factors.cuh), consumer warps make A of them
// and E in registers (score_fragments.cuh). Two sets of 4 registers take turns: while one product runs,
// the next one's are made.
//
// Numerics: those of stored_gradient, bit for bit, and sums in the same order: results equal those of
// stored_gradient and gradient_products.cu. Terms other than the softmax and the target (soft cap,
// entropy, `weighted`) need the score itself or more factors: such gradients are written by
// stored_gradient.
//
// Work: 2 classes tokens features FLOPs each, as gradient_products.cu. Per 16 of k and thread about
// 35 instructions more, in the shadow of the 128 cycles that its warpgroup's product takes (256 as
// the two groups take turns): docs/kernels-sm90.md.
#include "cuda/sm90/gradient_launch.cuh"
#include "cuda/sm90/score_fragments.cuh"

namespace memeff::cuda::sm90 {

namespace {

// The warp has read scores and factors of the stage by plain loads, which TMA must not overtake.
MEMEFF_DEVICE void release_read_stage(const Ring<1>& ring, int stage) {
  ptx::fence_proxy_async();
  __syncwarp();
  release_stage(ring, stage);
}

// mainloop() of pipeline.cuh with A in registers: a product per 16 of k, of which one is always in
// flight. Its registers are free again once the wait after the next product has ended.
template <class T, class Source, class Factors>
MEMEFF_DEVICE void mainloop_from_scores(float (&c)[kTileN / 2], Ring<1>& ring, int steps,
                                        Source& source, const Factors* factors) {
  using B = OperandTile<Major::kMn, kTileN>;
  constexpr int kProducts = kStepK / 16;
  static_assert(kProducts % 2 == 0);
#pragma unroll
  for (float& x : c) x = 0.f;
  uint32_t a[2][4];
  int previous_stage = 0;
  const Stagger stagger(steps);
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ring.full(), ring.parity);
    source.begin_step(factors[ring.stage]);
    typename Source::Raw raw;
    source.load(raw, ring.tile(), 0);
#pragma unroll
    for (int k16 = 0; k16 < kProducts; ++k16) {
      source.make(a[k16 % 2], raw, k16);
      ptx::operand_is_ready(a[k16 % 2]);
      ptx::wgmma_fence();
      ptx::wgmma_a_registers<kTileN, T, true>(
          c, a[k16 % 2], B::descriptor(ring.tile() + kOperandABytes, 0, k16), 1);
      ptx::wgmma_commit();
      if (k16 + 1 < kProducts) source.load(raw, ring.tile(), k16 + 1);
      ptx::wgmma_wait<1>();
      if (k16 == 0 && step > 0) {
        release_read_stage(ring, previous_stage);
        stagger.finished(step);
      }
    }
    previous_stage = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::accumulators_are_ready(c);
  if (steps > 0) release_read_stage(ring, previous_stage);
}

template <class T, Major kMajorOfG>
__global__ void __launch_bounds__(kThreads, 1)
    stored_product_kernel(const __grid_constant__ TensorMap e,
                          const __grid_constant__ TensorMap other,
                          const __grid_constant__ OutputMaps out, const __grid_constant__ Work work,
                          Destination to, const __grid_constant__ TileOrder<1> order,
                          const __grid_constant__ ScoreFactors scores) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using A = OperandTile<kMajorOfG, kTileM>;
  using B = OperandTile<Major::kMn, kTileN>;
  MEMEFF_DYNAMIC_SHARED(shared_memory);
  ptx::launch_dependents();
  auto ring = start_ring<1>(shared_memory, /*fillers=*/2);
  auto* const factors = reinterpret_cast<StepFactors<kMajorOfG>*>(shared_memory + kScratchAt);
  TilesOfBlock<1> tiles(order, work);
  ProductTile tile;

  if (is_producer()) {
    ptx::decrease_registers<kProducerRegisters>();
    const int warp = warp_of_group();
    if (warp > kFactorWarp) return;
    if (warp == kFactorWarp) {
      while (tiles.next(&tile)) {
        const FactorWriter<T, kMajorOfG> writer(scores, tile.row);
        for (int i = 0; i < tile.count; ++i) writer.write(factors, ring, tile.k(i));
        pass_steps(ring, to.steps_after());
      }
    } else if (lane_index() == 0) {
      while (tiles.next(&tile)) {
        load_tile<A, B>(ring, shared_memory, &e, &other, tile, work);
        load_source(ring, to, out, tile.row * kTileM, tile.column * kTileN);
      }
    }
    return;
  }

  ptx::increase_registers<kConsumerRegisters>();
  BoxStore boxes(shared_memory);
  while (tiles.next(&tile)) {
    const int row = tile.row * kTileM + consumer_group() * kGroupM, column = tile.column * kTileN;
    RowExponents exponents(to, row, column);
    ScoresAsA<T, kMajorOfG> source(scores, tile.row);
    float c[kTileN / 2];
    mainloop_from_scores<T>(c, ring, tile.steps(), source, factors);
    write_tile<T>(c, to, out, exponents, ring, boxes, row, column);
  }
  boxes.finish();
  if (to.outlasts_previous(1)) ptx::wait_for_grid();
#endif
}

template <class T, Major kMajorOfG>
Status launch(const GradientProduct& call, const ScoreFactors& scores, void* stream) {
  const auto kernel = stored_product_kernel<T, kMajorOfG>;
  return launch_product<T, kMajorOfG, 1>(kernel, TensorMapElement::kFloat16, call, stream, scores);
}

template <Major kMajorOfG>
Status run(const GradientProduct& call, const ScoreGradient& scores, void* stream) {
  const Coefficients& coefficients = scores.coefficients;
  const Status checked = check(call);
  if (!checked.ok()) return checked;
  if (!accepts(call.operands, call.output))
    return {"products from scores: sm90 needs rows that start at multiples of 16 bytes"};
  if (!accepts(scores))
    return {"products from scores: softmax and index targets only, no soft cap"};
  if (call.block.first_class % kStoredTile != 0)
    return {"products from scores: the block begins inside a tile of classes"};
  if (scores.maxima == nullptr || coefficients.shift == nullptr || coefficients.softmax == nullptr)
    return {"products from scores: maxima, shift and softmax must be given"};
  if (scores.targets.index != nullptr && scores.target_gradient == nullptr)
    return {"products from scores: index targets need target_gradient"};
  const ScoreFactors factors{call.block,           scores.maxima,         scores.maxima_stride,
                             coefficients.shift,   coefficients.softmax,  coefficients.target,
                             scores.targets.index, scores.target_gradient};
  const auto typed = call.operands.dtype == DType::kBFloat16 ? launch<__nv_bfloat16, kMajorOfG>
                                                             : launch<__half, kMajorOfG>;
  return typed(call, factors, stream);
}

}  // namespace

Status grad_input_from_scores(const GradientProduct& call, const ScoreGradient& scores,
                              void* stream) {
  if (call.block.tokens == 0) return {};
  return run<Major::kMn>(call, scores, stream);
}

Status grad_weight_from_scores(const GradientProduct& call, const ScoreGradient& scores,
                               void* stream) {
  if (call.block.classes == 0) return {};
  return run<Major::kK>(call, scores, stream);
}

}  // namespace memeff::cuda::sm90
