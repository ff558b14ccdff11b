// The mainloop that all sm_90a products share: C = A B with 16-bit operands and fp32 accumulators,
// a persistent grid of specialised warps.
//
//   tile of C     128 x 256 per thread block, 64 x 256 per consumer warpgroup: 128 accumulators per
//                 thread, one wgmma m64n256k16 per 16 of k. Twice as high or wide does not fit the
//                 registers; half as high or wide doubles the L2 traffic of one operand, which at
//                 (128 + 256) * 128 bytes per 128 * 256 * 64 products is 48 bytes a cycle already.
//   cluster       kCluster blocks, 1 or 2, compute tiles one below the other, so they share B: each
//                 loads its own A and half of B, which TMA writes to both. 32 bytes a cycle.
//   warpgroup 0   producer: its first warp fills a ring of stages by TMA, the rest exits at once;
//                 gives its registers to the others
//   warpgroups 1, 2  consumers: wgmma on rows 0-63 and 64-127, then the epilogue; the second some
//                 steps behind the first (class Stagger)
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
// In a cluster, a producer fills the stages of both blocks, so "empty" counts the consumer warps of
// both, and each warp arrives in both blocks. "full" is a block's own: it announces all its bytes,
// whichever block loads them. (Those of the other block may come first; the phase cannot end before
// its one arrival.) Both blocks must go through the same steps, one for one.
//
// Ragged edges cost nothing here: TMA reads zeros outside a tensor and writes nothing there, but for
// the rest of 16 bytes. Where the last tile of a cluster has no rows left, its block multiplies
// zeros and stores nothing.
#pragma once

#include <algorithm>

#include "cuda/common/device.cuh"
#include "cuda/ptx/sm90.cuh"

// Steps of k by which consumer warpgroup 1 is ahead of warpgroup 2; 0: they begin each tile together.
#ifndef MEMEFF_SM90_STAGGER_STEPS
#define MEMEFF_SM90_STAGGER_STEPS 2
#endif

namespace memeff::cuda::sm90 {

constexpr int kTileM = 128, kTileN = 256, kStepK = 64, kStages = 4;
constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kConsumerGroups = 2, kConsumerWarps = 8;
constexpr int kThreads = (1 + kConsumerGroups) * kGroupThreads;
constexpr int kGroupM = kTileM / kConsumerGroups;
constexpr int kStaggerSteps = MEMEFF_SM90_STAGGER_STEPS;
static_assert(kStaggerSteps >= 0 && kStaggerSteps < kStages);
// Named barriers of PTX; 0 is that of __syncthreads().
constexpr int kBoxBarrier = 1;  // and the next: of a consumer warpgroup each (tile_store.cuh)
constexpr int kVotesBarrier = kBoxBarrier + kConsumerGroups;  // linear_gradient.cu
constexpr int kStaggerBarrier = kVotesBarrier + 1;
// 65536 registers are 168 for each of 384 threads at launch; ptxas wants multiples of 8.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

constexpr int kPanel = 64;  // elements of a 128-byte row, the width of the swizzle
constexpr int kOperandABytes = kTileM * kStepK * 2, kOperandBBytes = kTileN * kStepK * 2;
constexpr int kStageBytes = kOperandABytes + kOperandBBytes;
constexpr int kBoxBytes = 64 * 128;
constexpr int kBoxesAt = kStages * kStageBytes;
constexpr int kMbarriersAt = kBoxesAt + kConsumerGroups * 2 * kBoxBytes;
constexpr int kScratchAt = kMbarriersAt + 3 * kStages * 8;
constexpr int kScratchBytes = 2176;
constexpr int kSharedBytes = kScratchAt + kScratchBytes;
static_assert(kSharedBytes <= 227 * 1024);
// Reports of hangs number mbarriers from here: full, empty and landed stages, kStages of each.
static_assert(kMbarriersAt % 1024 == 0);

// ---- operands ----

enum class Major { kK, kMn };  // which index of an operand is contiguous in memory

template <int kCluster>
MEMEFF_DEVICE int rank_in_cluster() {
  if constexpr (kCluster == 1)
    return 0;
  else
    return static_cast<int>(ptx::cluster_rank());
}

// One operand's share of a stage: kExtent of m or n, kStepK of k.
//   K-major    a tensor [mn, k]: one box of kExtent rows, 64 k wide
//   MN-major   a tensor [k, mn]: boxes of 64 rows of k, 64 mn wide, one after the other
// Where kBlocks blocks of a cluster need the same tile, each loads its part of m or n for all.
template <Major kMajor, int kExtent, int kBlocks = 1>
struct OperandTile {
  static constexpr bool kTransposed = kMajor == Major::kMn;  // as wgmma sees it
  static constexpr int kPart = kExtent / kBlocks;
  static constexpr int kBoxRows = kMajor == Major::kK ? kPart : kStepK;
  static constexpr int kPanelBytes = kStepK * kPanel * 2;  // of one MN-major box

