// One kernel per primitive of sm80.cuh, and per warp function whose emulation is not obvious.
#include "emulator/conformance_run.cuh"
#include "emulator/more_ptx.cuh"

namespace memeff::conformance {

namespace {

// ---- warp functions ----

__global__ void shuffles(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  const uint32_t x = in[lane];
  out[lane] = __shfl_sync(~0u, x, lane * 7 + 3, 8);
  out[32 + lane] = __shfl_up_sync(~0u, x, 3, 16);
  out[64 + lane] = __shfl_down_sync(~0u, x, 5, 16);
  out[96 + lane] = __shfl_xor_sync(~0u, x, 9);
  out[128 + lane] = __shfl_xor_sync(~0u, x, 12, 8);
  out[160 + lane] = __shfl_sync(~0u, x, lane - 40);
}

__global__ void votes(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  out[lane] = __ballot_sync(~0u, static_cast<int>(in[lane] & 1));
  out[32 + lane] = static_cast<uint32_t>(__any_sync(~0u, (in[lane] & 63) == 0) != 0);
  out[64 + lane] = static_cast<uint32_t>(__all_sync(~0u, (in[lane] & 63) != 0) != 0);
  out[96 + lane] = __match_any_sync(~0u, in[lane] & 3);
}

__global__ void exponentials(const uint32_t* in, uint32_t* out) {
  const float x = static_cast<float>(in[threadIdx.x] % 4096) / 64.f - 40.f;
  out[threadIdx.x] = __float_as_uint(ptx::exp2_approximate(x));
}

__global__ void minima(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = ptx::min_of_halves(in[threadIdx.x], 0x3c00bc00u);  // random bits: also NaN
}

__global__ void maxima(const uint32_t* in, uint32_t* out) {
  const uint32_t nan = threadIdx.x % 4 == 0 ? 0x7fc00000u : 0;
  const float x = __uint_as_float(in[threadIdx.x]);
  out[threadIdx.x] =
      __float_as_uint(ptx::max_or_nan(x, __uint_as_float(in[threadIdx.x ^ 1] | nan)));
}

// Two warps in every combination of arriving and waiting.
__global__ void named_barriers(const uint32_t* in, uint32_t* out) {
  MEMEFF_SHARED_ARRAY(uint32_t, message, 64);
  const int t = threadIdx.x;
  if (t < 32) {
    message[t] = in[t];
    ptx::bar_arrive(1, 64);
    ptx::bar_sync(2, 64);
    out[t] = message[32 + t];
  } else {
    ptx::bar_sync(1, 64);
    out[t] = message[t - 32];
    message[t] = in[t] + 1;
    ptx::bar_arrive(2, 64);
  }
}

// ---- asynchronous copies ----

__global__ void copies_of_16(const uint32_t* in, uint32_t* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  const int t = threadIdx.x;
  const auto* words = reinterpret_cast<const uint32_t*>(bytes);
  ptx::cp_async_16(ptx::shared_address(bytes) + 16 * t, in + 4 * t, t % 17);
  ptx::cp_async_commit();
  ptx::cp_async_16(ptx::shared_address(bytes) + 1024 + 16 * t, in + 512 + 4 * t);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = words[4 * (63 - t) + i];
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[256 + 4 * t + i] = words[256 + 4 * (63 - t) + i];
}

template <int kBytes>
__global__ void narrow_copies(const uint32_t* in, uint32_t* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  const int t = threadIdx.x;
  ptx::cp_async_narrow<kBytes>(ptx::shared_address(bytes) + kBytes * t, in + kBytes / 4 * (t + 1),
                               t % (kBytes + 1));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < kBytes / 4; ++i)
    out[kBytes / 4 * t + i] = reinterpret_cast<const uint32_t*>(bytes)[kBytes / 4 * t + i];
}

// ---- matrix loads ----

MEMEFF_DEVICE void fill_shared(unsigned char* bytes, const uint32_t* in, int words) {
  for (int i = threadIdx.x; i < words; i += blockDim.x)
    reinterpret_cast<uint32_t*>(bytes)[i] = in[i];
  __syncthreads();
}

template <bool kTransposed>
__global__ void matrix_loads(const uint32_t* in, uint32_t* out) {
  MEMEFF_DYNAMIC_SHARED(bytes);
  fill_shared(bytes, in, 256);
  const int lane = threadIdx.x;
  // Rows in an order that no simple mistake reproduces.
  const uint32_t row = ptx::shared_address(bytes) + 16 * (lane * 5 % 64);
  uint32_t four[4], two[2];
  if (kTransposed) {
    ptx::ldmatrix_x4_trans(four, row);
    ptx::ldmatrix_x2_trans(two, row);
  } else {
    ptx::ldmatrix_x4(four, row);
    ptx::ldmatrix_x2(two, row);
  }
  for (int i = 0; i < 4; ++i) out[6 * lane + i] = four[i];
  for (int i = 0; i < 2; ++i) out[6 * lane + 4 + i] = two[i];
}

// ---- matrix products: fragments straight from memory ----

enum class Product { kBf16K8, kBf16K16, kFp16K8, kFp16K16 };

template <Product kProduct>
__global__ void products(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x;
  float d[4] = {1.f, 2.f, 3.f, 4.f};
  for (int repeat = 0; repeat < 4; ++repeat) {
    const uint32_t* mine = in + 6 * (32 * repeat + lane);
    const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
    const uint32_t half_a[2] = {a[0], a[1]};
    if (kProduct == Product::kBf16K8) ptx::mma_m16n8k8_bf16(d, half_a, b[0]);
    if (kProduct == Product::kBf16K16) ptx::mma_m16n8k16_bf16(d, a, b);
    if (kProduct == Product::kFp16K8) ptx::mma_m16n8k8_fp16(d, half_a, b[0]);
    if (kProduct == Product::kFp16K16) ptx::mma_m16n8k16_fp16(d, a, b);
  }
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = __float_as_uint(d[i]);
}

}  // namespace

