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
// A consumer warp makes its 16 rows of A in registers, 16 of k at a time: one ldmatrix (transposed
// for grad_input, whose rows are columns of E), factors, fp32 products, one rounding, wgmma with A
// in registers. Two sets of 4 registers take turns: while one product runs, the next one's are made.
//
// Factors come from a second warp of the producer's group, which keeps as far ahead as TMA does. For
// each step of k it leaves in shared memory (StepFactors)
//   grad_input    f of the tile's 128 rows: constant over 128 classes; consumers know their rows'
//                 targets, and learn which classes the step has
//   grad_weight   f of the step's 64 tokens, and in which row of the tile each has its target
// A stage is full once the bytes of TMA and the factors have arrived; stages of what C joins have no
// factors, and the warp only arrives.
//
// Numerics: those of stored_gradient, bit for bit, and sums in the same order: results equal those of
// stored_gradient and gradient_products.cu. Terms beside the softmax and the target (soft cap,
// entropy, `weighted`) need the score itself or more factors: such gradients are written by
// stored_gradient.
//
// Work: 2 classes tokens features FLOPs each, as gradient_products.cu. Per 16 of k and thread about
// 35 instructions more, in the shadow of the 128 cycles that its warpgroup's product takes (256 as
// the two groups take turns): docs/kernels-sm90.md.
#include "cuda/common/logit_gradient.cuh"
#include "cuda/sm90/gradient_epilogue.cuh"
#include "cuda/sm90/gradient_tiles.cuh"

namespace memeff::cuda::sm90 {

namespace {

// What G is made of, beside E.
struct ScoreFactors {
  Block block;
  const float* maxima;  // [tiles, tokens]
  int64_t maxima_stride;
  const void *shift, *softmax, *target;  // of Coefficients
  const int64_t* index;                  // targets, or null
  const float* target_gradient;

  // Of kCount adjacent tokens. What this file does not take is known to be zero.
  template <int kCount>
  MEMEFF_DEVICE void load_tokens(TokenCoefficients<float> (&c)[kCount], int token,
                                 int count) const {
    Coefficients known;
    known.shift = shift;
    known.softmax = softmax;
    known.target = target;
    load_coefficients(c, known, token, count);
  }
  template <int kCount>
  MEMEFF_DEVICE void load_maxima(float (&m)[kCount], int class_tile, int token, int count) const {
    load(m, maxima + class_tile * maxima_stride + token, count);
  }
};

template <class T>
MEMEFF_DEVICE uint32_t bits_of(T x) {
  uint16_t bits;
  memcpy(&bits, static_cast<const void*>(&x), sizeof bits);
  return bits;
}

// ---- factors: from a warp of the producer's group to the consumers ----

constexpr int kFactorWarp = 1;

template <Major kMajorOfG>
struct StepFactors;

template <>
struct alignas(16) StepFactors<Major::kMn> {  // grad_input
  float factor[kTileM];                       // of every row
  int first_class;
};

template <>
struct alignas(16) StepFactors<Major::kK> {  // grad_weight
  float2 factor[kStepK / 2];                 // of every token; in pairs, as registers hold them
  // The tile's row that has the token's target in the upper half, the entry in the lower.
  uint2 target[kStepK / 2];
  uint32_t has_target;  // bit i: a token of pair i has its target here
};
constexpr uint32_t kNoTargetHere = 0xffffu << 16;

static_assert(kStages * sizeof(StepFactors<Major::kMn>) <= kScratchBytes &&
              kStages * sizeof(StepFactors<Major::kK>) <= kScratchBytes);

// The warp has written the factors of a step, in a stage that was empty.
MEMEFF_DEVICE void end_factors(Ring<1>& ring) {
  __syncwarp();
  if (lane_index() == 0) ptx::mbarrier_arrive(ring.full());
  ring.advance();
}

// Steps that have none, but are full only when this warp has arrived, too.
MEMEFF_DEVICE void pass_steps(Ring<1>& ring, int steps) {
  for (int step = 0; step < steps; ++step) {
    wait_until_empty(ring);
    end_factors(ring);
  }
}

// The factors of a tile of C, k tile by k tile. The whole warp takes part.
template <class T, Major kMajorOfG>
class FactorWriter;

template <class T>
class FactorWriter<T, Major::kMn> {
 public:
  MEMEFF_DEVICE FactorWriter(const ScoreFactors& scores, int row)
      : scores_(scores),
        token_(row * kTileM + lane_index() * kPerLane),
        count_(count_left<kPerLane>(token_, scores.block.tokens)) {
    scores.load_tokens(coefficients_, token_, count_);
  }
  MEMEFF_DEVICE void write(StepFactors<Major::kMn>* factors, Ring<1>& ring, int k) const {
    float max[kPerLane], factor[kPerLane];
    scores_.load_maxima(max, k / kTileK, token_, count_);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) factor[i] = stored_factors(coefficients_[i], max[i]).softmax;
    for (int step = 0; step < kStepsPerTile; ++step) {
      wait_until_empty(ring);
      StepFactors<Major::kMn>& out = factors[ring.stage];
      store(out.factor + lane_index() * kPerLane, factor);
      if (lane_index() == 0) out.first_class = k + step * kStepK;
      end_factors(ring);
    }
  }