  MEMEFF_DEVICE static void load(uint32_t to, const TensorMap* map, int first_mn, int first_k,
                                 uint32_t mbarrier) {
    const int part = rank_in_cluster<kBlocks>() * kPart;
    if constexpr (kMajor == Major::kK) {
      load_box(to + part * 128, map, first_k, first_mn + part, mbarrier);
    } else {
#pragma unroll
      for (int mn = 0; mn < kPart; mn += kPanel)
        load_box(to + (part + mn) / kPanel * kPanelBytes, map, first_mn + part + mn, first_k,
                 mbarrier);
    }
  }
  MEMEFF_DEVICE static void load_box(uint32_t to, const TensorMap* map, int column, int row,
                                     uint32_t mbarrier) {
    if constexpr (kBlocks == 1)
      ptx::tma_load_2d(to, map, column, row, mbarrier);
    else
      ptx::tma_load_2d_multicast(to, map, column, row, mbarrier, (1 << kBlocks) - 1);
  }

  // Zeros for a row of k of the MN-major tile; the swizzle moves pieces within their row.
  MEMEFF_DEVICE static void clear_row(unsigned char* tile, int row) {
    for (int panel = 0; panel < kExtent / kPanel; ++panel)
      for (int piece = 0; piece < kPanel * 2; piece += 16)
        *reinterpret_cast<uint4*>(tile + panel * kPanelBytes + row * kPanel * 2 + piece) = {};
  }

  // The descriptor of the 16 k number `k16` of the step, from row `first_mn` (a multiple of 64) on.
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

// Rows r = 0 and 1 of the accumulators of a consumer's thread (see mainloop), in the group's 64 and in the
// block's tile.
MEMEFF_DEVICE int row_in_group(int r) { return warp_of_group() * 16 + lane_index() / 4 + 8 * r; }
MEMEFF_DEVICE int row_in_tile(int r) { return consumer_group() * kGroupM + row_in_group(r); }

// Where one side, producer or consumers, has got to. Both walk over the same stages in the same
// order, so a consumer need not know what it multiplies, only how many steps make a tile.
template <int kCluster>
struct Ring {
  uint32_t shared;  // address of the block's shared memory
  int stage = 0, parity = 0;
  int landed_parities = 0;  // a bit per stage, of the producer: that of landed()

