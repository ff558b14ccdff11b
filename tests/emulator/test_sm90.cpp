// mbarrier, TMA and wgmma: a pipelined product with one flaw at a time, and each primitive by
// itself.
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

// ---- D[64,64] = A[64,K] B[64,K]^T: a producer fills a ring of tiles, a warpgroup multiplies ----

enum class Flaw {
  kNone,
  kNoInitFence,      // TMA may not see the initialised mbarrier
  kNoInitBarrier,    // other threads may not, either
  kNoFullWait,       // tile used before it has arrived
  kNoEmptyWait,      // tile refilled while in use
  kEmptyParity,      // waits for the wrong phase
  kTooFewBytes,      // of the two tiles of a stage, one is announced
  kTooManyArrivals,  // on the barrier of free tiles
  kNoWgmmaFence,
  kNoWgmmaWait,  // tile released before the product has read it
  kExitEarly,    // results never waited for
};

constexpr int kStages = 2, kTileK = ProductCase::kTileK;
constexpr int kTileBytes = 64 * kTileK * 2, kStageBytes = 2 * kTileBytes;

template <Flaw kFlaw>
__global__ void pipelined_product(const __grid_constant__ TensorMap a,
                                  const __grid_constant__ TensorMap b, float* out, int steps) {
  MEMEFF_DYNAMIC_SHARED(tiles);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 2 * kStages);
  const uint32_t full = ptx::shared_address(mbarriers), empty = full + 8 * kStages;
  const int t = threadIdx.x;
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, kFlaw == Flaw::kTooManyArrivals ? 3 : 4);
    }
    if (kFlaw != Flaw::kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (kFlaw != Flaw::kNoInitBarrier) __syncthreads();

  if (t >= 128) {  // producer
    if (t != 128) return;
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages, parity = step / kStages % 2;
      const uint32_t tile = ptx::shared_address(tiles) + s * kStageBytes;
      if (kFlaw != Flaw::kNoEmptyWait)
        ptx::mbarrier_wait(empty + 8 * s, kFlaw == Flaw::kEmptyParity ? parity : parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + 8 * s,
                                     kFlaw == Flaw::kTooFewBytes ? kTileBytes : kStageBytes);
      ptx::tma_load_2d(tile, &a, step * kTileK, 0, full + 8 * s);
      ptx::tma_load_2d(tile + kTileBytes, &b, step * kTileK, 0, full + 8 * s);
    }
    return;
  }

  float d[32];
  for (int step = 0; step < steps; ++step) {
    const int s = step % kStages, parity = step / kStages % 2;
    const uint32_t tile = ptx::shared_address(tiles) + s * kStageBytes;
    if (kFlaw != Flaw::kNoFullWait) ptx::mbarrier_wait(full + 8 * s, parity);
    if (kFlaw != Flaw::kNoWgmmaFence) ptx::wgmma_fence();
    for (int k = 0; k < kTileK / 16; ++k)
      ptx::wgmma<64, __nv_bfloat16>(d, ptx::k_major_descriptor(tile + 32 * k),
                                    ptx::k_major_descriptor(tile + kTileBytes + 32 * k),
                                    step + k > 0);
    ptx::wgmma_commit();
    const bool last = step + 1 == steps;
    if (kFlaw != Flaw::kNoWgmmaWait && !(kFlaw == Flaw::kExitEarly && last)) ptx::wgmma_wait<0>();
    if (t % 32 == 0) ptx::mbarrier_arrive(empty + 8 * s);
  }
  if (kFlaw == Flaw::kNoWgmmaWait) ptx::wgmma_wait<0>();
  for (int i = 0; i < 32; ++i)
    out[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * 64 + t % 4 * 2 + i % 2 + i / 4 * 8] = d[i];
}

