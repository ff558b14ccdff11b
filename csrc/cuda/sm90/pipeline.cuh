// The main loop that all sm_90a products share: C = A B with 16-bit operands and fp32 accumulators,
// a persistent grid of specialised warps.
//
//   tile of C     128 x 256 per thread block, 64 x 256 per consumer warpgroup: 128 accumulators per
//                 thread, one wgmma m64n256k16 per 16 of k. Twice as high or wide does not fit the
//                 registers; half as high or wide doubles the L2 traffic of one operand, which at
//                 (128 + 256) * 128 bytes per 128 * 256 * 64 products is 48 bytes a cycle already.
//   warpgroup 0   producer: its first warp fills a ring of stages by TMA, the rest leaves at once;
//                 gives its registers to the others
//   warpgroups 1, 2  consumers: wgmma on rows 0-63 and 64-127, then the epilogue
//
// Shared memory, bytes:
//        0  4 stages of 48 KiB: A [128, 64] then B [64, 256] of one step of k, 128-byte swizzle
//   196608  2 boxes of 8 KiB per consumer warpgroup: results on their way out (tile_store.cuh)
//   229376  mbarriers "full" and "empty" of each stage
//   229440  scratch of a kernel: votes, factors of the stages
//
// A stage goes round: the producer waits for "empty" (8 consumer warps have arrived), announces the
// bytes on "full" and starts the copies. Consumers wait for "full" and start their products; once
// those of the next stage are under way, too, they wait for these to end and arrive at "empty". So
// one group of products is always in flight, and the producer is up to 4 steps ahead, also into the
// next tile of C: its loads run during the epilogue.
//
// Ragged edges cost nothing here: TMA reads zeros outside a tensor and never writes there.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/ptx/sm90.cuh"

namespace memeff::cuda::sm90 {

constexpr int kTileM = 128, kTileN = 256, kStepK = 64, kStages = 4;
constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kConsumerGroups = 2, kConsumerWarps = 8;
constexpr int kThreads = (1 + kConsumerGroups) * kGroupThreads;
constexpr int kGroupM = kTileM / kConsumerGroups;
// 65536 registers are 168 for each of 384 threads at launch; ptxas wants multiples of 8.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

constexpr int kPanel = 64;  // elements of a 128-byte row, the width of the swizzle
constexpr int kOperandABytes = kTileM * kStepK * 2, kOperandBBytes = kTileN * kStepK * 2;
constexpr int kStageBytes = kOperandABytes + kOperandBBytes;
constexpr int kBoxBytes = 64 * 128;
constexpr int kBoxesAt = kStages * kStageBytes;
constexpr int kMbarriersAt = kBoxesAt + kConsumerGroups * 2 * kBoxBytes;
constexpr int kScratchAt = kMbarriersAt + 2 * kStages * 8;
constexpr int kScratchBytes = 2176;
constexpr int kSharedBytes = kScratchAt + kScratchBytes;
static_assert(kSharedBytes <= 227 * 1024);

// ---- operands ----

enum class Major { kK, kMn };  // which index of an operand is contiguous in memory

// One operand's share of a stage: kExtent of m or n, kStepK of k.
//   K-major    a tensor [mn, k]: one box of kExtent rows, 64 k wide
//   MN-major   a tensor [k, mn]: boxes of 64 rows of k, 64 mn wide, one after the other
template <Major kMajor, int kExtent>
struct OperandTile {
  static constexpr int kBoxRows = kMajor == Major::kK ? kExtent : kStepK;
  static constexpr int kPanelBytes = kStepK * kPanel * 2;  // of one MN-major box

  MEMEFF_DEVICE static void load(uint32_t to, const TensorMap* map, int first_mn, int first_k,
                                 uint32_t mbarrier) {
    if constexpr (kMajor == Major::kK) {
      ptx::tma_load_2d(to, map, first_k, first_mn, mbarrier);
    } else {
#pragma unroll
      for (int panel = 0; panel < kExtent / kPanel; ++panel)
        ptx::tma_load_2d(to + panel * kPanelBytes, map, first_mn + panel * kPanel, first_k,
                         mbarrier);
    }
  }

  // Of the 16 k number `k16` of the step, from row `first_mn` (a multiple of 64) on.
  MEMEFF_DEVICE static uint64_t descriptor(uint32_t tile, int first_mn, int k16) {
    if constexpr (kMajor == Major::kK)
      return ptx::k_major_descriptor(tile + first_mn * 128 + k16 * 32);
    else
      return ptx::mn_major_descriptor(
          tile + first_mn / kPanel * kPanelBytes + k16 * 2 * ptx::kAtomBytes, kPanelBytes);
  }

  // The map of this operand's tensor, of 16-bit elements, `stride` elements from row to row.
  static Status map(const void* base, TensorMapElement element, int64_t columns, int64_t rows,
                    int64_t stride, TensorMap* map) {
    TensorMapLayout layout;
    layout.base = const_cast<void*>(base);
    layout.element = element;
    layout.columns = static_cast<uint64_t>(columns);
    layout.rows = static_cast<uint64_t>(rows);
    layout.row_bytes = static_cast<uint64_t>(stride) * 2;
    layout.box_columns = kPanel;
    layout.box_rows = kBoxRows;
    return make_tensor_map(layout, map);
  }
};

// ---- the ring of stages ----

MEMEFF_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
MEMEFF_DEVICE int warp_of_group() { return static_cast<int>(threadIdx.x) % kGroupThreads / 32; }
// Which consumer warpgroup this thread belongs to.
MEMEFF_DEVICE int consumer_group() { return static_cast<int>(threadIdx.x) / kGroupThreads - 1; }
MEMEFF_DEVICE bool is_producer() { return threadIdx.x < kGroupThreads; }

// Where one side, producer or consumers, has got to. Both walk over the same stages in the same
// order, so a consumer need not know what it multiplies, only how many steps make a tile.
struct Ring {
  uint32_t shared;  // address of the block's shared memory
  int stage = 0, parity = 0;

