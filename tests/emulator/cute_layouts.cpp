#include "emulator/cute_layouts.h"

// CuTe turns pointers to shared memory into addresses by this built-in of device code. Here they are
// addresses already.
#include <cstddef>
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
static std::size_t __cvta_generic_to_shared(const void* pointer) {
  return reinterpret_cast<std::size_t>(pointer);
}

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace memeff::cute_oracle {

using namespace cute;

namespace {

using GmmaMajor = SM90::GMMA::Major;
using Mma8 = MMA_Traits<SM80_16x8x8_F32BF16BF16F32_TN>;
using Mma16 = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
using Wgmma = MMA_Traits<
    SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::MN>>;

template <GmmaMajor kMajor, int kExtent>
auto tile_layout() {
  const auto shape = make_shape(Int<kExtent>{}, Int<64>{});
  if constexpr (kMajor == GmmaMajor::K)
    return tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<cute::bfloat16_t>{}, shape);
  else
    return tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<cute::bfloat16_t>{}, shape,
                         Step<_2, _1>{});
}

// As CuTe's kernels make them: partition the tile, and take the fragment's iterator.
template <bool kOfA, GmmaMajor kMajor>
std::uint64_t descriptor_of(std::uint32_t tile, int first_mn, int k16) {
  using Atom = MMA_Atom<SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<kMajor, kMajor>>;
  const auto thread = make_tiled_mma(Atom{}).get_slice(0);
  auto* const data = reinterpret_cast<cute::bfloat16_t*>(std::uintptr_t{tile});
  const auto tensor = make_tensor(make_smem_ptr(data), tile_layout<kMajor, kOfA ? 128 : 256>());
  if constexpr (kOfA) {
    const auto fragment = thread.make_fragment_A(thread.partition_A(tensor));
    return (*fragment(_, first_mn / 64, k16).data()).desc_;
  } else {
    const auto fragment = thread.make_fragment_B(thread.partition_B(tensor));
    return (*fragment(_, 0, k16).data()).desc_;
  }
}

// CuTe numbers elements with the first extent fastest.
Coordinate split(int index, int rows) { return {index % rows, index / rows}; }

template <class Traits>
int element(bool destination, int lane, int value) {
  const int bit = destination ? static_cast<int>(typename Traits::DstLayout{}(lane, value * 16))
                              : static_cast<int>(typename Traits::SrcLayout{}(lane, value * 16));
  return bit / 16;
}

}  // namespace

Coordinate mma_a(int k, int lane, int value) {
  return split(k == 8 ? int(Mma8::ALayout{}(lane, value)) : int(Mma16::ALayout{}(lane, value)), 16);
}

Coordinate mma_b(int k, int lane, int value) {  // CuTe's B is [n, k]
  const int index = k == 8 ? int(Mma8::BLayout{}(lane, value)) : int(Mma16::BLayout{}(lane, value));
  const Coordinate nk = split(index, 8);
  return {nk.column, nk.row};
}

Coordinate mma_d(int lane, int value) { return split(int(Mma16::CLayout{}(lane, value)), 16); }

int ldmatrix_x4(bool transposed, int lane, int value) {
  return transposed ? element<Copy_Traits<SM75_U16x8_LDSM_T>>(true, lane, value)
                    : element<Copy_Traits<SM75_U32x4_LDSM_N>>(true, lane, value);
}

int stmatrix_x4(bool transposed, int lane, int value) {
  return transposed ? element<Copy_Traits<SM90_U16x8_STSM_T>>(false, lane, value)
                    : element<Copy_Traits<SM90_U32x4_STSM_N>>(false, lane, value);
}

Coordinate wgmma_a(int thread, int value) {
  return split(int(Wgmma::ALayout{}(thread, value)), 64);
}

Coordinate wgmma_d(int thread, int value) {
  return split(int(Wgmma::CLayout{}(thread, value)), 64);
}

int k_major_offset(int row, int k) {
  const auto tile = as_position_independent_swizzle_layout(tile_layout<GmmaMajor::K, 128>());
  return static_cast<int>(tile(row, k)) * 2;
}

int mn_major_offset(int mn, int k) {
  const auto tile = as_position_independent_swizzle_layout(tile_layout<GmmaMajor::MN, 128>());
  return static_cast<int>(tile(mn, k)) * 2;
}

std::uint64_t descriptor(bool of_a, bool mn_major, std::uint32_t tile, int first_mn, int k16) {
  if (of_a)
    return mn_major ? descriptor_of<true, GmmaMajor::MN>(tile, first_mn, k16)
                    : descriptor_of<true, GmmaMajor::K>(tile, first_mn, k16);
  return mn_major ? descriptor_of<false, GmmaMajor::MN>(tile, first_mn, k16)
                  : descriptor_of<false, GmmaMajor::K>(tile, first_mn, k16);
}

}  // namespace memeff::cute_oracle