template <Flaw kFlaw>
void run_product(ProductCase& m) {
  float* const out = m.out.data();
  const TensorMap a = m.map_a, b = m.map_b;
  MEMEFF_LAUNCH(pipelined_product<kFlaw>, dim3(1), dim3(160), kStages * kStageBytes, nullptr, a, b,
                out, ProductCase::kSteps);
}

template <Flaw kFlaw>
void expect_flaw(const char* what, Defect defect, ProductCase& m) {
  emulator::expect_defect_at(what, defect, __FILE__, nullptr, [&] { run_product<kFlaw>(m); });
}

void test_pipeline() {
  ProductCase m(64, 64);
  const GlobalBuffer guard_a(m.a.data(), m.a.size() * 2, "a", BufferAccess::kReadOnly);
  const GlobalBuffer guard_b(m.b.data(), m.b.size() * 2, "b", BufferAccess::kReadOnly);
  const GlobalBuffer guard_out(m.out.data(), m.out.size() * 4, "out");
  expect_clean("pipelined product", [&] {
    run_product<Flaw::kNone>(m);
    m.check();
  });
  expect_flaw<Flaw::kNoInitFence>("no init fence", Defect::kMissingProxyFence, m);
  emulator::expect_reports("no barrier after init", [&] { run_product<Flaw::kNoInitBarrier>(m); });
  expect_flaw<Flaw::kNoFullWait>("no wait for the tile", Defect::kSharedRace, m);
  expect_flaw<Flaw::kNoEmptyWait>("no wait for a free tile", Defect::kSharedRace, m);
  expect_flaw<Flaw::kEmptyParity>("wrong parity", Defect::kDeadlock, m);
  // The report says who waits for what: the first empty stage.
  run_product<Flaw::kEmptyParity>(m);
  const std::string wait = "mbarrier " + std::to_string(kStages) + ", wait for parity 0";
  CHECK(!emulator::reports().empty());
  for (const emulator::Report& report : emulator::reports())
    CHECK(report.message.find("block 0,0,0") != std::string::npos &&
          report.message.find(wait) != std::string::npos);
  emulator::clear_reports();
  emulator::expect_reports("too few bytes", [&] { run_product<Flaw::kTooFewBytes>(m); });
  expect_flaw<Flaw::kTooManyArrivals>("too many arrivals", Defect::kSharedRace, m);
  expect_flaw<Flaw::kNoWgmmaFence>("no wgmma.fence", Defect::kBadArgument, m);
  expect_flaw<Flaw::kNoWgmmaWait>("no wgmma wait", Defect::kSharedRace, m);
  expect_flaw<Flaw::kExitEarly>("exit early", Defect::kInFlightAtExit, m);
}

// ---- proxies: plain accesses against TMA and wgmma ----

template <bool kPlanted>
__global__ void product_of_stored_tile(float* out) {
  MEMEFF_DYNAMIC_SHARED(tile);
  const int t = threadIdx.x;
  for (int i = t; i < 4096; i += 128) reinterpret_cast<uint32_t*>(tile)[i] = 0x3f803f80u;  // ones
  if (!kPlanted) ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  const uint32_t base = ptx::shared_address(tile);
  ptx::wgmma_fence();
  ptx::wgmma<64, __nv_bfloat16>(d, ptx::k_major_descriptor(base),  // planted: no proxy fence
                                ptx::k_major_descriptor(base + 8192), 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[t] = d[t % 32];
}

// A tile read by plain loads is filled again.
template <bool kPlanted>
__global__ void refill(const __grid_constant__ TensorMap map, float* out) {
  MEMEFF_DYNAMIC_SHARED(tile);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  const uint32_t full = ptx::shared_address(mbarriers);
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(full, 4096);
      ptx::tma_load_2d(ptx::shared_address(tile), &map, 0, 8 * round, full);
    }
    ptx::mbarrier_wait(full, round);
    sum += reinterpret_cast<const float*>(tile)[t ^ 1];
    if (!kPlanted) ptx::fence_proxy_async();
    __syncthreads();
  }
  out[t] = sum;
}

