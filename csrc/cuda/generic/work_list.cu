// The list of what a product of a gradient has to do where tiles without probability are left out:
//
//   marks    [rows of tiles of the result, k tiles], bytes, in either order in memory
//   k_tiles  of each row the k tiles that are marked, in ascending order
//   rows     the rows and their counts by decreasing count, equal ones in their order
//
// So the same marks give the same list, and each sum keeps the order of its terms. Nothing is read
// back: the product that follows on the stream reads counts where it needs them.
//
// One thread block: there is little to do (64 x 1002 marks at 8192 tokens and 128256 classes), and
// ranks need the counts of all rows. It takes 32 rows by as many times 32 k tiles as it has warps, 8 to
// 32. First each warp makes words of 32 marks of all of these rows, reading along whatever is adjacent
// in memory. Through shared memory (4 KiB) a warp then gets the words of one row, a lane each, and
// writes the numbers of their bits from where the lanes before end. A row's rank is how many come
// before it; every thread counts that for a row, which is quadratic, but plans have few rows: at most 128
// of classes (slices of 16384), and one per 128 tokens of a block. Several blocks would pay from about a
// thousand rows on.
#include <algorithm>

#include "core/math.h"
#include "cuda/common/device.cuh"
#include "cuda/work_list.h"

namespace memeff::cuda {

namespace {

constexpr int kLeastWarps = 8, kMostWarps = 32;
constexpr int kWordsPitch = kMostWarps + 1;  // of a row of words: no bank conflicts

struct Marks {
  const uint8_t* tiles;
  int64_t row_stride, k_stride;
  int rows, k_tiles;

  MEMEFF_DEVICE bool at(int row, int k) const {
    return row < rows && k < k_tiles && tiles[row * row_stride + k * k_stride] != 0;
  }
  // To lane i: bit b says whether k tile first_k + b of row first_row + i is marked.
  MEMEFF_DEVICE uint32_t words(int first_row, int first_k) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t word = 0;
    if (first_k >= k_tiles) return word;
    if (k_stride == 1) {
#pragma unroll 8
      for (int i = 0; i < 32; ++i) {
        const uint32_t of_row = __ballot_sync(~0u, at(first_row + i, first_k + lane));
        if (lane == i) word = of_row;
      }
    } else {
#pragma unroll 8
      for (int i = 0; i < 32; ++i)
        word |= static_cast<uint32_t>(at(first_row + lane, first_k + i)) << i;
    }
    return word;
  }
};

// The numbers of the marked k tiles of every row, and how many there are.
MEMEFF_DEVICE void list_k_tiles(const Marks& marks, uint32_t* words, int32_t* k_tiles,
                                int32_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int first_row = 0; first_row < marks.rows; first_row += 32) {
    const int last_row = first_row + 32 < marks.rows ? first_row + 32 : marks.rows;
    for (int first_k = 0; first_k == 0 || first_k < marks.k_tiles; first_k += 32 * warps) {
      words[lane * kWordsPitch + warp] = marks.words(first_row, first_k + warp * 32);
      __syncthreads();
      for (int row = first_row + warp; row < last_row; row += warps) {
        uint32_t left = lane < warps ? words[(row - first_row) * kWordsPitch + lane] : 0;
        const int mine = __popc(left);
        int end = mine;  // of what this lane and those before it list
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const int before = __shfl_up_sync(~0u, end, distance);
          if (lane >= distance) end += before;
        }
        const int so_far = first_k == 0 ? 0 : counts[row];
        int32_t* to = k_tiles + int64_t{row} * marks.k_tiles + so_far + end - mine;
        for (; left != 0; left &= left - 1)
          *to++ = first_k + lane * 32 + __ffs(static_cast<int>(left)) - 1;
        __syncwarp();  // all lanes have read the count
        if (lane == 31) counts[row] = so_far + end;
      }
      __syncthreads();  // the words may be replaced
    }
  }
}

MEMEFF_DEVICE void sort_rows(const int32_t* counts, int rows, int32_t* staged, WorkRow* sorted) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int first = 0; first < rows; first += threads) {
    const int row = first + thread;
    const int count = row < rows ? counts[row] : 0;
    int rank = 0;
    for (int begin = 0; begin < rows; begin += threads) {
      const int size = rows - begin < threads ? rows - begin : threads;
      if (thread < size) staged[thread] = counts[begin + thread];
      __syncthreads();
      for (int i = 0; i < size; ++i) {
        const int32_t other = staged[i];
        rank += other > count || (other == count && begin + i < row) ? 1 : 0;
      }
      __syncthreads();  // the counts may be replaced
    }
    if (row < rows) sorted[rank] = {row, count};
  }
}

__global__ void __launch_bounds__(32 * kMostWarps, 1)
    work_list_kernel(Marks marks, int32_t* k_tiles, int32_t* counts, WorkRow* rows) {
  MEMEFF_SHARED_ARRAY(uint32_t, words, 32 * kWordsPitch);
  MEMEFF_SHARED_ARRAY(int32_t, staged, 32 * kMostWarps);
  list_k_tiles(marks, words, k_tiles, counts);  // ends with all counts in memory
  sort_rows(counts, marks.rows, staged, rows);
}

}  // namespace

Status make_work_list(const MarkedProduct& marked, void* memory, WorkList* list, void* stream) {
  const TileMarks& tiles = marked.marks;
  const int class_tiles = static_cast<int>(ceil_div(marked.classes, kStoredTile));
  const int token_tiles = static_cast<int>(ceil_div(marked.tokens, kTokenTile));
  const bool of_input = marked.product == ProductOfGradient::kGradInput;
  const Marks marks{tiles.marks, of_input ? 1 : tiles.stride, of_input ? tiles.stride : 1,
                    of_input ? token_tiles : class_tiles, of_input ? class_tiles : token_tiles};
  auto* const rows = static_cast<WorkRow*>(memory);
  auto* const counts = reinterpret_cast<int32_t*>(rows + marks.rows);
  int32_t* const k_tiles = counts + marks.rows;
  *list = {rows, k_tiles};
  if (marks.rows == 0) return {};
  const auto warps = std::clamp<int64_t>(ceil_div(marks.k_tiles, 32), kLeastWarps, kMostWarps);
  MEMEFF_LAUNCH(work_list_kernel, dim3(1), dim3(static_cast<unsigned>(32 * warps)), 0, stream,
                marks, k_tiles, counts, rows);
  return launch_status();
}

}  // namespace memeff::cuda
