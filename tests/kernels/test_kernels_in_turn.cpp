// One consumer warpgroup of sm90 is ahead of the other by two steps of k, in every tile that has as many
// steps as the ring has stages, whatever the schedule (class Stagger of csrc/cuda/sm90/pipeline.cuh).
// Which group issues its products when is all that is looked at here; numbers are checked by
// test_sm90_*_kernels.cpp.
#include <optional>

#include "cuda/sm90/kernels.h"
#include "kernels/linear_case.h"
#include "kernels/work_list.h"

using namespace memeff;
using namespace memeff::cuda;

namespace {

constexpr std::size_t kStaggerSteps = 2, kStages = 4, kProductsPerStep = 4;

// The consumer warpgroup, 0 or 1, of each product that the block of that number issued, in order.
std::vector<std::size_t> issued[4];
void note(int block, int warpgroup) { issued[block].push_back(warpgroup - 1); }

using Tiles = std::vector<std::size_t>;  // steps of a block's tiles, one after the other

void check_stagger(int block, const Tiles& tiles) {
  std::vector<std::size_t> at[2];  // where a group's products are in `issued`
  for (std::size_t i = 0; i < issued[block].size(); ++i) at[issued[block][i]].push_back(i);
  std::size_t products = 0;
  for (const std::size_t steps : tiles) products += steps * kProductsPerStep;
  CHECK(at[0].size() == products && at[1].size() == products);
  if (at[0].size() != products || at[1].size() != products) return;
  std::size_t first = 0;  // product of the tile
  for (const std::size_t steps : tiles) {
    // Steps are known to be finished when the next one's products are under way.
    const std::size_t last_alone = first + (kStaggerSteps + 1) * kProductsPerStep - 1;
    if (steps >= kStages) CHECK(at[0][last_alone] < at[1][first]);
    first += steps * kProductsPerStep;
  }
}

// G^T W: 8 tiles of C, one below the other, of which every block computes some; up to 6 steps each.
constexpr int64_t kRows = 8, kTokens = kRows * 128, kClassTiles = 3, kClasses = kClassTiles * 128;
constexpr int64_t kFeatures = 8;

struct Product {
  GuardedMatrix<__half> scores{"E or G", kClasses, kTokens, 0, 0, BufferAccess::kReadOnly};
  GuardedMatrix<__half> weight{"W", kClasses, kFeatures, 0, 0, BufferAccess::kReadOnly};
  GuardedMatrix<float> maxima{"m", kClassTiles, kTokens, 0, 0, BufferAccess::kReadOnly};
  GuardedMatrix<float> sums{"sums", kTokens, kFeatures, 0, 0, BufferAccess::kReadWrite};
  GuardedArray<float> factor{"shift and softmax", kTokens};
  GuardedArray<uint8_t> marks{"marks", kClassTiles* kRows};
  std::optional<ListedWork> work;

  // How many tiles of k count, for each tile of C.
  explicit Product(const std::vector<int64_t>& surviving) {
    for (int64_t row = 0; row < kRows; ++row)
      for (int64_t i = 0; i < kClassTiles; ++i)
        marks[i * kRows + row] = i < surviving[static_cast<std::size_t>(row)];
    work.emplace(ProductOfGradient::kGradInput, kClasses, kTokens, marks.data(), kRows);
  }
  GradientOperands operands(bool marked) {
    return {scores.data(),
            scores.stride,
            weight.data(),
            weight.stride,
            kFeatures,
            DType::kFloat16,
            marked ? work->list : WorkList{}};
  }
  ProductOutput output() {
    ProductOutput output;
    output.sums = sums.data();
    output.sums_stride = sums.stride;
    return output;
  }
  ScoreGradient gradient() {
    ScoreGradient gradient;
    gradient.maxima = maxima.data();
    gradient.maxima_stride = maxima.stride;
    gradient.coefficients.shift = gradient.coefficients.softmax = factor.data();
    return gradient;
  }
};

void check(const std::vector<Tiles>& tiles_of_blocks, const std::function<Status()>& launch) {
  for (auto& of_block : issued) of_block.clear();
  emulator::config().on_wgmma = note;
  CHECK(launch().ok());
  for (std::size_t block = 0; block < tiles_of_blocks.size(); ++block)
    check_stagger(static_cast<int>(block), tiles_of_blocks[block]);
}

void test_products() {
  // Tiles of C go round the two blocks of a grid, long ones first. Each gets two of 2 steps in a row,
  // across which the first group can get far ahead, and one of none.
  Product product({1, 0, 3, 1, 1, 3, 0, 1});
  const std::vector<Tiles> marked = {{6, 2, 2, 0}, {6, 2, 2, 0}};
  check(marked, [&] {
    return sm90::grad_input_product<1>(
        {{0, kClasses, kTokens}, product.operands(true), product.output()}, nullptr);
  });
  check(marked, [&] {
    return sm90::grad_input_from_scores(
        {{0, kClasses, kTokens}, product.operands(true), product.output()}, product.gradient(),
        nullptr);
  });
  // Two clusters of two.
  check({{6, 6}, {6, 6}, {6, 6}, {6, 6}}, [&] {
    return sm90::grad_input_product<2>(
        {{0, kClasses, kTokens}, product.operands(false), product.output()}, nullptr);
  });
}

}  // namespace

int main() {
  for_clean_schedules("products in turn", test_products);
  return emulator::finish("test_kernels_in_turn");
}
