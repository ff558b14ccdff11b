// What becomes of C, a product of a gradient with respect to the scores (gradient_products.cu,
// stored_products.cu): fp32 sums, or an update of a 16-bit gradient (core/weight_update.h).
//
//                source                         stored as
//   sums         -, or added by TMA in L2       boxes of 64 x 32 floats
//   kWrite       -                              boxes of 64 x 64 of T
//   kSplitFirst  -                              split sums: two boxes of halves, or one of codes
//   kSplitNext   a split sum                    split sums
//   kSplitLast   a split sum                    boxes of T
//
// All by TMA (tile_store.cuh). fp32 sums that L2 adds are not even read; each element is added to once
// per launch, so results do not depend on timing. Any other source comes through the ring: after
// a tile's last step of k follow steps whose stages hold, instead of operands, the tile as it was,
//
//   kCodes    2 steps: the gradient's columns 0-127, then 128-255
//   kHalves   4 steps: 64 columns of the gradient, upper halves, and of the remainder
//
// 4 boxes of 64 x 64 in a stage, 32 of its 48 KiB. So they arrive during the tile's last products, and
// no consumer waits for memory. ldmatrix takes a box apart as stmatrix puts it together. In a cluster
// each block loads its own tile, but both go through the same steps; where the second has no rows, its
// source is zeros.
//
// Compact sums (common/compact_sum.cuh): a quad holds 256 columns of a row, 4 blocks, of whose 64
// columns a thread has 16; two shuffles find the largest. The 4 exponents of a row are an aligned
// word, read before the main loop.
//
// A product may overlap the one before it (ProductOutput::overlaps_previous). Its blocks then start on whatever
// multiprocessors that one has left idle; they are more than fit at a time, of a few tiles each, so that
// those that start late are few.
#pragma once

#include "cuda/common/compact_sum.cuh"
#include "cuda/fused_kernels.h"
#include "cuda/sm90/tile_store.cuh"

namespace memeff::cuda::sm90 {

// Split sums of halves are those of bf16.
template <class T>
constexpr bool kHasHalves = std::is_same_v<T, __nv_bfloat16>;

enum class Source { kNone, kHalves, kCodes };
enum class Store { kSums, kAddedSums, kRounded, kHalves, kCodes };

// What becomes of C.
struct Destination {
  Source source;
  Store store;
  int rows, columns;
  SplitSums split;
  const float* scale;
  int64_t scale_stride;
  bool overlaps_previous;  // of ProductOutput

  // Steps of the ring that follow those of k.
  MEMEFF_DEVICE int steps_after() const {
    return source == Source::kNone ? 0 : source == Source::kHalves ? 4 : 2;
  }
  // Whether this block waits for the grid before: those of the last cluster do, so that this grid ends
  // after it. All others leave, and with them the shared memory that the next grid waits for.
  MEMEFF_DEVICE bool outlasts_previous(unsigned cluster) const {
    return overlaps_previous && blockIdx.x + cluster >= gridDim.x;
  }
};

struct OutputMaps {
  TensorMap result;     // sums or the gradient
  TensorMap remainder;  // of kHalves
};

// ---- the source: from global memory to consumers ----

constexpr int kSecondBox = kConsumerGroups * kBoxBytes, kSourceBytes = 2 * kSecondBox;
static_assert(kSourceBytes <= kStageBytes);

// The producer's thread, after the last step of k: the tile as it was, from `row`, `column` on.
template <int kCluster>
MEMEFF_DEVICE void load_source(Ring<kCluster>& ring, const Destination& to, const OutputMaps& maps,
                               int row, int column) {
  const bool halves = to.source == Source::kHalves;
  const TensorMap* const second = halves ? &maps.remainder : &maps.result;
  for (int step = 0; step < to.steps_after(); ++step) {
    const int at = column + step * (halves ? kPanel : 2 * kPanel);
    wait_until_empty(ring);
    ptx::mbarrier_arrive_expect_tx(ring.full(), kSourceBytes);
    for (int group = 0; group < kConsumerGroups; ++group) {
      const uint32_t box = ring.tile() + group * kBoxBytes;
      ptx::tma_load_2d(box, &maps.result, at, row + group * kGroupM, ring.full());
      ptx::tma_load_2d(box + kSecondBox, second, halves ? at : at + kPanel, row + group * kGroupM,
                       ring.full());
    }
    ring.advance();
  }
}

// A consumer warpgroup: add(step, box) adds its two boxes of each step to c, which lie at `box` and
// kSecondBox behind.
template <int kSteps, int kCluster, class Add>
MEMEFF_DEVICE void for_source(float (&c)[kTileN / 2], Ring<kCluster>& ring, const Add& add) {
  // All at once: where code between two waits only adds, ptxas puts it off until the last one is over,
  // and spills.
  int stages[kSteps];
#pragma unroll
  for (int& stage : stages) {
    ptx::mbarrier_wait(ring.full(), ring.parity);
    stage = ring.stage;
    ring.advance();
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t box = ring.shared + stages[step] * kStageBytes + consumer_group() * kBoxBytes;
    add(step, box);
  }
  ptx::accumulators_are_ready(c);  // additions stay here, too
  ptx::fence_proxy_async();        // TMA must not overtake ldmatrix
  __syncwarp();
#pragma unroll
  for (const int stage : stages) {
    release_stage(ring, stage);
  }
}

// The same where the source is the gradient alone: add(panel, pairs) for each 64 columns.
template <int kCluster, class Add>
MEMEFF_DEVICE void for_source_gradient(float (&c)[kTileN / 2], Ring<kCluster>& ring,
                                       const Add& add) {
  for_source<kTileN / (2 * kPanel)>(c, ring, [&](int step, uint32_t box) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pairs[kPairsOfBox];
      read_box(pairs, box, half * kSecondBox);
      add(2 * step + half, pairs);
    }
  });
}