  MEMEFF_DEVICE uint32_t tile() const { return shared + stage * kStageBytes; }
  MEMEFF_DEVICE uint32_t full() const { return shared + kMbarriersAt + stage * 8; }
  MEMEFF_DEVICE uint32_t empty(int of_stage) const {
    return shared + kMbarriersAt + (kStages + of_stage) * 8;
  }
  MEMEFF_DEVICE uint32_t landed() const {
    return shared + kMbarriersAt + (2 * kStages + stage) * 8;
  }
  MEMEFF_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// All threads of the block, before anything else. `fillers`: arrivals that make a stage full,
// in addition to the bytes of TMA.
template <int kCluster>
MEMEFF_DEVICE Ring<kCluster> start_ring(const unsigned char* shared_memory, int fillers = 1) {
  const Ring<kCluster> ring{ptx::shared_address(shared_memory)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(ring.shared + kMbarriersAt + stage * 8, fillers);
      ptx::mbarrier_init(ring.empty(stage), kCluster * kConsumerWarps);
      ptx::mbarrier_init(ring.shared + kMbarriersAt + (2 * kStages + stage) * 8, 1);  // landed()
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  return ring;
}

// The loading threads wait here until the ring's stage is free in all blocks of the cluster.
template <int kCluster>
MEMEFF_DEVICE void wait_until_empty(const Ring<kCluster>& ring) {
  // On a fresh mbarrier parity 1 counts as over: the first round finds every stage empty.
  ptx::mbarrier_wait(ring.empty(ring.stage), ring.parity ^ 1);
}

// The producer's thread: the next stage gets k [first_k, first_k + 64) of rows first_m of A and
// first_n of B.
template <class A, class B, int kCluster>
MEMEFF_DEVICE void load_step(Ring<kCluster>& ring, const TensorMap* a, const TensorMap* b,
                             int first_m, int first_n, int first_k) {
  wait_until_empty(ring);
  ptx::mbarrier_arrive_expect_tx(ring.full(), kStageBytes);
  A::load(ring.tile(), a, first_m, first_k, ring.full());
  B::load(ring.tile() + kOperandABytes, b, first_n, first_k, ring.full());
  ring.advance();
}

// The same, where rows of k whose factor is 0 must count as zeros in B, MN-major, of `rows` rows:
// when all has landed, which another mbarrier says, the thread overwrites them, and only then is the
// stage full. Each block of a cluster does so in its own copy. `stages`: the block's shared memory.
template <class A, class B, int kCluster>
MEMEFF_DEVICE void load_masked_step(Ring<kCluster>& ring, unsigned char* stages, const TensorMap* a,
                                    const TensorMap* b, int first_m, int first_n, int first_k,
                                    const float* factors, int rows) {
  wait_until_empty(ring);
  ptx::mbarrier_arrive_expect_tx(ring.landed(), kStageBytes);
  A::load(ring.tile(), a, first_m, first_k, ring.landed());
  B::load(ring.tile() + kOperandABytes, b, first_n, first_k, ring.landed());
  // Not ring.parity: other steps pass through the stage without it.
  ptx::mbarrier_wait(ring.landed(), ring.landed_parities >> ring.stage & 1);
  ring.landed_parities ^= 1 << ring.stage;
  for (int row = 0; row < kStepK && first_k + row < rows; ++row)
    if (factors[first_k + row] == 0.f)
      B::clear_row(stages + ring.stage * kStageBytes + kOperandABytes, row);
  ptx::fence_proxy_async();
  ptx::mbarrier_arrive(ring.full());
  ring.advance();
}

// The producer's thread, before it exits. In a cluster it stays until all stages are empty: then
// the other block has all that was loaded for it, and will not arrive in this block's memory again.
template <int kCluster>
MEMEFF_DEVICE void finish_loads(Ring<kCluster>& ring) {
  for (int stage = 0; kCluster > 1 && stage < kStages; ++stage) {
    wait_until_empty(ring);
    ring.advance();
  }
}

// Each warp waits for its own share of the products, so each releases a stage by itself.
template <int kCluster>
MEMEFF_DEVICE void release_stage(const Ring<kCluster>& ring, int stage) {
  if (lane_index() >= kCluster) return;
  if constexpr (kCluster == 1)
    ptx::mbarrier_arrive(ring.empty(stage));
  else
    ptx::mbarrier_arrive_cluster(ptx::map_shared(ring.empty(stage), lane_index()));
}

// Warpgroup 1 is ahead. In every tile warpgroup 2 begins when the first has finished kStaggerSteps steps,
// so it also ends later: its last products fill the tensor cores while the first is in its epilogue,
// and the first's next ones while it is itself there. No products are lost by waiting: those of one
// group alone take half the time. Where the first is ahead already, the second does not wait.
//
// No deadlock: to finish those steps the first needs stages that both groups, in both blocks of a
// cluster, have released before this tile. kStaggerSteps + 1 <= kStages of them, as one is in flight when
// it arrives.
//
// Tiles of fewer steps than stages are left out, by both groups: across several of them the first
// could arrive twice before the second comes once. Otherwise it cannot: it arrives again kStages
// steps later at the earliest, in a stage that the second has released in between.
class Stagger {
 public:
  // Before the first step of a tile.
  MEMEFF_DEVICE explicit Stagger(int steps) {
    if (kStaggerSteps == 0 || steps < kStages) return;
    if (consumer_group() == 0)
      arrives_after_ = kStaggerSteps;
    else
      ptx::bar_sync(kStaggerBarrier, kConsumerGroups * kGroupThreads);
  }
  // The first `steps` of the tile's steps are finished, 1 at least.
  MEMEFF_DEVICE void finished(int steps) const {
    if (kStaggerSteps == 0 || steps != arrives_after_) return;
    ptx::bar_arrive(kStaggerBarrier, kConsumerGroups * kGroupThreads);
  }

 private:
  int arrives_after_ = 0;
};

// A consumer warpgroup: c = the product of the next `steps` stages. In the group's 64 x 256,
// accumulator i of a thread is
//   row 16 warp + lane / 4 + 8 (i / 2 % 2),  column 8 (i / 4) + 2 (lane % 4) + i % 2
template <class T, class A, class B, int kCluster>
MEMEFF_DEVICE void mainloop(float (&c)[kTileN / 2], Ring<kCluster>& ring, int steps) {
  // Zeroed here rather than by the first product: undefined registers that enter a loop make ptxas
  // keep a second copy of them, and spill it.
#pragma unroll
  for (float& x : c) x = 0.f;
  const int first_m = consumer_group() * kGroupM;
  int previous_stage = 0;
  const Stagger stagger(steps);
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ring.full(), ring.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int k16 = 0; k16 < kStepK / 16; ++k16)
      ptx::wgmma<kTileN, T, A::kTransposed, B::kTransposed>(
          c, A::descriptor(ring.tile(), first_m, k16),
          B::descriptor(ring.tile() + kOperandABytes, 0, k16), 1);
    ptx::wgmma_commit();
    if (step > 0) {
      ptx::wgmma_wait<1>();
      release_stage(ring, previous_stage);
      stagger.finished(step);
    }
    previous_stage = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::accumulators_are_ready(c);
  if (steps > 0) release_stage(ring, previous_stage);
}

// ---- which tile of C a block computes next ----

// What a cluster computes at a time, kCluster tiles one below the other, has a number; from first()
// on, every stride()-th below count() is this cluster's. They are numbered so that those computed
// at the same time form a compact patch: down kTilesPerGroup rows of tiles, then the next column.
// 132 blocks then read 16 tiles of A and about 8 of B at once (as many bytes of each), and A's stay
// in L2 until all columns are done.
template <int kCluster>
struct TileOrder {
  int rows, columns;  // of what a cluster computes at a time
  static constexpr int kTilesPerGroup = 16, kRowsPerGroup = kTilesPerGroup / kCluster;

