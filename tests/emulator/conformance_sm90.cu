// One kernel per primitive of sm90.cuh.
#include "emulator/conformance_run.cuh"
#include "emulator/more_ptx.cuh"
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

// Where a tile starts in the tensor: partly outside to the left and below, or to the right, where
// the tensor ends inside 16 bytes.
constexpr int kTileColumn = -8, kTileRow = 20;
constexpr int kRightRow = 3;
constexpr int right_column(TensorMapElement element) {
  return element == TensorMapElement::kFloat32 ? 48 : 96;
}

// Loads a tile and copies shared memory, bit by bit, to `out`.
__global__ void load_tile(const __grid_constant__ TensorMap map, uint32_t* out, int words,
                          int right) {
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
      ptx::tma_load_2d(ptx::shared_address(tile), &map, round == 0 ? kTileColumn : right,
                       round == 0 ? kTileRow : kRightRow, full);
    }
    ptx::mbarrier_wait(full, round);
    for (int i = t; i < words; i += blockDim.x)
      out[round * words + i] = reinterpret_cast<const uint32_t*>(tile)[i];
    ptx::fence_proxy_async();
    __syncthreads();
  }
}

// Stores a tile of 256 words in two places: random bits, or small integers as floats, which are
// stored or added twice.
enum class Store { kBits, kFloats, kSums };