 private:
  static constexpr int kPerLane = kTileM / 32;
  const ScoreFactors& scores_;
  int token_, count_;
  TokenCoefficients<float> coefficients_[kPerLane];
};

template <class T>
class FactorWriter<T, Major::kK> {
 public:
  MEMEFF_DEVICE FactorWriter(const ScoreFactors& scores, int row)
      : scores_(scores), class_tile_(row) {}
  MEMEFF_DEVICE void write(StepFactors<Major::kK>* factors, Ring<1>& ring, int k) const {
    for (int step = 0; step < kStepsPerTile; ++step) {
      const int token = k + step * kStepK + lane_index() * kPerLane;
      const int count = count_left<kPerLane>(token, scores_.block.tokens);
      TokenCoefficients<float> coefficients[kPerLane];
      scores_.load_tokens(coefficients, token, count);
      float max[kPerLane], factor[kPerLane], entry[kPerLane] = {};
      scores_.load_maxima(max, class_tile_, token, count);
      int target[kPerLane];
      load_targets(target, scores_.index, scores_.block, token, count);
      if (scores_.index != nullptr) load(entry, scores_.target_gradient + token, count);
      uint32_t packed[kPerLane];
      bool any = false;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const StoredFactors f = stored_factors(coefficients[i], max[i]);
        factor[i] = f.softmax;
        const bool here = target[i] >= 0 && target[i] / kTileM == class_tile_ && !f.left_out;
        any |= here;
        packed[i] =
            here ? static_cast<uint32_t>(target[i] % kTileM) << 16 | bits_of(narrow<T>(entry[i]))
                 : kNoTargetHere;
      }
      const uint32_t has_target = __ballot_sync(~0u, any);
      wait_until_empty(ring);
      StepFactors<Major::kK>& out = factors[ring.stage];
      out.factor[lane_index()] = {factor[0], factor[1]};
      out.target[lane_index()] = {packed[0], packed[1]};
      if (lane_index() == 0) out.has_target = has_target;
      end_factors(ring);
    }
  }

 private:
  static constexpr int kPerLane = 2;
  static_assert(kStepK == 32 * kPerLane);
  const ScoreFactors& scores_;
  int class_tile_;
};

// ---- A of a consumer thread ----
//
// Register i holds row lane / 4 + 8 (i % 2) of the warp's 16, columns pair + 8 (i / 2) and the next
// of 16 k, pair = 2 (lane % 4).

MEMEFF_DEVICE int row_in_tile(int r) {
  return consumer_group() * kGroupM + warp_of_group() * 16 + lane_index() / 4 + 8 * r;
}

// Two adjacent entries of G. The minimum is that of softmax_gradient(), two at a time.
template <class T>
MEMEFF_DEVICE uint32_t entries(uint32_t scores, float low, float high) {
  constexpr uint32_t kOnes = 0x3c003c00u;
  const uint32_t limited = ptx::min_of_halves(scores, kOnes);
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &limited, sizeof pair);
  const float2 e = __half22float2(pair);
  return pack(e.x * low, e.y * high, T{});
}

MEMEFF_DEVICE void replace(uint32_t& pair, int which, uint32_t entry) {
  pair = which == 0 ? (pair & 0xffff0000u) | entry : (pair & 0xffffu) | entry << 16;
}

template <class T, Major kMajorOfG>
class ScoresAsA;

template <class T>
class ScoresAsA<T, Major::kMn> {
 public:
  struct Raw {  // 16 k of E as ldmatrix leaves them
    uint32_t e[4];
  };