std::vector<Case> MEMEFF_CASES(sm80)() {
  constexpr auto words = Input::kWords;
  constexpr auto bits = Compare::kBits, floats = Compare::kFloats;
  return {
      {"shuffles", words, bits, 32, 0, shuffles, nullptr, run_case},
      {"votes", words, bits, 32, 0, votes, nullptr, run_case},
      {"ex2.approx", words, floats, 256, 0, exponentials, nullptr, run_case},
      {"max.NaN.f32", words, bits, 256, 0, maxima, nullptr, run_case},
      {"min.f16x2", words, bits, 256, 0, minima, nullptr, run_case},
      {"bar.sync, bar.arrive", words, bits, 64, 0, named_barriers, nullptr, run_case},
      {"cp.async 16", words, bits, 64, 2048, copies_of_16, nullptr, run_case},
      {"cp.async 8", words, bits, 64, 512, narrow_copies<8>, nullptr, run_case},
      {"cp.async 4", words, bits, 64, 256, narrow_copies<4>, nullptr, run_case},
      {"ldmatrix", words, bits, 32, 1024, matrix_loads<false>, nullptr, run_case},
      {"ldmatrix .trans", words, bits, 32, 1024, matrix_loads<true>, nullptr, run_case},
      {"mma bf16 k8, integers", Input::kBf16Integers, bits, 32, 0, products<Product::kBf16K8>,
       nullptr, run_case},
      {"mma bf16 k16, integers", Input::kBf16Integers, bits, 32, 0, products<Product::kBf16K16>,
       nullptr, run_case},
      {"mma fp16 k8, integers", Input::kFp16Integers, bits, 32, 0, products<Product::kFp16K8>,
       nullptr, run_case},
      {"mma fp16 k16, integers", Input::kFp16Integers, bits, 32, 0, products<Product::kFp16K16>,
       nullptr, run_case},
      {"mma bf16 k16", Input::kBf16Normal, floats, 32, 0, products<Product::kBf16K16>, nullptr,
       run_case},
      {"mma fp16 k16", Input::kFp16Normal, floats, 32, 0, products<Product::kFp16K16>, nullptr,
       run_case},
  };
}

}  // namespace memeff::conformance