// 16 columns at a time, which takes fewer registers than read_box().
MEMEFF_DEVICE void add_halves(float* c, uint32_t box) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t upper[4], lower[4];
    ptx::ldmatrix_x4(upper, matrix_row(box, j));
    ptx::ldmatrix_x4(lower, matrix_row(box, j) + kSecondBox);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[8 * j + 2 * i] += __uint_as_float(lower_halves(lower[i], upper[i]));
      c[8 * j + 2 * i + 1] += __uint_as_float(upper_halves(lower[i], upper[i]));
    }
  }
}

// ---- compact sums ----

// The exponents of the thread's two rows of the group's 64 x 256, which lie in the gradient from `row`,
// `column` on; that of the first 64 columns is the lowest byte.
class RowExponents {
 public:
  MEMEFF_DEVICE RowExponents(const Destination& to, int row, int column) {
    if (to.source != Source::kCodes) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (const uint8_t* const at = place(to, row, r, column))
        words_[r] = *reinterpret_cast<const uint32_t*>(at);
  }
  MEMEFF_DEVICE uint32_t get(int r, int block) const { return words_[r] >> 8 * block & 0xff; }
  // Each block once, in order.
  MEMEFF_DEVICE void put(int r, int block, uint32_t exponent) {
    words_[r] = block == 0 ? exponent : words_[r] | exponent << 8 * block;
  }
  // Every lane of a quad has all of them, and stores one for each row: after the barriers of BoxStore,
  // so that all have read the old ones.
  MEMEFF_DEVICE void store(const Destination& to, int row, int column) const {
    const unsigned block = threadIdx.x % 4;
    if (column + static_cast<int>(block * kCompactBlock) >= to.columns) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (uint8_t* const at = place(to, row, r, column))
        at[block] = static_cast<uint8_t>(words_[r] >> 8 * block);
  }

 private:
  // Null: there is no such row.
  MEMEFF_DEVICE static uint8_t* place(const Destination& to, int first_row, int r, int column) {
    const int row = first_row + row_in_group(r);
    if (row >= to.rows) return nullptr;
    return to.split.exponents + row * to.split.exponents_stride +
           column / static_cast<int>(kCompactBlock);
  }

  uint32_t words_[2] = {};
};
static_assert(kCompactBlock == kPanel && kTileN == 4 * kPanel);

// A box holds pairs of the thread's two rows in turn: pair i is of row i % 2.
constexpr int kPairsOfRow = kPairsOfBox / 2;

MEMEFF_DEVICE void add_codes(float* c, const uint32_t (&pairs)[kPairsOfBox], int r,
                             uint32_t exponent) {
  with_codes(exponent, [&](const auto& codes) {
#pragma unroll
    for (int j = 0; j < kPairsOfRow; ++j) {
      const int i = 2 * j + r;
      add_pair(codes, pairs[i], c[2 * i], c[2 * i + 1]);
    }
  });
}

// Returns the exponent.
MEMEFF_DEVICE uint32_t make_codes(const float* c, uint32_t (&pairs)[kPairsOfBox], int r) {
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kPairsOfRow; ++j) {
    const int i = 2 * j + r;
    largest = max(largest, max(magnitude_bits(c[2 * i]), magnitude_bits(c[2 * i + 1])));
  }
  const uint32_t exponent = compact_exponent<4>(largest);
  with_codes(exponent, [&](const auto& codes) {
#pragma unroll
    for (int j = 0; j < kPairsOfRow; ++j) {
      const int i = 2 * j + r;
      pairs[i] = pair_of_codes(codes, c[2 * i], c[2 * i + 1]);
    }
  });
  return exponent;
}

// ---- the epilogue ----

