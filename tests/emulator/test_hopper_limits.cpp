// What a Hopper GPU and its driver refuse: tensor maps, and registers that no warp gives.
#include "cuda/ptx/sm90.cuh"
#include "emulator/check.h"

using namespace memeff;
using emulator::Defect;
using emulator::expect_clean;

namespace {

// The driver encodes no map of what TMA cannot do.
void test_refused_maps() {
  alignas(16) static float data[1024];
  const auto refused = [&](auto change) {
    TensorMapLayout layout;
    layout.base = data;
    layout.element = TensorMapElement::kFloat32;
    layout.columns = layout.box_columns = 32;
    layout.rows = 16;
    layout.row_bytes = 128;
    layout.box_rows = 8;
    TensorMap map;
    CHECK(make_tensor_map(layout, &map).ok());
    change(layout);
    return !make_tensor_map(layout, &map).ok();
  };
  CHECK(refused([](TensorMapLayout& l) { l.base = data + 1; }));
  CHECK(refused([](TensorMapLayout& l) { l.columns = 0; }));
  CHECK(refused([](TensorMapLayout& l) { l.rows = 0; }));
  CHECK(refused([](TensorMapLayout& l) { l.row_bytes = 136; }));
  CHECK(refused([](TensorMapLayout& l) { l.row_bytes = 0; }));    // an expanded row
  CHECK(refused([](TensorMapLayout& l) { l.row_bytes = 112; }));  // rows overlap
  CHECK(refused([](TensorMapLayout& l) { l.row_bytes = uint64_t{1} << 40; }));
  CHECK(refused([](TensorMapLayout& l) { l.box_columns = 64; }));  // 256 bytes exceed the swizzle
  CHECK(refused([](TensorMapLayout& l) { l.box_columns = 3; }));
  CHECK(refused([](TensorMapLayout& l) { l.box_rows = 0; }));
  CHECK(refused([](TensorMapLayout& l) { l.box_rows = 257; }));
}

// One warpgroup gives registers to two others: 504 there are per thread of each, at launch 168.
enum class Registers { kNone, kTooMany, kNotGiven, kWrongWay, kOneWarpLess };

template <Registers kFlaw>
__global__ void move_registers() {
  const int t = threadIdx.x;
  if (t < 128) {
    if (kFlaw == Registers::kNotGiven || (kFlaw == Registers::kOneWarpLess && t < 32)) return;
    ptx::decrease_registers<40>();
  } else if (kFlaw == Registers::kWrongWay) {
    ptx::increase_registers<160>();
  } else {
    ptx::increase_registers<kFlaw == Registers::kTooMany       ? 240
                            : kFlaw == Registers::kOneWarpLess ? 200
                                                               : 232>();
  }
}

void test_registers() {
  const auto launch = [](auto kernel) { MEMEFF_LAUNCH(kernel, dim3(1), dim3(384), 0, nullptr); };
  expect_clean("registers", [&] { launch(move_registers<Registers::kNone>); });
  EXPECT_DEFECT("too many registers", kDeadlock, nullptr,
                [&] { launch(move_registers<Registers::kTooMany>); });
  EXPECT_DEFECT("registers that nobody gave", kDeadlock, nullptr,
                [&] { launch(move_registers<Registers::kNotGiven>); });
  EXPECT_DEFECT("increase to fewer registers", kBadArgument, nullptr,
                [&] { launch(move_registers<Registers::kWrongWay>); });
  EXPECT_DEFECT("registers of one warp less", kDivergence, nullptr,
                [&] { launch(move_registers<Registers::kOneWarpLess>); });
}

}  // namespace

int main() {
  emulator::config().printed_reports = 0;
  test_refused_maps();
  test_registers();
  return emulator::finish("test_hopper_limits");
}
