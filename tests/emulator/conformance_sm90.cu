// One kernel per primitive of sm90.cuh.
#include "cuda/ptx/sm90.cuh"
#include "emulator/conformance_run.cuh"
#include "emulator/wgmma_images.cuh"

namespace memeff::conformance {

namespace {

template <bool kTransposed>
__global__ void matrix_stores(const uint32_t* in, uint32_t* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  const int lane = threadIdx.x;
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = in[4 * lane + i];
  const uint32_t row = ptx::shared_address(bytes) + 16 * (lane * 5 % 32);
  if (kTransposed)
    ptx::stmatrix_x4_trans(row, r);
  else
    ptx::stmatrix_x4(row, r);
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    out[4 * lane + i] = reinterpret_cast<const uint32_t*>(bytes)[4 * lane + i];
}

// ---- TMA ----

// Where the tile starts in the tensor: partly outside on two sides, or inside.
constexpr int kTileColumn = -8, kTileRow = 20;

// Loads a tile and copies shared memory, bit by bit, to `out`.
__global__ void load_tile(const __grid_constant__ TensorMap map, uint32_t* out, int words) {
  MEMEFF_DYNAMIC_SHARED(tile);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  const uint32_t full = ptx::shared_address(mbarriers);
  const int t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&map);
  }
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(full, 4 * words);
      ptx::tma_load_2d(ptx::shared_address(tile), &map, round == 0 ? kTileColumn : 16,
                       round == 0 ? kTileRow : 3, full);
    }
    ptx::mbarrier_wait(full, round);
    for (int i = t; i < words; i += blockDim.x)
      out[round * words + i] = reinterpret_cast<const uint32_t*>(tile)[i];
    ptx::fence_proxy_async();
    __syncthreads();
  }
}

// Stores, or twice adds, a tile of small integers.
template <bool kAdd>
__global__ void store_tile(const __grid_constant__ TensorMap map, const uint32_t* in,
                           int elements) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  auto* tile = reinterpret_cast<float*>(bytes);
  const int t = threadIdx.x;
  for (int i = t; i < elements; i += blockDim.x) tile[i] = static_cast<float>(in[i] & 255);
  ptx::fence_proxy_async();
  __syncthreads();
  if (t != 0) return;
  for (int repeat = 0; repeat < (kAdd ? 2 : 1); ++repeat) {
    if (kAdd)
      ptx::tma_reduce_add_2d(&map, ptx::shared_address(bytes), kTileColumn, kTileRow);
    else
      ptx::tma_store_2d(&map, ptx::shared_address(bytes), kTileColumn, kTileRow);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
  ptx::bulk_wait<0>();
}

// A tensor of 24 rows in `memory`, and tiles of 128 bytes x 8 rows.
bool make_map(uint32_t* memory, TensorMapElement element, bool swizzle, TensorMap* map) {
  const bool wide = element == TensorMapElement::kFloat32;
  TensorMapLayout layout;
  layout.base = memory;
  layout.element = element;
  layout.columns = wide ? 72 : 144;
  layout.rows = 24;
  layout.row_bytes = 288;
  layout.box_columns = wide ? 32 : 64;
  layout.box_rows = 8;
  layout.swizzle = swizzle;
  return make_tensor_map(layout, map).ok();
}

template <TensorMapElement kElement, bool kSwizzle>
bool launch_load(const Case& c, uint32_t* in, uint32_t* out) {
  TensorMap map;
  if (!make_map(in, kElement, kSwizzle, &map)) return false;
  MEMEFF_LAUNCH(load_tile, dim3(1), dim3(c.threads), c.shared_bytes, nullptr, map, out, 256);
  return cuda::launch_status().ok();
}

template <bool kAdd>
bool launch_store(const Case& c, uint32_t* in, uint32_t* out) {
  TensorMap map;
  if (!make_map(out, TensorMapElement::kFloat32, false, &map)) return false;
  const uint32_t* input = in;
  MEMEFF_LAUNCH(store_tile<kAdd>, dim3(1), dim3(c.threads), c.shared_bytes, nullptr, map, input,
                256);
  return cuda::launch_status().ok();
}

// ---- clusters of two blocks ----

// Each block reads what the other wrote before the barrier.
__global__ void meet_in_cluster(const uint32_t* in, uint32_t* out) {
  const uint32_t t = threadIdx.x, rank = ptx::cluster_rank();
  out[rank * 64 + t] = in[t] + 16 * rank + ptx::cluster_size();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  out[128 + rank * 64 + t] = out[(rank ^ 1) * 64 + t];
}

bool launch_meeting(const Case& c, uint32_t* in, uint32_t* out) {
  const uint32_t* input = in;
  MEMEFF_LAUNCH_CLUSTERS(2, meet_in_cluster, dim3(2), dim3(c.threads), 0, nullptr, input, out);
  return cuda::launch_status().ok();
}