template <class T, int kCluster>
MEMEFF_DEVICE void add_source(float (&c)[kTileN / 2], const Destination& to,
                              RowExponents& exponents, Ring<kCluster>& ring, int column) {
  if (to.source == Source::kCodes) {
    for_source_gradient(c, ring, [&](int panel, const uint32_t(&pairs)[kPairsOfBox]) {
#pragma unroll
      for (int r = 0; r < 2; ++r) add_codes(c + 32 * panel, pairs, r, exponents.get(r, panel));
    });
  } else if (kHasHalves<T> && to.source == Source::kHalves) {
    for_source<kTileN / kPanel>(c, ring, [&](int panel, uint32_t box) {
      // A condition, as ptxas would work on all panels at a time, and spill.
      if (column + kPanel * panel < to.columns) add_halves(c + 32 * panel, box);
    });
  }
}

// The group's 64 x 256 of C, from `row`, `column` on.
template <class T, int kCluster>
MEMEFF_DEVICE void write_tile(float (&c)[kTileN / 2], const Destination& to, const OutputMaps& maps,
                              RowExponents& exponents, Ring<kCluster>& ring, BoxStore& boxes,
                              int row, int column) {
  if (to.store == Store::kSums || to.store == Store::kAddedSums) {
#pragma unroll
    for (int box = 0; box < kTileN / 32; ++box) {
      fill_box_of_floats(boxes.begin(), c + 16 * box);
      boxes.end(&maps.result, column + 32 * box, row, to.store == Store::kAddedSums);
    }
    return;
  }
  add_source<T>(c, to, exponents, ring, column);
  if (to.store == Store::kRounded) {
    if (to.scale != nullptr) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // Pairs are of the thread's two rows in turn.
        const int own = row + row_in_group(r);
        const float scale = own < to.rows ? to.scale[own * to.scale_stride] : 0.f;
#pragma unroll
        for (int i = 2 * r; i < kTileN / 2; i += 4) c[i] *= scale, c[i + 1] *= scale;
      }
    }
#pragma unroll
    for (int box = 0; box < kTileN / kPanel; ++box) {
      fill_box<T>(boxes.begin(), c + 32 * box);
      boxes.end(&maps.result, column + kPanel * box, row);
    }
  } else if (to.store == Store::kCodes) {
#pragma unroll
    for (int box = 0; box < kTileN / kPanel; ++box) {
      uint32_t pairs[kPairsOfBox];
#pragma unroll
      for (int r = 0; r < 2; ++r) exponents.put(r, box, make_codes(c + 32 * box, pairs, r));
      fill_box_of_pairs(boxes.begin(), [&](int i) { return pairs[i]; });
      boxes.end(&maps.result, column + kPanel * box, row);
    }
    exponents.store(to, row, column);
  } else if (kHasHalves<T>) {
#pragma unroll
    for (int box = 0; box < kTileN / kPanel; ++box) {
      const float* const sums = c + 32 * box;
      const auto bits = [&](int i) { return __float_as_uint(sums[i]); };
      fill_box_of_pairs(boxes.begin(),
                        [&](int i) { return upper_halves(bits(2 * i), bits(2 * i + 1)); });
      boxes.end(&maps.result, column + kPanel * box, row);
      fill_box_of_pairs(boxes.begin(),
                        [&](int i) { return lower_halves(bits(2 * i), bits(2 * i + 1)); });
      boxes.end(&maps.remainder, column + kPanel * box, row);
    }
  }
}

// ---- launch ----

// What the launcher passes on: C [rows, columns] of T, and the maps of its source and result.
template <class T>
Status make_destination(int64_t rows, int64_t columns, const ProductOutput& output, Destination* to,
                        OutputMaps* maps) {
  *to = {Source::kNone, Store::kRounded, static_cast<int>(rows), static_cast<int>(columns),
         output.split,  output.scale,    output.scale_stride,    output.overlaps_previous};
  TensorMapLayout box;
  box.columns = static_cast<uint64_t>(columns);
  box.rows = static_cast<uint64_t>(rows);
  box.box_rows = kGroupM;
  if (output.sums != nullptr) {
    to->store = output.accumulate ? Store::kAddedSums : Store::kSums;
    box.base = output.sums;
    box.element = TensorMapElement::kFloat32;
    box.row_bytes = static_cast<uint64_t>(output.sums_stride) * 4;
    box.box_columns = 32;
    return make_tensor_map(box, &maps->result);
  }
  box.base = output.gradient;
  box.element = map_element<T>();
  box.row_bytes = static_cast<uint64_t>(output.gradient_stride) * 2;
  box.box_columns = kPanel;
  const Status status = make_tensor_map(box, &maps->result);
  if (!status.ok() || output.update == WeightUpdate::kWrite) return status;

  const bool compact = output.split.exponents != nullptr;
  if (output.update != WeightUpdate::kSplitFirst)
    to->source = compact ? Source::kCodes : Source::kHalves;
  if (output.update != WeightUpdate::kSplitLast)
    to->store = compact ? Store::kCodes : Store::kHalves;
  if (compact) return {};
  box.base = output.split.remainder;
  box.row_bytes = static_cast<uint64_t>(output.split.remainder_stride) * 2;
  return make_tensor_map(box, &maps->remainder);
}

}  // namespace memeff::cuda::sm90
