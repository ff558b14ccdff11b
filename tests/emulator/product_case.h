// C [rows, 64] = A [rows, K] B [64, K]^T of random bf16 matrices that kernels load by TMA, in tiles of
// 64 k of which the last reaches past the end.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "emulator/check.h"
#include "emulator/more_ptx.cuh"

namespace memeff::emulator {

struct ProductCase {
  static constexpr int kTileK = 64, kSteps = 5, kColumns = 64;
  static constexpr int kK = kSteps * kTileK - 24;  // zeros past the end
  std::vector<__nv_bfloat16> a, b;
  std::vector<float> out;
  TensorMap map_a, map_b;

  // Boxes of A have 64 rows.
  ProductCase(int rows, uint32_t box_rows_of_b)
      : a(rows * kK), b(kColumns * kK), out(rows * kColumns) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (auto& x : a) x = __nv_bfloat16(normal(random));
    for (auto& x : b) x = __nv_bfloat16(normal(random));
    CHECK(make_tensor_map(layout(a, 64), &map_a).ok());
    CHECK(make_tensor_map(layout(b, box_rows_of_b), &map_b).ok());
  }

  void check() const {
    for (size_t i = 0; i < out.size(); ++i) {
      const size_t row = i / kColumns, column = i % kColumns;
      double expected = 0;
      for (int k = 0; k < kK; ++k)
        expected += static_cast<double>(__bfloat162float(a[row * kK + k])) *
                    __bfloat162float(b[column * kK + k]);
      CHECK(std::abs(out[i] - expected) < 1e-3);
    }
  }

 private:
  static TensorMapLayout layout(std::vector<__nv_bfloat16>& m, uint32_t box_rows) {
    TensorMapLayout layout;
    layout.base = m.data();
    layout.columns = kK;
    layout.rows = m.size() / kK;
    layout.row_bytes = kK * 2;
    layout.box_columns = kTileK;
    layout.box_rows = box_rows;
    return layout;
  }
};

}  // namespace memeff::emulator
