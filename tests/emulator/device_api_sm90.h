// The Hopper part of the emulator as device code sees it; see device_api.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memeff::emulator {

// ---- clusters ----
__attribute__((const)) std::uint32_t cluster_rank();
__attribute__((const)) std::uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
// The address in the cluster's shared memory of what lies at `address` in the block `rank`.
std::uint32_t map_shared(std::uint32_t address, std::uint32_t rank);

// ---- overlapping launches ----
void launch_dependents();
void wait_for_grid();

// ---- mbarrier ----
void mbarrier_init(std::uint32_t address, int count);
void mbarrier_inval(std::uint32_t address);
void mbarrier_arrive(std::uint32_t address);
void mbarrier_arrive_cluster(std::uint32_t cluster_address);  // of map_shared
void mbarrier_expect_tx(std::uint32_t address, std::uint32_t bytes, bool arrive);
void mbarrier_wait(std::uint32_t address, int parity);
bool mbarrier_test(std::uint32_t address, int parity);

// ---- proxies ----
void fence_mbarrier_init();
void fence_proxy_async();

// ---- bulk copies of two-dimensional tiles ----
struct TensorMap {
  unsigned char* base = nullptr;
  std::uint64_t columns = 0, rows = 0, row_bytes = 0;
  std::uint32_t box_columns = 0, box_rows = 0;
  std::uint32_t element_bytes = 0;
  std::uint32_t swizzle_bytes = 0;  // 0, 32, 64 or 128
};
void tma_load_2d(std::uint32_t destination, const TensorMap* map, int column, int row,
                 std::uint32_t mbarrier);
// To the blocks whose bits are set, at the same addresses in each.
void tma_load_2d_multicast(std::uint32_t destination, const TensorMap* map, int column, int row,
                           std::uint32_t mbarrier, std::uint32_t blocks);
void tma_store_2d(const TensorMap* map, std::uint32_t source, int column, int row, bool add);
void bulk_commit();
// At most `pending` groups are still reading shared memory, or (not `read_only`) still writing.
void bulk_wait(int pending, bool read_only);

// ---- warpgroup products ----
struct WgmmaShape {
  bool bf16 = true;                                 // else fp16
  int n = 0;                                        // columns of the product, a multiple of 8
  bool a_transposed = false, b_transposed = false;  // MN-major in shared memory
};
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
// D[64,n] += A[64,16] B[16,n]; `a_registers` null: A comes from shared memory.
void wgmma(const WgmmaShape& shape, float* d, std::uint64_t a_descriptor,
           const std::uint32_t* a_registers, std::uint64_t b_descriptor, bool accumulate);
void setmaxnreg(int registers, bool increase);

}  // namespace memeff::emulator
