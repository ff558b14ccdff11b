// Bulk copies of two-dimensional tiles between global and shared memory.
//
// A tile's rows lie one after the other in shared memory. With a swizzle of 128 (64, 32) bytes the
// 16-byte pieces of each row are permuted: address bits 4-6 (4-5, 4) are xored with bits 7-9 (7-8,
// 7), so that pieces at the same column of adjacent rows lie in different banks.
//
// Stores write whole pieces of 16 bytes of global memory: where a tensor's row ends inside one, what
// the tile has for the rest of it is written, too (triton-lang/triton issue 11583, on an H100).
#include <algorithm>

#include "emulator/hopper.h"

namespace memeff::emulator {

namespace {

std::size_t tile_row_bytes(const TensorMap& map) {
  return std::size_t{map.box_columns} * map.element_bytes;
}
std::size_t tile_bytes(const TensorMap& map) { return tile_row_bytes(map) * map.box_rows; }

// Place of a byte of the tile, by its address in the shared window.
std::uint32_t swizzled(const TensorMap& map, std::uint32_t address) {
  const std::uint32_t pieces = map.swizzle_bytes / 16;  // 8, 4, 2 or 0 for no swizzle
  const std::uint32_t mask = pieces == 0 ? 0 : pieces - 1;
  return address ^ ((address >> 7 & mask) << 4);
}

// Maps have been checked where they were made (common/tensor_map.cuh).
bool tile_is_legal(const TensorMap& map, std::uint32_t shared, const char* user, Pc pc) {
  const char* problem = nullptr;
  if (shared % 128 != 0) problem = "shared address is not a multiple of 128";
  if (map.swizzle_bytes != 0 && shared % (8 * map.swizzle_bytes) != 0)
    problem = "shared address is not aligned to the swizzle's pattern";
  if (problem == nullptr) return true;
  report(Defect::kBadArgument, pc, "%s: %s", user, problem);
  return false;
}

enum class Direction { kLoad, kStore };

// The part of tile row `r` that is copied: columns [begin, end) of the tensor.
struct Span {
  std::int64_t row, begin, end;
  bool empty() const { return begin >= end; }
};
Span copied_span(const TensorMap& map, int column, int row, std::uint32_t r, Direction direction) {
  const auto columns = static_cast<std::int64_t>(map.columns);
  const auto piece = static_cast<std::int64_t>(16 / map.element_bytes);
  const std::int64_t limit =
      direction == Direction::kLoad ? columns : (columns + piece - 1) / piece * piece;
  Span span{std::int64_t{row} + r, std::max<std::int64_t>(column, 0),
            std::min<std::int64_t>(std::int64_t{column} + map.box_columns, limit)};
  if (span.row < 0 || span.row >= static_cast<std::int64_t>(map.rows)) span.end = span.begin;
  return span;
}
unsigned char* element(const TensorMap& map, std::int64_t row, std::int64_t column) {
  return map.base + row * static_cast<std::int64_t>(map.row_bytes) + column * map.element_bytes;
}

bool check_tensor(const TensorMap& map, int column, int row, AccessType type, Pc pc,
                  const Step* reading = nullptr) {
  for (std::uint32_t r = 0; r < map.box_rows; ++r) {
    const Direction direction = type == AccessType::kRead ? Direction::kLoad : Direction::kStore;
    const Span span = copied_span(map, column, row, r, direction);
    if (span.empty()) continue;
    if (!check_global(element(map, span.row, span.begin),
                      static_cast<std::size_t>(span.end - span.begin) * map.element_bytes, type, pc,
                      true, reading))
      return false;
  }
  return true;
}

// Calls body(element in global memory or null where none is copied, element in the block's shared
// memory).
template <class Body>
void for_each_element(const TensorMap& map, const Block& of, std::uint32_t shared, int column,
                      int row, Direction direction, Body body) {
  for (std::uint32_t r = 0; r < map.box_rows; ++r) {
    const Span span = copied_span(map, column, row, r, direction);
    for (std::uint32_t c = 0; c < map.box_columns; ++c) {
      const std::int64_t x = std::int64_t{column} + c;
      const auto address =
          static_cast<std::uint32_t>(shared + r * tile_row_bytes(map) + c * map.element_bytes);
      body(x >= span.begin && x < span.end ? element(map, span.row, x) : nullptr,
           of.shared + swizzled(map, address) - kSharedWindow);
    }
  }
}

}  // namespace

// ---- loads: completion is counted in bytes on an mbarrier ----

namespace {

// The copy of the tile that the block `of` gets, and its mbarrier.
void load_into(Block& of, std::uint32_t destination, const TensorMap& map, int column, int row,
               std::uint32_t mbarrier, Pc pc) {
  Mbarrier* barrier = find_mbarrier(mbarrier, "TMA load", pc, of);
  if (barrier == nullptr) return;
  if (!barrier->fenced)
    report(Defect::kMissingProxyFence, pc,
           "TMA load: the mbarrier's initialisation is not visible to the asynchronous proxy");
  unsigned char* target = shared_pointer(destination, tile_bytes(map), "TMA load", pc, of);
  if (target == nullptr) return;

  const std::uint32_t agent = barrier->agent;
  const Step step{agent, cluster->tick(agent)};
  // Whoever knows that the mbarrier's phase is over knows that the tensor has been read, too.
  if (!check_tensor(map, column, row, AccessType::kRead, pc, &step)) return;
  check_shared(target, tile_bytes(map), {AccessType::kWrite, step, &current->clock, Proxy::kAsync},
               pc);
  note_remote_access(of, step, pc);

  const auto deliver = [=, &of] {
    for_each_element(map, of, destination, column, row, Direction::kLoad,
                     [&](const unsigned char* from, unsigned char* to) {
                       if (from != nullptr)
                         std::memcpy(to, from, map.element_bytes);
                       else
                         std::memset(to, 0, map.element_bytes);
                     });
    Mbarrier& done = hopper(of).mbarriers[mbarrier];
    // The whole box counts, also what lies outside the tensor.
    done.pending_bytes -= static_cast<std::int64_t>(tile_bytes(map));
    done.arriving.learn(step);
    update_phase(done, pc);
  };
  if (config().late_delivery) {
    std::memset(target, 0xff, tile_bytes(map));
    cluster->deliveries.push_back(deliver);
  } else {
    deliver();
  }
}

}  // namespace

void tma_load_2d(std::uint32_t destination, const TensorMap* tensor_map, int column, int row,
                 std::uint32_t mbarrier) {
  const Pc pc = MEMEFF_CALLER_PC;
  ++counters().tma;
  const TensorMap map = *tensor_map;
  if (!tile_is_legal(map, destination, "TMA load", pc)) return;
  load_into(*block, destination, map, column, row, mbarrier, pc);
}

void tma_load_2d_multicast(std::uint32_t destination, const TensorMap* tensor_map, int column,
                           int row, std::uint32_t mbarrier, std::uint32_t blocks) {
  const Pc pc = MEMEFF_CALLER_PC;
  ++counters().tma;
  const TensorMap map = *tensor_map;
  if (!tile_is_legal(map, destination, "TMA multicast", pc)) return;
  if (blocks == 0 || blocks >> cluster->blocks.size() != 0) {
    report(Defect::kBadArgument, pc, "TMA multicast to blocks %#x of a cluster of %zu", blocks,
           cluster->blocks.size());
    return;
  }
  for (Block& of : cluster->blocks)
    if ((blocks >> of.rank & 1) != 0) load_into(of, destination, map, column, row, mbarrier, pc);
}

// ---- stores and reductions: completion is waited for by the issuing thread, in groups ----

namespace {

BulkStores& stores_of_current() {
  auto& all = hopper().stores;
  const auto found = all.find(current->linear);
  if (found != all.end()) return found->second;
  if (static_cast<int>(all.size()) >= kBulkStoreAgents) {
    report(Defect::kBadArgument, nullptr, "the emulator lets %d threads issue TMA stores",
           kBulkStoreAgents);
    abandon_launch();
  }
  BulkStores& mine = all[current->linear];
  mine.agent =
      block->async_agent(kWgmmaAgents + kMbarrierAgents + static_cast<int>(all.size()) - 1);
  return mine;
}

void deliver(const BulkStore& store) {
  for_each_element(store.map, *block, window_address(store.source), store.column, store.row,
                   Direction::kStore, [&](unsigned char* to, const unsigned char* from) {
                     if (to == nullptr) return;
                     if (!store.add) {
                       std::memcpy(to, from, store.map.element_bytes);
                       return;
                     }
                     float sum, term;
                     std::memcpy(&sum, to, sizeof sum);
                     std::memcpy(&term, from, sizeof term);
                     sum += term;
                     std::memcpy(to, &sum, sizeof sum);
                   });
}

}  // namespace

void tma_store_2d(const TensorMap* tensor_map, std::uint32_t source, int column, int row,
                  bool add) {
  const Pc pc = MEMEFF_CALLER_PC;
  ++counters().tma;
  const TensorMap map = *tensor_map;
  if (!tile_is_legal(map, source, "TMA store", pc)) return;
  if (add && map.element_bytes != 4) {
    report(Defect::kBadArgument, pc, "TMA reduce: only float is emulated");
    return;
  }
  unsigned char* from = shared_pointer(source, tile_bytes(map), "TMA store", pc);
  const AccessType type = add ? AccessType::kAtomic : AccessType::kWrite;
  if (from == nullptr || !check_tensor(map, column, row, type, pc)) return;

  BulkStores& mine = stores_of_current();
  if (mine.open.stores.empty()) mine.open.clock = cluster->tick(mine.agent);
  check_shared(from, tile_bytes(map),
               {AccessType::kRead, {mine.agent, mine.open.clock}, &current->clock, Proxy::kAsync},
               pc);
  mine.open.stores.push_back({map, from, column, row, add});
  if (!config().late_delivery) deliver(mine.open.stores.back());
}

void bulk_commit() {
  BulkStores& mine = stores_of_current();
  mine.groups.push_back(std::move(mine.open));
  mine.open = {};
}

void bulk_wait(int pending, bool) {
  // Reading and writing happen at once here, at the last moment at which a waiting thread could see it.
  BulkStores& mine = stores_of_current();
  while (static_cast<int>(mine.groups.size()) > pending) {
    const BulkStoreGroup& group = mine.groups.front();
    if (config().late_delivery)
      for (const BulkStore& store : group.stores) deliver(store);
    current->clock.learn({mine.agent, group.clock});
    mine.groups.pop_front();
  }
}

void bulk_stores_thread_exits() {
  const auto found = hopper().stores.find(current->linear);
  if (found == hopper().stores.end()) return;
  std::size_t unread = found->second.open.stores.size();
  for (const BulkStoreGroup& group : found->second.groups) unread += group.stores.size();
  if (unread != 0)
    report(Defect::kInFlightAtExit, nullptr,
           "the thread exits before %zu TMA stores have read shared memory", unread);
}

}  // namespace memeff::emulator