// What TMA loads from is written.
template <bool kPlanted>
__global__ void overwrite_source(const __grid_constant__ TensorMap map, float* source) {
  MEMEFF_DYNAMIC_SHARED(tile);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  const uint32_t full = ptx::shared_address(mbarriers);
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, 1024);
    ptx::tma_load_2d(ptx::shared_address(tile), &map, 0, 0, full);
  }
  __syncthreads();
  if (!kPlanted) ptx::mbarrier_wait(full, 0);
  source[t] = 3;  // planted: source written too early
  ptx::mbarrier_wait(full, 0);
}

enum class StoreFlaw { kNone, kNoFence, kNoBarrier, kReusedTooEarly, kNeverWaited };

// out = or += 2 * in, through shared memory; two tiles one after the other in the same place.
template <StoreFlaw kFlaw, bool kAdd>
__global__ void store_tiles(const __grid_constant__ TensorMap map, const float* in) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  auto* tile = reinterpret_cast<float*>(bytes);
  const int t = threadIdx.x;
  for (int row = 0; row < 16; row += 8) {
    for (int i = t; i < 256; i += 32) tile[i] = 2 * in[row * 32 + i];
    if (kFlaw != StoreFlaw::kNoFence) ptx::fence_proxy_async();
    if (kFlaw != StoreFlaw::kNoBarrier) __syncthreads();
    if (t == 0) {
      if (kAdd)
        ptx::tma_reduce_add_2d(&map, ptx::shared_address(bytes), 0, row);
      else
        ptx::tma_store_2d(&map, ptx::shared_address(bytes), 0, row);
      ptx::bulk_commit();
      if (kFlaw != StoreFlaw::kReusedTooEarly && kFlaw != StoreFlaw::kNeverWaited)
        ptx::bulk_wait_read<0>();
    }
    __syncthreads();
  }
  if (t == 0 && kFlaw != StoreFlaw::kNeverWaited) ptx::bulk_wait<0>();
}

TensorMapLayout float_layout(float* data, int columns, int rows, int box_columns, int box_rows,
                             bool swizzle) {
  TensorMapLayout layout;
  layout.base = data;
  layout.element = TensorMapElement::kFloat32;
  layout.columns = columns;
  layout.rows = rows;
  layout.row_bytes = 4 * columns;
  layout.box_columns = box_columns;
  layout.box_rows = box_rows;
  layout.swizzle = swizzle;
  return layout;
}

TensorMap float_map(float* data, int columns, int rows, int box_columns, int box_rows,
                    bool swizzle) {
  TensorMap map;
  CHECK(make_tensor_map(float_layout(data, columns, rows, box_columns, box_rows, swizzle), &map)
            .ok());
  return map;
}

alignas(16) float in[16 * 32], stored[15 * 32], results[4096];