template <Store kStore>
__global__ void store_tile(const __grid_constant__ TensorMap map, const uint32_t* in, int right) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += blockDim.x) {
    const uint32_t number = __float_as_uint(static_cast<float>(in[i] & 255));
    reinterpret_cast<uint32_t*>(bytes)[i] = kStore == Store::kBits ? in[i] : number;
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (t != 0) return;
  for (int repeat = 0; repeat < (kStore == Store::kSums ? 4 : 2); ++repeat) {
    const bool left = repeat % 2 == 0;
    const int column = left ? kTileColumn : right, row = left ? kTileRow : kRightRow;
    if (kStore == Store::kSums)
      ptx::tma_reduce_add_2d(&map, ptx::shared_address(bytes), column, row);
    else
      ptx::tma_store_2d(&map, ptx::shared_address(bytes), column, row);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
  ptx::bulk_wait<0>();
}

// A tensor of `rows` rows in `memory`, and tiles of 128 bytes x `box_rows` rows. Rows start at
// multiples of 16 bytes, and end anywhere.
Status make_map(uint32_t* memory, TensorMapElement element, bool swizzle, TensorMap* map,
                int rows = 24, int box_rows = 8) {
  const bool wide = element == TensorMapElement::kFloat32;
  TensorMapLayout layout;
  layout.base = memory;
  layout.element = element;
  layout.columns = wide ? 71 : 139;
  layout.rows = static_cast<uint64_t>(rows);
  layout.row_bytes = 288;
  layout.box_columns = wide ? 32 : 64;
  layout.box_rows = static_cast<uint32_t>(box_rows);
  layout.swizzle = swizzle;
  return make_tensor_map(layout, map);
}

template <TensorMapElement kElement, bool kSwizzle, int kRows = 24, int kBoxRows = 8>
Status launch_load(const Case& c, uint32_t* in, uint32_t* out) {
  TensorMap map;
  const Status made = make_map(in, kElement, kSwizzle, &map, kRows, kBoxRows);
  if (!made.ok()) return made;
  MEMEFF_LAUNCH(load_tile, dim3(1), dim3(c.threads), c.shared_bytes, nullptr, map, out,
                kBoxRows * 32, right_column(kElement));
  return cuda::launch_status();
}

template <Store kStore, TensorMapElement kElement, bool kSwizzle>
Status launch_store(const Case& c, uint32_t* in, uint32_t* out) {
  TensorMap map;
  const Status made = make_map(out, kElement, kSwizzle, &map);
  if (!made.ok()) return made;
  const uint32_t* input = in;
  MEMEFF_LAUNCH(store_tile<kStore>, dim3(1), dim3(c.threads), c.shared_bytes, nullptr, map, input,
                right_column(kElement));
  return cuda::launch_status();
}

// ---- mbarriers without TMA: bytes and arrivals, both phases, once more from the start ----

__global__ void phases(const uint32_t* in, uint32_t* out) {
  MEMEFF_SHARED_ARRAY(uint64_t, mbarriers, 1);
  MEMEFF_SHARED_ARRAY(uint32_t, message, 64);
  const uint32_t mbarrier = ptx::shared_address(mbarriers);
  const int t = threadIdx.x;
  for (int life = 0; life < 2; ++life) {
    if (t == 0) {
      ptx::mbarrier_init(mbarrier, 64);
      out[8 * life] = ptx::mbarrier_test(mbarrier, 1) ? 1 : 0;  // what came before is over
      out[8 * life + 1] = ptx::mbarrier_test(mbarrier, 0) ? 1 : 0;
      ptx::mbarrier_expect_tx(mbarrier, 0);
    }
    __syncthreads();
    for (int phase = 0; phase < 3; ++phase) {
      message[t] = in[64 * phase + t];
      ptx::mbarrier_arrive(mbarrier);
      ptx::mbarrier_wait(mbarrier, phase % 2);
      out[64 + (life * 3 + phase) * 64 + t] = message[63 - t];
      __syncthreads();
    }
    if (t == 0) ptx::mbarrier_inval(mbarrier);
    __syncthreads();
  }
}

// ---- registers that move from one warpgroup to two others ----

// As the pipeline of sm90/ has it: consumers hold more numbers than a thread has registers at launch.
__global__ void __launch_bounds__(384, 1) move_registers(const uint32_t* in, uint32_t* out) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int t = threadIdx.x;
  if (t < 128) {
    ptx::decrease_registers<40>();
    return;
  }
  ptx::increase_registers<232>();
  constexpr int kHeld = 192;
  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = static_cast<float>(in[(t * 7 + i * 61) % kWords] & 255);
  ptx::accumulators_are_ready(held);  // all of them at once
#pragma unroll
  for (int i = 0; i < 64; ++i)
    out[(t - 128) * 64 + i] = __float_as_uint(held[i] + held[i + 64] * 256.f + held[i + 128]);
#endif
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

Status launch_meeting(const Case& c, uint32_t* in, uint32_t* out) {
  const uint32_t* input = in;
  MEMEFF_LAUNCH_CLUSTERS(2, meet_in_cluster, dim3(2), dim3(c.threads), 0, nullptr, input, out);
  return cuda::launch_status();
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

Status launch_sharing(const Case& c, uint32_t* in, uint32_t* out) {
  TensorMap map;
  const Status made = make_map(in, TensorMapElement::kBFloat16, true, &map);
  if (!made.ok()) return made;
  MEMEFF_LAUNCH_CLUSTERS(2, share_tiles, dim3(2), dim3(c.threads), c.shared_bytes, nullptr, map,
                         out);
  return cuda::launch_status();
}

// ---- griddepcontrol: grids that overlap ----

constexpr unsigned kGridBlocks = 4, kGridWords = kGridBlocks * 64;  // words that a grid writes

MEMEFF_DEVICE int word_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// The first grid: writes some words before it lets the next begin, and others long after.
__global__ void let_next_begin(const uint32_t* in, uint32_t* out) {
  const int i = word_of_grid();
  out[i] = in[i] + 1;
  ptx::launch_dependents();
#if defined(__CUDACC__)
  for (int microseconds = 0; microseconds < 50; ++microseconds) __nanosleep(1000);
#endif
  out[kGridWords + i] = in[kGridWords + i] + 2;
}

// The second: writes what is its own at once. All of its threads wait for the first grid and read what
// that has written; or its last block alone waits, and nothing is read.
template <bool kAllWait>
__global__ void begin_early(const uint32_t* in, uint32_t* out) {
  const int i = word_of_grid();
  out[2 * kGridWords + i] = in[2 * kGridWords + i] + 3;
  if (kAllWait || blockIdx.x + 1 == gridDim.x) ptx::wait_for_grid();
  if (!kAllWait) return;
  const int other = (i * 7 + 3) % static_cast<int>(kGridWords);
  out[3 * kGridWords + i] = out[other] * 5 + out[kGridWords + other];
}

// The third, in plain order after both.
__global__ void come_last(const uint32_t*, uint32_t* out) {
  const int i = word_of_grid(), other = (i * 11 + 5) % static_cast<int>(kGridWords);
  out[4 * kGridWords + i] =
      (out[other] * 5 + out[kGridWords + other]) * 5 + out[2 * kGridWords + other];
}

template <bool kAllWait>
Status launch_overlapping(const Case& c, uint32_t* in, uint32_t* out) {
  const dim3 grid(kGridBlocks), block(c.threads);
  const uint32_t* input = in;
  MEMEFF_LAUNCH_OVERLAPPED(false, 1, let_next_begin, grid, block, 0, nullptr, input, out);
  MEMEFF_LAUNCH_OVERLAPPED(true, 1, begin_early<kAllWait>, grid, block, 0, nullptr, input, out);
  MEMEFF_LAUNCH(come_last, grid, block, 0, nullptr, input, out);
  return cuda::launch_status();
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
  constexpr auto kBf16 = TensorMapElement::kBFloat16, kFp16 = TensorMapElement::kFloat16,
                 kFp32 = TensorMapElement::kFloat32;
  constexpr auto in_managed = run_case<true>;
  return {
      {"stmatrix", words, bits, 32, 512, matrix_stores<false>, nullptr, run_case},
      {"stmatrix .trans", words, bits, 32, 512, matrix_stores<true>, nullptr, run_case},
      {"mbarrier", words, bits, 64, 0, phases, nullptr, run_case},
      {"setmaxnreg", words, bits, 384, 0, move_registers, nullptr, run_case},
      {"TMA load bf16, swizzled", words, bits, 64, 1024, nullptr, launch_load<kBf16, true>,
       run_case},
      {"TMA load fp16, swizzled", words, bits, 64, 1024, nullptr, launch_load<kFp16, true>,
       run_case},
      {"TMA load bf16, swizzled, 256 rows", words, bits, 64, 32768, nullptr,
       launch_load<kBf16, true, 220, 256>, run_case},
      {"TMA load fp32, swizzled", words, bits, 64, 1024, nullptr, launch_load<kFp32, true>,
       run_case},
      {"TMA load fp32", words, bits, 64, 1024, nullptr, launch_load<kFp32, false>, run_case},
      {"TMA store fp32", words, bits, 64, 1024, nullptr, launch_store<Store::kFloats, kFp32, false>,
       run_case},
      {"TMA store fp32, swizzled", words, bits, 64, 1024, nullptr,
       launch_store<Store::kFloats, kFp32, true>, run_case},
      {"TMA store bf16, swizzled", words, bits, 64, 1024, nullptr,
       launch_store<Store::kBits, kBf16, true>, run_case},
      {"TMA store fp16, swizzled", words, bits, 64, 1024, nullptr,
       launch_store<Store::kBits, kFp16, true>, run_case},
      {"TMA reduce add fp32", words, bits, 64, 1024, nullptr,
       launch_store<Store::kSums, kFp32, false>, run_case},
      {"TMA reduce add fp32, swizzled", words, bits, 64, 1024, nullptr,
       launch_store<Store::kSums, kFp32, true>, run_case},
      {"TMA load bf16, managed memory", words, bits, 64, 1024, nullptr, launch_load<kBf16, true>,
       in_managed},
      {"TMA store bf16, managed memory", words, bits, 64, 1024, nullptr,
       launch_store<Store::kBits, kBf16, true>, in_managed},
      {"TMA reduce add fp32, managed memory", words, bits, 64, 1024, nullptr,
       launch_store<Store::kSums, kFp32, true>, in_managed},
      {"barrier.cluster", words, bits, 64, 0, nullptr, launch_meeting, run_case},
      {"griddepcontrol, all blocks wait", words, bits, 64, 0, nullptr, launch_overlapping<true>,
       run_case},
      {"griddepcontrol, the last block waits", words, bits, 64, 0, nullptr,
       launch_overlapping<false>, run_case},
      {"TMA multicast, mapa, remote arrivals", words, bits, 64, 2048, nullptr, launch_sharing,
       run_case},
      // What the kernels multiply with.
      product_case<Bf16, 256, false, false, false>("wgmma bf16 n256", bf16, bits),
      product_case<Fp16, 256, false, false, false>("wgmma fp16 n256", fp16, bits),
      product_case<Bf16, 256, false, true, false>("wgmma bf16 n256, B MN-major", bf16, bits),
      product_case<Fp16, 256, false, true, false>("wgmma fp16 n256, B MN-major", fp16, bits),
      product_case<Bf16, 256, true, true, false>("wgmma bf16 n256, both MN-major", bf16, bits),
      product_case<Fp16, 256, true, true, false>("wgmma fp16 n256, both MN-major", fp16, bits),
      product_case<Bf16, 256, false, true, true>("wgmma bf16 n256, A registers, B MN-major", bf16,
                                                 bits),
      product_case<Fp16, 256, false, true, true>("wgmma fp16 n256, A registers, B MN-major", fp16,
                                                 bits),
      product_case<Bf16, 256, false, false, false>("wgmma bf16 n256, rounding", Input::kBf16Normal,
                                                   floats),
      product_case<Fp16, 256, false, true, true>("wgmma fp16 n256, A registers, rounding",
                                                 Input::kFp16Normal, floats),
      // The other forms.
      product_case<Bf16, 64, false, false, false>("wgmma bf16 n64", bf16, bits),
      product_case<Bf16, 128, false, false, false>("wgmma bf16 n128", bf16, bits),
      product_case<Bf16, 128, false, true, false>("wgmma bf16 n128, B MN-major", bf16, bits),
      product_case<Bf16, 128, true, false, false>("wgmma bf16 n128, A MN-major", bf16, bits),
      product_case<Bf16, 64, false, false, true>("wgmma bf16 n64, A registers", bf16, bits),
      product_case<Bf16, 128, false, true, true>("wgmma bf16 n128, A registers, B MN-major", bf16,
                                                 bits),
      product_case<Bf16, 256, false, false, true>("wgmma bf16 n256, A registers", bf16, bits),
      product_case<Fp16, 64, false, false, false>("wgmma fp16 n64", fp16, bits),
      product_case<Fp16, 128, false, true, false>("wgmma fp16 n128, B MN-major", fp16, bits),
      product_case<Fp16, 256, false, false, true>("wgmma fp16 n256, A registers", fp16, bits),
  };
}

}  // namespace memeff::conformance
