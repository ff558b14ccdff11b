// The list of a product's work in memory that the emulator watches.
#pragma once

#include <vector>

#include "cuda/work_list.h"
#include "emulator/check.h"

namespace memeff::cuda {

// Made of marks by make_work_list. Its memory has the size that cuda/work_list.h says and held noise before.
class ListedWork {
 public:
  ListedWork(ProductOfGradient product, int64_t classes, int64_t tokens, uint8_t* tiles,
             int64_t tiles_stride)
      : rows(count(product == ProductOfGradient::kGradInput ? tokens : classes)),
        k_tiles(count(product == ProductOfGradient::kGradInput ? classes : tokens)),
        bytes_(work_list_bytes(rows, k_tiles)),
        memory_(static_cast<std::size_t>((bytes_ + 7) / 8), -1),
        guard_(memory_.data(), static_cast<std::size_t>(bytes_), "work list",
               emulator::BufferAccess::kReadWrite, 4) {
    CHECK(make_work_list({product, classes, tokens, {tiles, tiles_stride}}, memory_.data(), &list,
                         nullptr)
              .ok());
  }

  const int64_t rows, k_tiles;
  WorkList list;

 private:
  static int64_t count(int64_t size) { return (size + 127) / 128; }
  const int64_t bytes_;
  std::vector<int64_t> memory_;
  emulator::GlobalBuffer guard_;
};

}  // namespace memeff::cuda
