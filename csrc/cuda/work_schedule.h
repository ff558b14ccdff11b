// Which tiles of a product's result a block of a persistent grid computes, and in which order, where
// tiles of G are left out. Plain C++, for kernels and for tests.
//
// A unit is one tile of the result: a rank (place in WorkList::rows) and a column of tiles. Its cost is
// known, the count of its rank. Units are numbered along the columns of a rank, then rank after rank,
// and dealt out in rounds, to and fro:
//
//     round 0    block 0 1 2 ... G-1
//     round 1    block G-1 ... 2 1 0        and so on
//
// Costs decrease from unit to unit, so what one block gets more than another in a round is at most how
// much they decrease there. Over all rounds that is less than the cost of one unit, and as it alternates
// in sign, mostly far less: the most a block gets is the mean and one unit.
//
// A block goes through its units panel by panel of kColumns columns, and within a panel in the order
// of ranks. So all blocks work on few columns of the second operand at a time, whose k tiles other rows
// need, too, but not at the same time: a panel's stay in L2 until then.
#pragma once

#if defined(__CUDACC__)
#define MEMEFF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MEMEFF_HOST_DEVICE inline
#endif

namespace memeff::cuda {

class WorkSchedule {
 public:
  static constexpr int kColumns = 4;  // of a panel: 1024 features, 256 KiB of a k tile

  MEMEFF_HOST_DEVICE WorkSchedule(int ranks, int columns, int block, int blocks)
      : ranks_(ranks), columns_(columns), block_(block), blocks_(blocks) {}

  // The block's next unit; false: there is none. `turn`, 0 at first, is all that a kernel keeps from unit
  // to unit.
  MEMEFF_HOST_DEVICE bool next(int* turn, int* rank, int* column) const {
    const int rounds = (ranks_ * columns_ + blocks_ - 1) / blocks_;
    const int turns = (columns_ + kColumns - 1) / kColumns * rounds;
    while (*turn < turns) {
      const int panel = *turn / rounds, round = *turn % rounds;
      ++*turn;
      const int unit = round * blocks_ + (round % 2 == 0 ? block_ : blocks_ - 1 - block_);
      *rank = unit / columns_;
      *column = unit % columns_;
      if (*rank < ranks_ && *column / kColumns == panel) return true;
    }
    return false;
  }

 private:
  int ranks_, columns_, block_, blocks_;
};

}  // namespace memeff::cuda