// Two tiles of 1024 bytes, each loaded by one block for both, twice: the second round waits until
// all threads of both blocks have said in both that they have read the first.
__global__ void share_tiles(const __grid_constant__ TensorMap map, uint32_t* out) {
  constexpr int kWordsOfTile = 256;
  MEMEFF_DYNAMIC_SHARED(tiles);
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 2);
  const uint32_t full = ptx::shared_address(mbarriers), empty = full + 8;
  const int t = threadIdx.x, rank = static_cast<int>(ptx::cluster_rank());
  if (t == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 2 * blockDim.x);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int round = 0; round < 2; ++round) {
    if (t == 0) {
      if (round == 1) ptx::mbarrier_wait(empty, 0);
      ptx::mbarrier_arrive_expect_tx(full, 2 * 4 * kWordsOfTile);
      ptx::tma_load_2d_multicast(ptx::shared_address(tiles) + rank * 4 * kWordsOfTile, &map,
                                 kTileColumn + 16 * round, 8 * rank + kTileRow - 9 * round, full,
                                 3);
    }
    ptx::mbarrier_wait(full, round);
    for (int i = t; i < 2 * kWordsOfTile; i += blockDim.x)
      out[(2 * round + rank) * 2 * kWordsOfTile + i] = reinterpret_cast<const uint32_t*>(tiles)[i];
    ptx::fence_proxy_async();
    for (uint32_t block = 0; block < 2; ++block)
      ptx::mbarrier_arrive_cluster(ptx::map_shared(empty, block));
  }
  ptx::mbarrier_wait(empty, 1);
}

bool launch_sharing(const Case& c, uint32_t* in, uint32_t* out) {
  TensorMap map;
  if (!make_map(in, TensorMapElement::kBFloat16, true, &map)) return false;
  MEMEFF_LAUNCH_CLUSTERS(2, share_tiles, dim3(2), dim3(c.threads), c.shared_bytes, nullptr, map,
                         out);
  return cuda::launch_status().ok();
}

// ---- wgmma ----

template <class Element, int kN, bool kATransposed, bool kBTransposed, bool kARegisters>
Case product_case(const char* name, Input input, Compare compare) {
  return {name,
          input,
          compare,
          128,
          8192 + 128 * kN,
          multiply_images<Element, kN, kATransposed, kBTransposed, kARegisters>,
          nullptr,
          run_case};
}

}  // namespace

std::vector<Case> MEMEFF_CASES(sm90)() {
  using Bf16 = __nv_bfloat16;
  using Fp16 = __half;
  constexpr auto words = Input::kWords, bf16 = Input::kBf16Integers, fp16 = Input::kFp16Integers;
  constexpr auto bits = Compare::kBits, floats = Compare::kFloats;
  constexpr auto kBf16 = TensorMapElement::kBFloat16, kFp32 = TensorMapElement::kFloat32;
  return {
      {"stmatrix", words, bits, 32, 512, matrix_stores<false>, nullptr, run_case},
      {"stmatrix .trans", words, bits, 32, 512, matrix_stores<true>, nullptr, run_case},
      {"TMA load bf16, swizzled", words, bits, 64, 1024, nullptr, launch_load<kBf16, true>,
       run_case},
      {"TMA load fp32, swizzled", words, bits, 64, 1024, nullptr, launch_load<kFp32, true>,
       run_case},
      {"TMA load fp32", words, bits, 64, 1024, nullptr, launch_load<kFp32, false>, run_case},
      {"TMA store", words, bits, 64, 1024, nullptr, launch_store<false>, run_case},
      {"TMA reduce add", words, bits, 64, 1024, nullptr, launch_store<true>, run_case},
      {"barrier.cluster", words, bits, 64, 0, nullptr, launch_meeting, run_case},
      {"TMA multicast, mapa, remote arrivals", words, bits, 64, 2048, nullptr, launch_sharing,
       run_case},
      product_case<Bf16, 64, false, false, false>("wgmma bf16 n64", bf16, bits),
      product_case<Bf16, 128, false, false, false>("wgmma bf16 n128", bf16, bits),
      product_case<Bf16, 256, false, false, false>("wgmma bf16 n256", bf16, bits),
      product_case<Bf16, 128, false, true, false>("wgmma bf16 n128, B MN-major", bf16, bits),
      product_case<Bf16, 128, true, false, false>("wgmma bf16 n128, A MN-major", bf16, bits),
      product_case<Bf16, 256, true, true, false>("wgmma bf16 n256, both MN-major", bf16, bits),
      product_case<Bf16, 64, false, false, true>("wgmma bf16 n64, A registers", bf16, bits),
      product_case<Bf16, 128, false, true, true>("wgmma bf16 n128, A registers, B MN-major", bf16,
                                                 bits),
      product_case<Bf16, 256, false, false, true>("wgmma bf16 n256, A registers", bf16, bits),
      product_case<Fp16, 64, false, false, false>("wgmma fp16 n64", fp16, bits),
      product_case<Fp16, 128, false, true, false>("wgmma fp16 n128, B MN-major", fp16, bits),
      product_case<Fp16, 256, false, false, true>("wgmma fp16 n256, A registers", fp16, bits),
      product_case<Bf16, 128, false, false, false>("wgmma bf16 n128, rounding", Input::kBf16Normal,
                                                   floats),
  };
}

}  // namespace memeff::conformance