  MEMEFF_DEVICE static int first() { return static_cast<int>(blockIdx.x) / kCluster; }
  MEMEFF_DEVICE static int stride() { return static_cast<int>(gridDim.x) / kCluster; }
  MEMEFF_DEVICE int count() const { return rows * columns; }

  // Place of this block's tile of C. In the last row there may be none left for it.
  MEMEFF_DEVICE void place(int number, int* row, int* column) const {
    const int group = number / (kRowsPerGroup * columns);
    const int first_row = group * kRowsPerGroup;
    const int height = rows - first_row < kRowsPerGroup ? rows - first_row : kRowsPerGroup;
    const int within = number - first_row * columns;
    *row = (first_row + within % height) * kCluster + rank_in_cluster<kCluster>();
    *column = within / height;
  }
};

inline int count_tiles(int64_t extent, int64_t tile) {
  return static_cast<int>((extent + tile - 1) / tile);
}

// The order of tiles of a C with `rows` rows, in columns of tiles.
template <int kCluster>
TileOrder<kCluster> tile_order(int64_t rows, int columns) {
  return {count_tiles(rows, kTileM * kCluster), columns};
}

// Prepares the launch of a persistent grid: as many blocks as run at the same time, one per SM (the
// shared memory of two does not fit), or fewer where there is less to do.
template <int kCluster, class Kernel>
Status persistent_blocks(Kernel kernel, const TileOrder<kCluster>& order, unsigned* blocks) {
  const Status status = allow_shared_memory(kernel, kSharedBytes);
  if (!status.ok()) return status;
#if defined(__CUDACC__)
  // A cluster's blocks run on SMs of one group; where groups have odd numbers of these, some SMs
  // stay idle, and blocks for them would wait for others to end.
  int clusters = 0;
  const ClusterLaunch launch(kCluster, dim3(kCluster), dim3(kThreads), kSharedBytes, nullptr);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, launch.config());
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
#else
  const int clusters = 2;  // few, so that every block computes several tiles
#endif
  const int64_t tiles = int64_t{order.rows} * order.columns;
  *blocks = static_cast<unsigned>(kCluster * std::min<int64_t>(clusters, tiles));
  return {};
}

// For a product that shares multiprocessors with another: enough blocks that one computes about
// kStepsPerBlock steps of k, some 75 us: the last ones end at about the same time, and starting them
// costs little. At least as many as run at the same time.
template <int kCluster>
unsigned blocks_that_share(unsigned at_a_time, const TileOrder<kCluster>& order, int64_t k) {
  constexpr int64_t kStepsPerBlock = 128;
  const int64_t tiles = int64_t{order.rows} * order.columns;  // of a cluster
  const int64_t each = std::max<int64_t>(1, kStepsPerBlock * kStepK / std::max<int64_t>(1, k));
  return std::max(at_a_time, static_cast<unsigned>(kCluster * ((tiles + each - 1) / each)));
}

template <class T>
constexpr TensorMapElement map_element() {
  return std::is_same_v<T, __nv_bfloat16> ? TensorMapElement::kBFloat16
                                          : TensorMapElement::kFloat16;
}

}  // namespace memeff::cuda::sm90
