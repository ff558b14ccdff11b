// Clusters of two blocks: a pipelined product whose second operand is loaded for both by multicast,
// with one flaw at a time; barriers of the cluster; who may still touch whose shared memory.
#include "emulator/check.h"
#include "emulator/more_ptx.cuh"
#include "emulator/product_case.h"

using namespace memeff;
using emulator::BufferAccess;
using emulator::Defect;
using emulator::expect_clean;
using emulator::GlobalBuffer;
using emulator::ProductCase;

namespace {

// ---- D[128,64] = A[128,K] B[64,K]^T: 64 rows per block; each block loads half of B for both ----

enum class Flaw {
  kNone,
  kNoInitFence,     // the other block's TMA may not see the initialised mbarrier
  kNoClusterStart,  // nor its threads: only the block has met
  kNoEmptyWait,     // tile refilled while in use
  kOwnEmptyOnly,    // the other block does not hear that its half of a tile is free
  kOneBlockCounts,  // the arrivals of one block suffice
  kOwnBytesOnly,    // what the other block loads is not announced
  kExitEarly,       // a block may end while the other still arrives in it
};

constexpr int kStages = 2, kTileK = ProductCase::kTileK, kSteps = ProductCase::kSteps;
constexpr int kTileBytes = 64 * kTileK * 2, kStageBytes = 2 * kTileBytes;

template <Flaw kFlaw>
__global__ void shared_product(const __grid_constant__ TensorMap a,
                               const __grid_constant__ TensorMap half_b, float* out) {
  MEMEFF_DYNAMIC_SHARED(tiles);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 2 * kStages);
  const uint32_t full = ptx::shared_address(mbarriers), empty = full + 8 * kStages;
  const int t = threadIdx.x, rank = static_cast<int>(ptx::cluster_rank());
  if (t == 0) {
    const bool one_block = kFlaw == Flaw::kOwnEmptyOnly || kFlaw == Flaw::kOneBlockCounts;
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, one_block ? 4 : 8);
    }
    if (kFlaw != Flaw::kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (kFlaw == Flaw::kNoClusterStart) {
    __syncthreads();
  } else {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  if (t >= 128) {  // producer
    if (t != 128) return;
    for (int step = 0; step < kSteps; ++step) {
      const int s = step % kStages, parity = step / kStages % 2;
      const uint32_t tile = ptx::shared_address(tiles) + s * kStageBytes;
      if (kFlaw != Flaw::kNoEmptyWait) ptx::mbarrier_wait(empty + 8 * s, parity ^ 1);
      const uint32_t not_announced = kFlaw == Flaw::kOwnBytesOnly ? kTileBytes / 2 : 0;
      ptx::mbarrier_arrive_expect_tx(full + 8 * s, kStageBytes - not_announced);
      ptx::tma_load_2d(tile, &a, step * kTileK, rank * 64, full + 8 * s);
      ptx::tma_load_2d_multicast(tile + kTileBytes + rank * kTileBytes / 2, &half_b, step * kTileK,
                                 rank * 32, full + 8 * s, 3);
    }
    for (int step = kSteps; kFlaw != Flaw::kExitEarly && step < kSteps + kStages; ++step)
      ptx::mbarrier_wait(empty + 8 * (step % kStages), step / kStages % 2 ^ 1);
    return;
  }

  float d[32];
  for (int step = 0; step < kSteps; ++step) {
    const int s = step % kStages, parity = step / kStages % 2;
    const uint32_t tile = ptx::shared_address(tiles) + s * kStageBytes;
    ptx::mbarrier_wait(full + 8 * s, parity);
    ptx::wgmma_fence();
    for (int k = 0; k < kTileK / 16; ++k)
      ptx::wgmma<64, __nv_bfloat16>(d, ptx::k_major_descriptor(tile + 32 * k),
                                    ptx::k_major_descriptor(tile + kTileBytes + 32 * k),
                                    step + k > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    if (kFlaw == Flaw::kOwnEmptyOnly) {
      if (t % 32 == 0) ptx::mbarrier_arrive(empty + 8 * s);
    } else if (t % 32 < 2) {
      ptx::mbarrier_arrive_cluster(ptx::map_shared(empty + 8 * s, t % 32));
    }
  }
  out += rank * 64 * 64;
  for (int i = 0; i < 32; ++i)
    out[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * 64 + t % 4 * 2 + i % 2 + i / 4 * 8] = d[i];
}

template <Flaw kFlaw>
void run_product(ProductCase& m) {
  float* const out = m.out.data();
  const TensorMap a = m.map_a, half_b = m.map_b;
  MEMEFF_LAUNCH_CLUSTERS(2, shared_product<kFlaw>, dim3(2), dim3(160), kStages * kStageBytes,
                         nullptr, a, half_b, out);
}

template <Flaw kFlaw>
void expect_flaw(const char* what, Defect defect, ProductCase& m) {
  emulator::expect_defect_at(what, defect, __FILE__, nullptr, [&] { run_product<kFlaw>(m); });
}

void test_pipeline() {
  ProductCase m(128, 32);  // each block loads half of B
  const GlobalBuffer guard_a(m.a.data(), m.a.size() * 2, "a", BufferAccess::kReadOnly);
  const GlobalBuffer guard_b(m.b.data(), m.b.size() * 2, "b", BufferAccess::kReadOnly);
  const GlobalBuffer guard_out(m.out.data(), m.out.size() * 4, "out");
  expect_clean("shared product", [&] {
    std::fill(m.out.begin(), m.out.end(), NAN);
    run_product<Flaw::kNone>(m);
    m.check();
  });
  expect_flaw<Flaw::kNoInitFence>("no init fence", Defect::kMissingProxyFence, m);
  emulator::expect_reports("cluster has not met", [&] { run_product<Flaw::kNoClusterStart>(m); });
  expect_flaw<Flaw::kNoEmptyWait>("no wait for a free tile", Defect::kSharedRace, m);
  expect_flaw<Flaw::kOwnEmptyOnly>("only the block itself frees a tile", Defect::kSharedRace, m);
  emulator::expect_reports("one block counts", [&] { run_product<Flaw::kOneBlockCounts>(m); });
  emulator::expect_reports("own bytes only", [&] { run_product<Flaw::kOwnBytesOnly>(m); });
  expect_flaw<Flaw::kExitEarly>("exit early", Defect::kExitedBlock, m);
}

// ---- barrier.cluster ----

int results[128];

enum class BarrierFlaw { kNone, kMissing, kArriveTwice, kNoArrival, kHalfWarp, kElsewhere };

// Each block reads what the other has written before the barrier. Some threads have left by then,
// and are not waited for.
template <BarrierFlaw kFlaw>
__global__ void exchange(int* out) {
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  const int t = threadIdx.x, rank = static_cast<int>(ptx::cluster_rank());
  if (t == 0) ptx::mbarrier_init(ptx::shared_address(mbarriers), 1);
  __syncthreads();
  if (t >= 32) return;
  out[rank * 32 + t] = 100 * rank + t;
  if (kFlaw == BarrierFlaw::kElsewhere && rank == 1)
    ptx::mbarrier_wait(ptx::shared_address(mbarriers), 0);
  if (kFlaw == BarrierFlaw::kHalfWarp && t >= 16) return;
  if (kFlaw != BarrierFlaw::kMissing) {
    if (kFlaw != BarrierFlaw::kNoArrival) ptx::cluster_arrive();
    if (kFlaw == BarrierFlaw::kArriveTwice) ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  out[64 + rank * 32 + t] = out[(rank ^ 1) * 32 + t];
}

void test_barrier() {
  const GlobalBuffer guard(results, sizeof results, "results");
  const auto run = [](auto kernel) {
    MEMEFF_LAUNCH_CLUSTERS(2, kernel, dim3(2), dim3(64), 0, nullptr, results);
  };
  expect_clean("exchange", [&] {
    run(exchange<BarrierFlaw::kNone>);
    for (int i = 0; i < 64; ++i) CHECK(results[64 + i] == 100 * (i < 32) + i % 32);
  });
  EXPECT_DEFECT("no barrier", kGlobalRace, nullptr, [&] { run(exchange<BarrierFlaw::kMissing>); });
  EXPECT_DEFECT("arrive twice", kBadArgument, nullptr,
                [&] { run(exchange<BarrierFlaw::kArriveTwice>); });
  EXPECT_DEFECT("no arrival", kBadArgument, nullptr,
                [&] { run(exchange<BarrierFlaw::kNoArrival>); });
  EXPECT_DEFECT("half a warp", kDivergence, nullptr,
                [&] { run(exchange<BarrierFlaw::kHalfWarp>); });
  EXPECT_DEFECT("one block waits elsewhere", kDeadlock, nullptr,
                [&] { run(exchange<BarrierFlaw::kElsewhere>); });
  // Two clusters are as foreign to each other as two blocks.
  EXPECT_DEFECT("two clusters", kGlobalRace, nullptr, [] {
    MEMEFF_LAUNCH_CLUSTERS(2, exchange<BarrierFlaw::kNone>, dim3(4), dim3(64), 0, nullptr, results);
  });
}

// ---- shared memory of a block that may have exited ----

enum class Stay { kForArrival, kForBarrier, kNot };

// Block 0 arrives in block 1.
template <Stay kStay>
__global__ void arrive_in_other(int* out) {
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  const uint32_t mbarrier = ptx::shared_address(mbarriers);
  const int t = threadIdx.x, rank = static_cast<int>(ptx::cluster_rank());
  if (t == 0) ptx::mbarrier_init(mbarrier, 1);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (rank == 0 && t == 0)
    ptx::mbarrier_arrive_cluster(ptx::map_shared(mbarrier, 1));  // planted: arrival
  if (rank == 1 && kStay == Stay::kForArrival) ptx::mbarrier_wait(mbarrier, 0);
  if (kStay == Stay::kForBarrier) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  out[rank * 32 + t] = t;
}

// Block 0 loads a tile for block 1.
template <bool kPlanted>
__global__ void load_for_other(const __grid_constant__ TensorMap map, int* out) {
  MEMEFF_DYNAMIC_SHARED(tile);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  const uint32_t full = ptx::shared_address(mbarriers);
  const int t = threadIdx.x, rank = static_cast<int>(ptx::cluster_rank());
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    if (rank == 1) ptx::mbarrier_arrive_expect_tx(full, 1024);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (rank == 0 && t == 0)
    ptx::tma_load_2d_multicast(ptx::shared_address(tile), &map, 0, 0, full, 2);  // planted: load
  if (rank == 0 || kPlanted) return;
  ptx::mbarrier_wait(full, 0);
  out[t] = reinterpret_cast<const int*>(tile)[t];
}

alignas(16) int source[8 * 32];

TensorMap source_map() {
  TensorMapLayout layout;
  layout.base = source;
  layout.element = TensorMapElement::kFloat32;
  layout.columns = layout.box_columns = 32;
  layout.rows = layout.box_rows = 8;
  layout.row_bytes = 128;
  layout.swizzle = false;
  TensorMap map;
  CHECK(make_tensor_map(layout, &map).ok());
  return map;
}

void test_exits() {
  const GlobalBuffer guard(results, sizeof results, "results");
  const GlobalBuffer guard_source(source, sizeof source, "source", BufferAccess::kReadOnly);
  const auto run = [](auto kernel) {
    MEMEFF_LAUNCH_CLUSTERS(2, kernel, dim3(2), dim3(32), 0, nullptr, results);
  };
  EXPECT_DEFECT("arrival in a block that does not wait", kExitedBlock, "arrival",
                [&] { run(arrive_in_other<Stay::kNot>); });
  expect_clean("arrival that is waited for", [&] { run(arrive_in_other<Stay::kForArrival>); });
  expect_clean("barrier before the end", [&] { run(arrive_in_other<Stay::kForBarrier>); });

  const TensorMap map = source_map();
  for (int i = 0; i < 256; ++i) source[i] = i * i;
  EXPECT_DEFECT("load for a block that does not wait", kExitedBlock, "load", [&] {
    MEMEFF_LAUNCH_CLUSTERS(2, load_for_other<true>, dim3(2), dim3(32), 1024, nullptr, map, results);
  });
  expect_clean("load for the other block", [&] {
    MEMEFF_LAUNCH_CLUSTERS(2, load_for_other<false>, dim3(2), dim3(32), 1024, nullptr, map,
                           results);
    for (int t = 0; t < 32; ++t) CHECK(results[t] == t * t);
  });
}

// ---- misuse of single instructions and launches ----

enum class Misuse { kNone, kNoSuchBlock, kMappedAsOwn, kMappedDestination, kMask };

template <Misuse kMisuse>
__global__ void misuse(const __grid_constant__ TensorMap map) {
  MEMEFF_DYNAMIC_SHARED(tile);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 2);
  const uint32_t full = ptx::shared_address(mbarriers), met = full + 8;
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(met, 2);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (t < static_cast<int>(ptx::cluster_size())) {
    const uint32_t mapped = ptx::map_shared(met, kMisuse == Misuse::kNoSuchBlock ? 2 : t);
    if (kMisuse == Misuse::kMappedAsOwn)
      ptx::mbarrier_arrive(mapped);
    else
      ptx::mbarrier_arrive_cluster(mapped);
  }
  if (t == 0) {
    ptx::mbarrier_arrive_expect_tx(full, 1024);
    const uint32_t own = 1u << ptx::cluster_rank();
    uint32_t to = ptx::shared_address(tile);
    if (kMisuse == Misuse::kMappedDestination) to = ptx::map_shared(to, 1);
    ptx::tma_load_2d_multicast(to, &map, 0, 0, full, kMisuse == Misuse::kMask ? own | 4 : own);
  }
  ptx::mbarrier_wait(full, 0);
  ptx::mbarrier_wait(met, 0);
}

void test_misuse() {
  const GlobalBuffer guard_source(source, sizeof source, "source", BufferAccess::kReadOnly);
  const TensorMap map = source_map();
  const auto run = [&](auto kernel, int cluster, unsigned blocks) {
    MEMEFF_LAUNCH_CLUSTERS(cluster, kernel, dim3(blocks), dim3(32), 1024, nullptr, map);
  };
  expect_clean("cluster", [&] { run(misuse<Misuse::kNone>, 2, 4); });
  EXPECT_DEFECT("no such block", kBadArgument, nullptr,
                [&] { run(misuse<Misuse::kNoSuchBlock>, 2, 2); });
  EXPECT_DEFECT("mapped address as an own one", kBadArgument, nullptr,
                [&] { run(misuse<Misuse::kMappedAsOwn>, 2, 2); });
  EXPECT_DEFECT("mapped address as destination", kOutOfBounds, nullptr,
                [&] { run(misuse<Misuse::kMappedDestination>, 2, 2); });
  EXPECT_DEFECT("multicast to no block", kBadArgument, nullptr,
                [&] { run(misuse<Misuse::kMask>, 2, 2); });
  EXPECT_DEFECT("half a cluster", kBadArgument, nullptr, [&] { run(misuse<Misuse::kNone>, 2, 3); });
  EXPECT_DEFECT("large cluster", kBadArgument, nullptr, [&] { run(misuse<Misuse::kNone>, 3, 3); });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_pipeline();
  test_barrier();
  test_exits();
  test_misuse();
  return emulator::finish("test_clusters");
}
