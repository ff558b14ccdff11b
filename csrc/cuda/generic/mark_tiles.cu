// Marks the tiles of stored scores that a gradient may leave out, because no token has enough of its
// probability mass there:
//
//   mark of a tile [classes, tokens] = any token with sum_v p_v >= mass classes / V, or whose target
//   is in the tile
//
// A warp decides about one tile, four tokens per lane; the warps of a block have adjacent tiles of
// classes. Bound by reading the partial statistics once.
#include "core/math.h"
#include "cuda/common/device.cuh"
#include "cuda/tokens.h"

namespace memeff::cuda {

namespace {

constexpr int kWarps = 8;

__global__ void __launch_bounds__(32 * kWarps)
    mark_tiles_kernel(TokenArrays tokens, int64_t begin, int64_t end, PartialStatistics partials,
                      TileMarks to) {
  const int64_t range = int64_t{blockIdx.y} * kWarps + threadIdx.y;
  if (range * kStoredTile >= to.vocab) return;
  const int64_t rest = to.vocab - range * kStoredTile;
  const int64_t classes = rest < kStoredTile ? rest : kStoredTile;
  const auto enough =
      static_cast<float>(to.mass * static_cast<double>(classes) / static_cast<double>(to.vocab));
  const auto* max = static_cast<const float*>(partials.max) + range * partials.max_stride;
  const auto* sum = static_cast<const float*>(partials.sum) + range * partials.stride;
  bool counts = false;
  for (int i = threadIdx.x; i < kTokenTile; i += 32) {
    const int64_t column = int64_t{blockIdx.x} * kTokenTile + i;
    if (column >= end - begin) break;
    const int64_t target = tokens.target[begin + column];
    if (target == kNoTarget) continue;  // left out: its gradient is zero anyway
    const double offset = static_cast<double>(max[column]) - tokens.lse[begin + column];
    const float mass = sum[column] * expf(static_cast<float>(offset));
    // Not "mass >= enough": NaN must not be left out, nor what a bad target turns into NaN.
    counts |=
        !(mass < enough) || target == kBadTarget || (target >= 0 && target / kStoredTile == range);
  }
  const int any = __any_sync(~0u, counts);
  if (threadIdx.x == 0) to.marks[range * to.stride + blockIdx.x] = any != 0 ? 1 : 0;
}

}  // namespace

Status mark_tiles(const Problem& problem, const TokenArrays& tokens, int64_t begin, int64_t end,
                  const PartialStatistics& partials, const TileMarks& marks, void* stream) {
  if (!is_16_bit(problem.dtype)) return {"mark_tiles: scores are stored of 16-bit inputs only"};
  if (problem.probabilities != nullptr || (problem.label_smoothing > 0 && !tokens.weighted_apart))
    return {"mark_tiles: class probabilities and label smoothing reach every tile"};
  if (begin == end) return {};
  const dim3 grid(static_cast<unsigned>(ceil_div(end - begin, kTokenTile)),
                  static_cast<unsigned>(ceil_div(marks.vocab, kStoredTile * kWarps)));
  MEMEFF_LAUNCH(mark_tiles_kernel, grid, dim3(32, kWarps), 0, stream, tokens, begin, end, partials,
                marks);
  return launch_status();
}

}  // namespace memeff::cuda