void test_proxies_and_stores() {
  const GlobalBuffer guard_in(in, sizeof in, "in", BufferAccess::kReadOnly);
  const GlobalBuffer guard_stored(stored, sizeof stored, "stored");
  const GlobalBuffer guard_results(results, sizeof results, "results");
  for (int i = 0; i < 512; ++i) in[i] = static_cast<float>(i + 1);

  EXPECT_DEFECT("stored tile", kMissingProxyFence, nullptr, [] {
    MEMEFF_LAUNCH(product_of_stored_tile<true>, dim3(1), dim3(128), 16384, nullptr, results);
  });
  expect_clean("stored tile", [] {
    MEMEFF_LAUNCH(product_of_stored_tile<false>, dim3(1), dim3(128), 16384, nullptr, results);
    CHECK(results[0] == 16.f && results[127] == 16.f);
  });

  const TensorMap source = float_map(in, 128, 4, 128, 8, false);
  EXPECT_DEFECT("refill", kMissingProxyFence, nullptr, [&] {
    MEMEFF_LAUNCH(refill<true>, dim3(1), dim3(32), 4096, nullptr, source, results);
  });
  expect_clean("refill", [&] {
    MEMEFF_LAUNCH(refill<false>, dim3(1), dim3(32), 4096, nullptr, source, results);
    for (int t = 0; t < 32; ++t) CHECK(results[t] == in[t ^ 1]);  // rows 8 to 15 are outside: zero
  });

  // The tensor has 15 rows, the two tiles 16: the last row must not be written.
  const TensorMap target = float_map(stored, 32, 15, 32, 8, false);
  EXPECT_DEFECT("overwritten source", kGlobalRace, "source written too early", [&] {
    MEMEFF_LAUNCH(overwrite_source<true>, dim3(1), dim3(32), 1024, nullptr, target, stored);
  });
  expect_clean("overwritten source", [&] {
    MEMEFF_LAUNCH(overwrite_source<false>, dim3(1), dim3(32), 1024, nullptr, target, stored);
    CHECK(stored[31] == 3);
  });
  const float* const from = in;
  const auto expect_store_flaw = [&](const char* what, Defect defect, auto kernel) {
    emulator::expect_defect_at(what, defect, __FILE__, nullptr, [&] {
      MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 1024, nullptr, target, from);
    });
  };
  expect_store_flaw("store without fence", Defect::kMissingProxyFence,
                    store_tiles<StoreFlaw::kNoFence, false>);
  expect_store_flaw("store without barrier", Defect::kSharedRace,
                    store_tiles<StoreFlaw::kNoBarrier, false>);
  expect_store_flaw("tile reused too early", Defect::kSharedRace,
                    store_tiles<StoreFlaw::kReusedTooEarly, false>);
  expect_store_flaw("store never waited for", Defect::kInFlightAtExit,
                    store_tiles<StoreFlaw::kNeverWaited, false>);
  expect_clean("stores", [&] {
    constexpr auto kernel = store_tiles<StoreFlaw::kNone, false>;
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 1024, nullptr, target, from);
    for (int i = 0; i < 15 * 32; ++i) CHECK(stored[i] == 2 * in[i]);
  });
  // Rows of 30 floats end inside 16 bytes, the rest of which is written, too.
  TensorMapLayout odd = float_layout(stored, 32, 15, 32, 8, false);
  odd.columns = 30;
  TensorMap odd_rows;
  CHECK(make_tensor_map(odd, &odd_rows).ok());
  expect_clean("rows that end inside 16 bytes", [&] {
    constexpr auto kernel = store_tiles<StoreFlaw::kNone, false>;
    std::fill(stored, stored + 15 * 32, 1.f);
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 1024, nullptr, odd_rows, from);
    for (int i = 0; i < 15 * 32; ++i) CHECK(stored[i] == 2 * in[i]);
  });
  emulator::unregister_buffer(stored);
  emulator::register_buffer(stored, sizeof stored - 8, "rows of 30", BufferAccess::kReadWrite);
  EXPECT_DEFECT("memory ends with the last row", kOutOfBounds, nullptr, [&] {
    constexpr auto kernel = store_tiles<StoreFlaw::kNone, false>;
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 1024, nullptr, odd_rows, from);
  });
  emulator::unregister_buffer(stored);
  emulator::register_buffer(stored, sizeof stored, "stored", BufferAccess::kReadWrite);
  // Reductions of several blocks add up, and are no race; plain stores of several blocks are one.
  expect_clean("reductions", [&] {
    constexpr auto kernel = store_tiles<StoreFlaw::kNone, true>;
    std::fill(stored, stored + 15 * 32, 1.f);
    MEMEFF_LAUNCH(kernel, dim3(3), dim3(32), 1024, nullptr, target, from);
    for (int i = 0; i < 15 * 32; ++i) CHECK(stored[i] == 1 + 6 * in[i]);
  });
  EXPECT_DEFECT("blocks store the same tile", kGlobalRace, nullptr, [&] {
    constexpr auto kernel = store_tiles<StoreFlaw::kNone, false>;
    MEMEFF_LAUNCH(kernel, dim3(2), dim3(32), 1024, nullptr, target, from);
  });
}