  MEMEFF_DEVICE ScoresAsA(const ScoreFactors& scores, int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = row * kTileM + row_in_tile(r), count = token < scores.block.tokens ? 1 : 0;
      TokenCoefficients<float> coefficients[1];
      scores.load_tokens(coefficients, token, count);
      int target[1];
      load_targets(target, scores.index, scores.block, token, count);
      target_[r] = coefficients[0].all_zero() ? -1 : target[0];
      entry_[r] = target_[r] < 0 ? 0 : bits_of(narrow<T>(scores.target_gradient[token]));
    }
    // Matrix lane / 8 of ldmatrix: k 0-7, 0-7, 8-15, 8-15, rows 0-7, 8-15, 0-7, 8-15.
    const int k = lane_index() / 16 * 8 + lane_index() % 8;
    const int piece = warp_of_group() * 2 + lane_index() / 8 % 2;
    offset_ = consumer_group() * OperandTile<Major::kMn, kTileM>::kPanelBytes + k * 128 +
              ((piece ^ k % 8) << 4);
  }
  MEMEFF_DEVICE void begin_step(const StepFactors<Major::kMn>& step) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor_[r] = step.factor[row_in_tile(r)];
      column_[r] = target_[r] - step.first_class;
      any |= column_[r] >= 0 && column_[r] < kStepK;
    }
    has_target_ = __any_sync(~0u, any) != 0;
  }
  MEMEFF_DEVICE void load(Raw& raw, uint32_t tile, int k16) const {
    ptx::ldmatrix_x4_trans(raw.e, tile + offset_ + k16 * 2 * ptx::kAtomBytes);
  }
  MEMEFF_DEVICE void make(uint32_t (&a)[4], const Raw& raw, int k16) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = entries<T>(raw.e[i], factor_[i % 2], factor_[i % 2]);
    if (!has_target_) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int which = column_[i % 2] - (k16 * 16 + i / 2 * 8 + lane_index() % 4 * 2);
      if (which == 0 || which == 1) replace(a[i], which, entry_[i % 2]);
    }
  }

 private:
  uint32_t offset_;
  int target_[2];  // class of the block, or -1
  uint32_t entry_[2];
  // Of the step:
  float factor_[2];
  int column_[2];
  bool has_target_;
};

template <class T>
class ScoresAsA<T, Major::kK> {
 public:
  struct Raw {
    uint32_t e[4];
    float2 factor[2];  // of the thread's two pairs of columns
  };

  MEMEFF_DEVICE ScoresAsA(const ScoreFactors&, int) {
    // Matrix lane / 8 of ldmatrix: rows 0-7, 8-15, 0-7, 8-15, k 0-7, 0-7, 8-15, 8-15.
    const int row = consumer_group() * kGroupM + warp_of_group() * 16 + lane_index() % 16;
    offset_ = row * 128 + ((lane_index() / 16 ^ row % 8) << 4);
  }
  MEMEFF_DEVICE void begin_step(const StepFactors<Major::kK>& step) {
    step_ = &step;
    has_target_ = step.has_target;
  }
  MEMEFF_DEVICE void load(Raw& raw, uint32_t tile, int k16) const {
    ptx::ldmatrix_x4(raw.e, tile + (offset_ ^ k16 << 5));  // two pieces of 16 bytes further
#pragma unroll
    for (int half = 0; half < 2; ++half) raw.factor[half] = step_->factor[pair(k16, half)];
  }
  MEMEFF_DEVICE void make(uint32_t (&a)[4], const Raw& raw, int k16) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = entries<T>(raw.e[i], raw.factor[i / 2].x, raw.factor[i / 2].y);
    if ((has_target_ >> 8 * k16 & 0xff) == 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 target = step_->target[pair(k16, half)];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto row = static_cast<uint32_t>(row_in_tile(r));
        if (target.x >> 16 == row) replace(a[2 * half + r], 0, target.x & 0xffff);
        if (target.y >> 16 == row) replace(a[2 * half + r], 1, target.y & 0xffff);
      }
    }
  }

 private:
  MEMEFF_DEVICE static int pair(int k16, int half) { return k16 * 8 + half * 4 + lane_index() % 4; }
  uint32_t offset_;
  // Of the step:
  const StepFactors<Major::kK>* step_;
  uint32_t has_target_;
};

// The warp has read scores and factors of the stage by plain loads, which TMA must not overtake.
MEMEFF_DEVICE void leave_read_stage(const Ring<1>& ring, int stage) {
  ptx::fence_proxy_async();
  __syncwarp();
  leave_stage(ring, stage);
}

// multiply() of pipeline.cuh with A in registers: a product per 16 of k, of which one is always in
// flight. Its registers are free again once the wait after the next product has ended.
template <class T, class Source, class Factors>
MEMEFF_DEVICE void multiply_scores(float (&c)[kTileN / 2], Ring<1>& ring, int steps, Source& source,
                                   const Factors* factors) {
  using B = OperandTile<Major::kMn, kTileN>;
  constexpr int kProducts = kStepK / 16;
  static_assert(kProducts % 2 == 0);
#pragma unroll
  for (float& x : c) x = 0.f;
  uint32_t a[2][4];
  int previous_stage = 0;
  const Lead lead(steps);
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
        leave_read_stage(ring, previous_stage);
        lead.finished(step);
      }
    }
    previous_stage = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::accumulators_are_ready(c);
  if (steps > 0) leave_read_stage(ring, previous_stage);
}

