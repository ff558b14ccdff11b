// Tile sizes that the CPU's planner must know to count workspace bytes, and its kernels to use it.
#pragma once

#include <cstdint>

#include "core/compact_sum.h"
#include "core/math.h"

namespace memeff {

/// Vocabulary rows that share one maximum per token (and one partial sum of exponentials).
/// 224 = 16 micro-tiles of 14 rows; partials then cost 2 * 4 / 224 bytes per score.
constexpr int64_t kTileVocab = 224;
/// Tokens are padded to whole panels: two AVX-512 registers of fp32 accumulators.
constexpr int64_t kPanel = 32;

/// Tokens of one group of packed dlogits: the rows of a micro-tile.
constexpr int64_t kMicroRows = 14;

/// Row stride of the sums of gradients, in elements: whole panels, and a cache line more so that rows
/// do not fall into the same sets of the first-level cache when D is a power of two.
constexpr int64_t sum_stride(int64_t features) { return round_up(features, kPanel) + 16; }

/// Row stride of copied rows of 16-bit numbers: an odd number of cache lines, for the same reason.
constexpr int64_t copy_stride(int64_t inner) { return (ceil_div(inner, 32) / 2 * 2 + 1) * 32; }

/// Rows and columns of a gradient that one task computes: enough arithmetic to make up for loading the
/// operands, little enough that threads finish at about the same time.
constexpr int64_t kTaskRows = 8 * kMicroRows;
constexpr int64_t kTaskColumns = 512;

static_assert(kTaskColumns % kCompactBlock == 0, "a task holds whole blocks");

}  // namespace memeff
