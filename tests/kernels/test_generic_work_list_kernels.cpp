// What products that leave out tiles have to do: the list that make_work_list makes of marks, emulated,
// and how WorkSchedule divides it among the blocks of a persistent grid.
#include "kernels/work_list.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <utility>

#include "cuda/work_schedule.h"

using namespace memeff;
using namespace memeff::cuda;
using emulator::BufferAccess;
using emulator::GlobalBuffer;

namespace {

// ---- the list ----

struct Shape {
  int64_t classes, tokens, padding;  // of the marks, between rows
};

// The list of marks whose density differs from row to row and from column to column, up to none and all.
void test_list(const Shape& s, double density) {
  std::mt19937 random(static_cast<unsigned>(s.classes + s.tokens));
  std::uniform_real_distribution<double> uniform;
  const int64_t class_tiles = (s.classes + 127) / 128, token_tiles = (s.tokens + 127) / 128;
  const int64_t stride = token_tiles + s.padding;
  // Padding counts as marked, should anyone read it.
  std::vector<uint8_t> marks(static_cast<std::size_t>(class_tiles * stride), 1);
  for (int64_t v = 0; v < class_tiles; ++v)
    for (int64_t n = 0; n < token_tiles; ++n) {
      const double here = density == 0 || density == 1 ? density
                          : v % 5 == 2                 ? 0
                          : n % 7 == 3                 ? 1
                                                       : density;
      // Any mark but 0 counts.
      const int mark = uniform(random) < here ? 1 + static_cast<int>(random() % 255) : 0;
      marks[static_cast<std::size_t>(v * stride + n)] = static_cast<uint8_t>(mark);
    }
  const GlobalBuffer guard(marks.data(), marks.size(), "marks", BufferAccess::kReadOnly, 1);

  for (const auto product : {ProductOfGradient::kGradInput, ProductOfGradient::kGradWeight}) {
    const bool of_input = product == ProductOfGradient::kGradInput;
    const ListedWork work(product, s.classes, s.tokens, marks.data(), stride);
    CHECK(work.rows == (of_input ? token_tiles : class_tiles));
    std::vector<int32_t> counts;
    for (int64_t row = 0; row < work.rows; ++row) {
      int32_t count = 0;
      const int32_t* listed = work.list.k_tiles + row * work.k_tiles;
      for (int64_t k = 0; k < work.k_tiles; ++k) {
        const int64_t v = of_input ? k : row, n = of_input ? row : k;
        if (marks[static_cast<std::size_t>(v * stride + n)] != 0) CHECK(listed[count++] == k);
      }
      if (count < work.k_tiles) CHECK(listed[count] == -1);  // nothing more was written
      counts.push_back(count);
    }
    std::vector<int32_t> order(static_cast<std::size_t>(work.rows));
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const int32_t x = counts[static_cast<std::size_t>(a)],
                    y = counts[static_cast<std::size_t>(b)];
      return x != y ? x > y : a < b;
    });
    for (std::size_t rank = 0; rank < order.size(); ++rank) {
      CHECK(work.list.rows[rank].row == order[rank]);
      CHECK(work.list.rows[rank].count == counts[static_cast<std::size_t>(order[rank])]);
    }
  }
}

// The kernel takes 32 rows and 1024 k tiles at a time, and sorts 1024 rows at a time.
void test_lists() {
  for (const double density : {0.0, 0.1, 1.0}) test_list({700, 5000, 3}, density);
  if (emulator::config().schedule != emulator::Schedule::kInOrder) return;
  test_list({1, 1, 0}, 0.5);
  test_list({128 * 70, 128 * 33 - 5, 0}, 0.5);
  test_list({128 * 1030, 20, 1}, 0.3);
}

// ---- how it is divided ----

// Which block computes each unit, and what a block has to do in all.
struct Division {
  std::map<std::pair<int, int>, int> block_of;
  std::vector<int64_t> load;
};

Division divide(const std::vector<int>& counts, int columns, int blocks) {
  Division division;
  division.load.assign(static_cast<std::size_t>(blocks), 0);
  const int ranks = static_cast<int>(counts.size());
  for (int block = 0; block < blocks; ++block) {
    const WorkSchedule schedule(ranks, columns, block, blocks);
    int turn = 0, rank = -1, column = -1, panel = 0, last_rank = 0;
    while (schedule.next(&turn, &rank, &column)) {
      CHECK(rank >= 0 && rank < ranks && column >= 0 && column < columns);
      CHECK(division.block_of.emplace(std::pair<int, int>(rank, column), block).second);
      division.load[static_cast<std::size_t>(block)] += counts[static_cast<std::size_t>(rank)];
      // Panel by panel, in each the longest first.
      const int its_panel = column / WorkSchedule::kColumns;
      CHECK(its_panel > panel || (its_panel == panel && rank >= last_rank));
      panel = its_panel, last_rank = rank;
    }
    CHECK(!schedule.next(&turn, &rank, &column));
  }
  return division;
}