// ---- misuse of single instructions ----

enum class Misuse {
  kNone,
  kUninitialised,
  kTwice,
  kPlainAccess,
  kNotVisible,
  kOverflow,
};

template <Misuse kMisuse>
__global__ void misuse_mbarrier(int* out) {
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 2);
  const uint32_t address = ptx::shared_address(mbarriers);
  const int t = threadIdx.x;
  if (t == 0 && kMisuse != Misuse::kUninitialised) {
    ptx::mbarrier_init(address, kMisuse == Misuse::kOverflow ? 31 : 32);
    if (kMisuse == Misuse::kTwice) ptx::mbarrier_init(address, 32);
    // Bytes that never come keep the phase open.
    if (kMisuse == Misuse::kOverflow) ptx::mbarrier_expect_tx(address, 16);
  }
  if (kMisuse == Misuse::kNotVisible) {
    if (t == 0) ptx::mbarrier_arrive(address);
    if (t == 1) ptx::mbarrier_arrive(address);
    return;
  }
  __syncwarp();
  if (kMisuse == Misuse::kPlainAccess && t == 5) out[0] = static_cast<int>(mbarriers[0]);
  ptx::mbarrier_arrive(address);
  if (kMisuse != Misuse::kOverflow) ptx::mbarrier_wait(address, 0);
  out[t] = ptx::mbarrier_test(address, 0) ? 1 : 0;
  __syncwarp();
  if (t == 0) ptx::mbarrier_inval(address);
}