template <class T, Major kMajorOfG>
__global__ void __launch_bounds__(kThreads, 1)
    stored_product_kernel(const __grid_constant__ TensorMap e,
                          const __grid_constant__ TensorMap other,
                          const __grid_constant__ OutputMaps out,
                          const __grid_constant__ ScoreFactors scores,
                          const __grid_constant__ Work work, Destination to,
                          const __grid_constant__ TileOrder<1> order) {
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
        load_tile<A, B>(ring, &e, &other, tile);
        load_joined(ring, to, out, tile.row * kTileM, tile.column * kTileN);
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
    multiply_scores<T>(c, ring, tile.steps(), source, factors);
    write_tile<T>(c, to, out, exponents, ring, boxes, row, column);
  }
  boxes.finish();
  if (to.beside) ptx::wait_for_grid();
#endif
}

// rows: of C, k: what is summed over.
template <class T, Major kMajorOfG>
Status launch(int64_t rows, int64_t k, const GradientOperands& operands, const ScoreFactors& scores,
              const ProductOutput& output, void* stream) {
  TensorMap e, other;
  OutputMaps out{};
  Destination to;
  Status status = make_destination<T>(rows, operands.features, output, &to, &out);
  if (status.ok())
    status = OperandTile<kMajorOfG, kTileM>::map(operands.gradient, TensorMapElement::kFloat16,
                                                 scores.block.tokens, scores.block.classes,
                                                 operands.gradient_stride, &e);
  if (status.ok())
    status = OperandTile<Major::kMn, kTileN>::map(
        operands.other, map_element<T>(), operands.features, k, operands.other_stride, &other);
  const auto order = tile_order<1>(rows, count_tiles(operands.features, kTileN));
  const auto kernel = stored_product_kernel<T, kMajorOfG>;
  unsigned blocks = 0;
  if (status.ok()) status = persistent_blocks(kernel, order, &blocks);
  if (output.beside) blocks = blocks_that_share(blocks, order, k);
  if (!status.ok()) return status;
  const Work work = work_of(operands, k, output);
  MEMEFF_LAUNCH_BESIDE(output.beside, 1, kernel, dim3(blocks), dim3(kThreads), kSharedBytes, stream,
                       e, other, out, scores, work, to, order);
  return launch_status();
}

// What both functions check and pass on.
Status prepare(const Block& block, const GradientOperands& operands, const ScoreGradient& scores,
               const ProductOutput& output, ScoreFactors* factors) {
  if (!accepts(operands, output))
    return {"products from scores: sm90 needs rows that start at multiples of 16 bytes"};
  if (!accepts(scores))
    return {"products from scores: softmax and index targets only, no soft cap"};
  if (block.first_class % kStoredTile != 0)
    return {"products from scores: the block begins inside a tile of classes"};
  if (scores.maxima == nullptr || scores.coefficients.shift == nullptr ||
      scores.coefficients.softmax == nullptr)
    return {"products from scores: maxima, shift and softmax must be given"};
  if (scores.targets.index != nullptr && scores.target_gradient == nullptr)
    return {"products from scores: index targets need target_gradient"};
  *factors = {block,
              scores.maxima,
              scores.maxima_stride,
              scores.coefficients.shift,
              scores.coefficients.softmax,
              scores.coefficients.target,
              scores.targets.index,
              scores.target_gradient};
  return {};
}

}  // namespace

Status grad_input_from_scores(const Block& block, const GradientOperands& operands,
                              const ScoreGradient& scores, const ProductOutput& output,
                              void* stream) {
  if (block.tokens == 0) return {};
  ScoreFactors factors;
  const Status status = prepare(block, operands, scores, output, &factors);
  if (!status.ok()) return status;
  const auto run = operands.dtype == DType::kBFloat16 ? launch<__nv_bfloat16, Major::kMn>
                                                      : launch<__half, Major::kMn>;
  return run(block.tokens, block.classes, operands, factors, output, stream);
}

Status grad_weight_from_scores(const Block& block, const GradientOperands& operands,
                               const ScoreGradient& scores, const ProductOutput& output,
                               void* stream) {
  if (block.classes == 0) return {};
  ScoreFactors factors;
  const Status status = prepare(block, operands, scores, output, &factors);
  if (!status.ok()) return status;
  const auto run = operands.dtype == DType::kBFloat16 ? launch<__nv_bfloat16, Major::kK>
                                                      : launch<__half, Major::kK>;
  return run(block.classes, block.tokens, operands, factors, output, stream);
}

}  // namespace memeff::cuda::sm90