void test_balance() {
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform;
  double worst = 0;  // that any block has more than the mean, in units of the largest
  for (int repeat = 0; repeat < 200; ++repeat) {
    const int ranks = 1 + static_cast<int>(random() % (repeat % 50 == 0 ? 1100 : 70));
    const int columns = 1 + static_cast<int>(random() % 33);
    const int blocks = repeat % 3 == 0 ? 132 : 1 + static_cast<int>(random() % 230);
    std::vector<int> counts;
    for (int rank = 0; rank < ranks; ++rank) {
      const double u = uniform(random);
      counts.push_back(repeat % 4 == 0   ? static_cast<int>(0.2 / (u + 0.0002))  // a heavy tail
                       : repeat % 4 == 1 ? (u < 0.1 ? 1002 : 3)                  // two kinds
                       : repeat % 4 == 2 ? static_cast<int>(64 * u)
                                         : 7);
    }
    std::sort(counts.rbegin(), counts.rend());
    const Division division = divide(counts, columns, blocks);
    CHECK(division.block_of.size() == static_cast<std::size_t>(ranks * columns));
    const double mean = static_cast<double>(std::accumulate(division.load.begin(),
                                                            division.load.end(), int64_t{0})) /
                        blocks;
    const auto most =
        static_cast<double>(*std::max_element(division.load.begin(), division.load.end()));
    if (counts[0] == 0) continue;
    CHECK(most <= mean + counts[0]);
    worst = std::max(worst, (most - mean) / counts[0]);
  }
  CHECK(worst > 0.5);  // so the bound says something
}

// 64 rows of tiles of which six have 100 times the work of the others: dealt out by their numbers, as
// tiles that all cost the same are, one block would have more than twice the mean.
void test_skewed_rows() {
  constexpr int kColumns = 16, kBlocks = 132;
  std::vector<int> counts(64, 10);
  std::fill(counts.begin(), counts.begin() + 6, 1000);
  const auto most = [&](const std::vector<int64_t>& load) {
    return *std::max_element(load.begin(), load.end());
  };
  std::vector<int64_t> in_turn(kBlocks, 0);
  for (int unit = 0; unit < 64 * kColumns; ++unit)  // down 16 rows, then the next column
    in_turn[static_cast<std::size_t>(unit % kBlocks)] +=
        counts[static_cast<std::size_t>(unit / (16 * kColumns) * 16 + unit % 16)];
  const double mean = (6 * 1000 + 58 * 10) * kColumns / static_cast<double>(kBlocks);
  CHECK(static_cast<double>(most(in_turn)) > 2.4 * mean);
  CHECK(static_cast<double>(most(divide(counts, kColumns, kBlocks).load)) < 1.35 * mean);
}

// Evenly decreasing costs: dealt out in one direction, the first block would have more than the last
// in every round, half of the largest cost more than the mean.
void test_to_and_fro() {
  constexpr int kColumns = 16, kBlocks = 132, kRanks = 132;  // 16 rounds
  std::vector<int> counts;
  for (int rank = 0; rank < kRanks; ++rank) counts.push_back(1000 - 1000 * rank / kRanks);
  const Division division = divide(counts, kColumns, kBlocks);
  const auto [least, most] = std::minmax_element(division.load.begin(), division.load.end());
  CHECK(*most - *least < 1000 / 16);
}

// The blocks of an H100 that compute at the same time work on few columns: 4 of 256 features.
void test_panels() {
  constexpr int kRanks = 64, kColumns = 16, kBlocks = 132;
  int turns[kBlocks] = {};
  for (int unit = 0; unit < 7; ++unit) {
    std::map<int, int> panels;
    for (int block = 0; block < kBlocks; ++block) {
      int rank, column;
      const WorkSchedule schedule(kRanks, kColumns, block, kBlocks);
      if (schedule.next(&turns[block], &rank, &column)) ++panels[column / 4];
    }
    int largest = 0;
    for (const auto& panel : panels) largest = std::max(largest, panel.second);
    CHECK(largest > kBlocks / 2);
  }
}

}  // namespace

int main() {
  emulator::expect_clean("work lists", test_lists);
  test_balance();
  test_skewed_rows();
  test_to_and_fro();
  test_panels();
  CHECK(emulator::reports().empty());
  return emulator::finish("test_generic_work_list_kernels");
}