  MEMEFF_DEVICE uint32_t tile() const { return shared + stage * kStageBytes; }
  MEMEFF_DEVICE uint32_t full() const { return shared + kMbarriersAt + stage * 8; }
  MEMEFF_DEVICE uint32_t empty(int of_stage) const {
    return shared + kMbarriersAt + (kStages + of_stage) * 8;
  }
  MEMEFF_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// All threads of the block, before anything else. `fillers`: arrivals that make a stage full, beside
// the bytes of TMA.
MEMEFF_DEVICE Ring start_ring(const unsigned char* shared_memory, int fillers = 1) {
  const Ring ring{ptx::shared_address(shared_memory)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(ring.shared + kMbarriersAt + stage * 8, fillers);
      ptx::mbarrier_init(ring.empty(stage), kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return ring;
}

// One thread: the next stage gets k [first_k, first_k + 64) of rows first_m of A and first_n of B.
template <class A, class B>
MEMEFF_DEVICE void load_step(Ring& ring, const TensorMap* a, const TensorMap* b, int first_m,
                             int first_n, int first_k) {
  // On a fresh mbarrier parity 1 counts as over: the first round finds every stage empty.
  ptx::mbarrier_wait(ring.empty(ring.stage), ring.parity ^ 1);
  ptx::mbarrier_arrive_expect_tx(ring.full(), kStageBytes);
  A::load(ring.tile(), a, first_m, first_k, ring.full());
  B::load(ring.tile() + kOperandABytes, b, first_n, first_k, ring.full());
  ring.advance();
}

// Each warp waits for its own share of the products, so each says itself that it has left a stage.
MEMEFF_DEVICE void leave_stage(const Ring& ring, int stage) {
  if (lane_index() == 0) ptx::mbarrier_arrive(ring.empty(stage));
}

// A consumer warpgroup: c = the product of the next `steps` stages. In the group's 64 x 256,
// accumulator i of a thread is
//   row 16 warp + lane / 4 + 8 (i / 2 % 2),  column 8 (i / 4) + 2 (lane % 4) + i % 2
template <class T, class A, class B>
MEMEFF_DEVICE void multiply(float (&c)[kTileN / 2], Ring& ring, int steps) {
  constexpr bool kATransposed = std::is_same_v<A, OperandTile<Major::kMn, kTileM>>;
  constexpr bool kBTransposed = std::is_same_v<B, OperandTile<Major::kMn, kTileN>>;
  // Zeroed here rather than by the first product: undefined registers that enter a loop make ptxas
  // keep a second copy of them, and spill it.
#pragma unroll
  for (float& x : c) x = 0.f;
  const int first_m = consumer_group() * kGroupM;
  int previous_stage = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ring.full(), ring.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kStepK / 16; ++k16)
      ptx::wgmma<kTileN, T, kATransposed, kBTransposed>(
          c, A::descriptor(ring.tile(), first_m, k16),
          B::descriptor(ring.tile() + kOperandABytes, 0, k16), 1);
    ptx::wgmma_commit();
    if (step > 0) {
      ptx::wgmma_wait<1>();
      leave_stage(ring, previous_stage);
    }
    previous_stage = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::accumulators_are_ready(c);
  if (steps > 0) leave_stage(ring, previous_stage);
}

// ---- which tile of C a block computes next ----

// Tiles are numbered so that those computed at the same time form a compact patch: down
// kTilesPerGroup rows, then the next column. 132 blocks then read 16 tiles of A and about 8 of B at
// once (as many bytes of each), and A's stay in L2 until all columns are done.
struct TileOrder {
  int rows, columns;
  static constexpr int kTilesPerGroup = 16;

  MEMEFF_DEVICE void place(int number, int* row, int* column) const {
    const int group = number / (kTilesPerGroup * columns);
    const int first_row = group * kTilesPerGroup;
    const int height = rows - first_row < kTilesPerGroup ? rows - first_row : kTilesPerGroup;
    const int within = number - first_row * columns;
    *row = first_row + within % height;
    *column = within / height;
  }
};

inline int count_tiles(int64_t extent, int64_t tile) {
  return static_cast<int>((extent + tile - 1) / tile);
}

// Blocks of a persistent grid: one per SM, as the shared memory of two does not fit.
inline Status persistent_blocks(int64_t tiles, unsigned* blocks) {
#if defined(__CUDACC__)
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
#else
  const int multiprocessors = 2;  // few, so that every block computes several tiles
#endif
  *blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  return {};
}

template <class T>
constexpr TensorMapElement map_element() {
  return std::is_same_v<T, __nv_bfloat16> ? TensorMapElement::kBFloat16
                                          : TensorMapElement::kFloat16;
}

}  // namespace memeff::cuda::sm90