// The threads of a warpgroup must issue one and the same product.
template <bool kPlanted>
__global__ void diverging_products(float* out) {
  MEMEFF_DYNAMIC_SHARED(tile);
  const int t = threadIdx.x;
  for (int i = t; i < 4096; i += 128) reinterpret_cast<uint32_t*>(tile)[i] = 0;
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t base = ptx::shared_address(tile) + (kPlanted && t >= 64 ? 32 : 0);
  float d[32];
  ptx::wgmma_fence();
  ptx::wgmma<64, __nv_bfloat16>(d, ptx::k_major_descriptor(base), ptx::k_major_descriptor(base), 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[t] = d[0];
}

// Reads an accumulator while the product is in flight.
__global__ void early_accumulator(float* out) {
  MEMEFF_DYNAMIC_SHARED(tile);
  const int t = threadIdx.x;
  for (int i = t; i < 4096; i += 128) reinterpret_cast<uint32_t*>(tile)[i] = 0;
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t base = ptx::shared_address(tile);
  float d[32];
  ptx::wgmma_fence();
  ptx::wgmma<64, __nv_bfloat16>(d, ptx::k_major_descriptor(base), ptx::k_major_descriptor(base), 0);
  ptx::wgmma_commit();
  out[t] = d[0];
  ptx::wgmma_wait<0>();
  out[128 + t] = d[0];
}

// The next fragment of A is written over one that a product may still read.
template <bool kPlanted>
__global__ void early_fragment(float* out) {
  MEMEFF_DYNAMIC_SHARED(tile);
  const int t = threadIdx.x;
  for (int i = t; i < 4096; i += 128) reinterpret_cast<uint32_t*>(tile)[i] = 0x3f803f80u;  // ones
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t b = ptx::k_major_descriptor(ptx::shared_address(tile));
  float d[32];
  uint32_t a[4] = {};
  for (int i = 0; i < 2; ++i) {
    for (uint32_t& pair : a) pair = i == 0 ? 0x3f803f80u : 0x40004000u;  // ones, then twos
    ptx::wgmma_fence();
    ptx::wgmma_a_registers<64, __nv_bfloat16>(d, a, b, i);
    ptx::wgmma_commit();
    if (!kPlanted) ptx::wgmma_wait<0>();
  }
  ptx::wgmma_wait<0>();
  out[t] = d[t % 32];
}

__global__ void load_tile_at(const __grid_constant__ TensorMap map, int offset, uint32_t bytes) {
  MEMEFF_DYNAMIC_SHARED(tile);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  const uint32_t full = ptx::shared_address(mbarriers);
  ptx::mbarrier_init(full, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(full, bytes);
  ptx::tma_load_2d(ptx::shared_address(tile) + offset, &map, 0, 0, full);
  ptx::mbarrier_wait(full, 0);
}

void test_misuse() {
  const GlobalBuffer guard_in(in, sizeof in, "in", BufferAccess::kReadOnly);
  const GlobalBuffer guard_results(results, sizeof results, "results");
  int* const flags = reinterpret_cast<int*>(results);
  const auto expect_misuse = [&](const char* what, Defect defect, auto kernel) {
    emulator::expect_defect_at(what, defect, __FILE__, nullptr, [&] {
      MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, flags);
    });
  };
  expect_misuse("uninitialised mbarrier", Defect::kBadArgument,
                misuse_mbarrier<Misuse::kUninitialised>);
  expect_misuse("mbarrier initialised twice", Defect::kBadArgument,
                misuse_mbarrier<Misuse::kTwice>);
  expect_misuse("more arrivals than the count", Defect::kBadArgument,
                misuse_mbarrier<Misuse::kOverflow>);
  expect_misuse("plain access", Defect::kBadArgument, misuse_mbarrier<Misuse::kPlainAccess>);
  emulator::expect_reports("init not visible", [&] {
    constexpr auto kernel = misuse_mbarrier<Misuse::kNotVisible>;
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, flags);
  });
  expect_clean("mbarrier", [&] {
    constexpr auto kernel = misuse_mbarrier<Misuse::kNone>;
    MEMEFF_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, flags);
    for (int t = 0; t < 32; ++t) CHECK(flags[t] == 1);
  });

  EXPECT_DEFECT("diverging products", kDivergence, nullptr, [] {
    MEMEFF_LAUNCH(diverging_products<true>, dim3(1), dim3(128), 16384, nullptr, results);
  });
  expect_clean("uniform products", [] {
    MEMEFF_LAUNCH(diverging_products<false>, dim3(1), dim3(128), 16384, nullptr, results);
  });
  expect_clean("accumulators in flight are NaN", [] {
    MEMEFF_LAUNCH(early_accumulator, dim3(1), dim3(128), 16384, nullptr, results);
    for (int t = 0; t < 128; ++t) CHECK(results[t] != results[t] && results[128 + t] == 0.f);
  });

  EXPECT_DEFECT("fragment changed too early", kBadArgument, nullptr, [] {
    MEMEFF_LAUNCH(early_fragment<true>, dim3(1), dim3(128), 16384, nullptr, results);
  });
  expect_clean("fragments", [] {
    MEMEFF_LAUNCH(early_fragment<false>, dim3(1), dim3(128), 16384, nullptr, results);
    CHECK(results[0] == 48.f && results[127] == 48.f);
  });

  const TensorMap swizzled = float_map(in, 32, 16, 32, 8, true);
  const auto load = [](const TensorMap& map, int offset) {
    const uint32_t bytes = map.box_columns * map.box_rows * map.element_bytes;
    MEMEFF_LAUNCH(load_tile_at, dim3(1), dim3(1), 8192, nullptr, map, offset, bytes);
  };
  expect_clean("load", [&] { load(swizzled, 1024); });
  EXPECT_DEFECT("misplaced tile", kBadArgument, nullptr, [&] { load(swizzled, 128); });
  EXPECT_DEFECT("tile out of shared memory", kOutOfBounds, nullptr, [&] { load(swizzled, 8192); });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_pipeline();
  test_proxies_and_stores();
  test_misuse();
  return emulator::finish("test_sm90");
}
