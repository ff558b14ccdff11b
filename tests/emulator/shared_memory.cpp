// The block's shared memory and its shadow. For every two bytes the shadow knows the last write and
// all reads since; a new access must be ordered after whatever it conflicts with, by a barrier, a
// warp synchronisation or a wait. Order is decided by vector clocks, so a race is reported even
// when this run happened to execute the accesses in the order that the author had in mind.
//
// Most accesses are of whole lines of 16 bytes. A line therefore has one cell until an access of a
// part tells its bytes apart, and again after the next write of the whole.
#include "emulator/internal.h"

#include <algorithm>

namespace memeff::emulator {

alignas(4096) unsigned char shared_arena[kMaxClusterSize][kArenaBytes];

namespace {

struct Cell {
  bool initialised = false, muted = false;  // muted: already reported in this block
  bool atomic_write = false;
  Proxy write_proxy = Proxy::kGeneric;
  Step write;
  std::vector<Step> reads;  // since the last write, each by another agent
};

constexpr std::size_t kGranule = 2;  // bytes: the smallest element kernels share
constexpr std::size_t kLineBytes = 16, kGranules = kLineBytes / kGranule;

struct Line {
  bool split = false;
  Cell whole;                // unless split
  std::vector<Cell> pieces;  // of one granule each, when split
};
std::vector<Line> shadow[kMaxClusterSize];

bool ordered(const Step& earlier, const Access& now) {
  return earlier.clock <= now.knowledge->seen(earlier.agent);
}
bool fenced(const Step& earlier, const Access& now) {
  return earlier.clock <= now.knowledge->seen_async(earlier.agent);
}
bool is_thread(std::uint32_t agent) {
  const Block& owner = cluster->block_of(agent);
  return agent - owner.first_agent < static_cast<std::uint32_t>(owner.thread_count);
}

const char* verb(AccessType type) {
  switch (type) {
    case AccessType::kRead: return "read";
    case AccessType::kWrite: return "write";
    case AccessType::kAtomic: return "atomic update";
  }
  return "?";
}

// Generic accesses become visible to the asynchronous proxy by a fence only, also the reads that a
// later asynchronous write must not overtake.
const Step* unfenced_step(const Cell& cell, const Access& now) {
  if (now.proxy != Proxy::kAsync) return nullptr;
  if (cell.initialised && cell.write_proxy == Proxy::kGeneric && !fenced(cell.write, now))
    return &cell.write;
  if (now.type == AccessType::kRead) return nullptr;
  for (const Step& read : cell.reads)
    if (is_thread(read.agent) && !fenced(read, now)) return &read;
  return nullptr;
}

const Step* conflicting_step(const Cell& cell, const Access& now, const char** kind) {
  const bool both_atomic = cell.atomic_write && now.type == AccessType::kAtomic;
  if (cell.initialised && !both_atomic && !ordered(cell.write, now)) {
    *kind = now.type == AccessType::kRead ? "read after write" : "write after write";
    return &cell.write;
  }
  if (now.type == AccessType::kRead) return nullptr;
  *kind = "write after read";
  for (const Step& read : cell.reads)
    if (!ordered(read, now)) return &read;
  return nullptr;
}

bool check_cell(Cell& cell, std::size_t offset, const Access& now, Pc pc) {
  if (cell.muted) return true;
  if (!cell.initialised && now.type != AccessType::kWrite) {
    cell.muted = true;
    report(Defect::kUninitialisedRead, pc,
           "%s of shared byte %zu, which nothing has written, by %s", verb(now.type), offset,
           describe_agent(now.by.agent).c_str());
    return false;
  }
  const char* kind = "";
  if (const Step* other = conflicting_step(cell, now, &kind)) {
    cell.muted = true;
    report(Defect::kSharedRace, pc, "%s at shared byte %zu: %s by %s is not ordered after %s", kind,
           offset, verb(now.type), describe_agent(now.by.agent).c_str(),
           describe_agent(other->agent).c_str());
    return false;
  }
  if (const Step* other = unfenced_step(cell, now)) {
    cell.muted = true;
    report(Defect::kMissingProxyFence, pc,
           "%s of shared byte %zu by %s needs a fence.proxy.async after the access by %s",
           verb(now.type), offset, describe_agent(now.by.agent).c_str(),
           describe_agent(other->agent).c_str());
    return false;
  }
  return true;
}

void record(Cell& cell, const Access& now) {
  if (now.type != AccessType::kRead) {
    cell.initialised = true;
    cell.atomic_write = now.type == AccessType::kAtomic;
    cell.write_proxy = now.proxy;
    cell.write = now.by;
    cell.reads.clear();
    return;
  }
  // A read ordered before this one needs no record: who is ordered after this one is so after both.
  auto superseded = [&](const Step& read) {
    return read.agent == now.by.agent || ordered(read, now);
  };
  cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), superseded),
                   cell.reads.end());
  cell.reads.push_back(now.by);
}

bool check_and_record(Cell& cell, std::size_t offset, const Access& now, Pc pc) {
  if (!check_cell(cell, offset, now, pc)) return false;
  record(cell, now);
  return true;
}

// Bytes [begin, end) of the line at `start`.
bool check_line(Line& line, std::size_t start, std::size_t begin, std::size_t end,
                const Access& now, Pc pc) {
  const bool all = begin == start && end == start + kLineBytes;
  if (all && !line.split) return check_and_record(line.whole, begin, now, pc);
  if (!line.split) {
    line.split = true;
    line.pieces.assign(kGranules, line.whole);
  }
  for (std::size_t i = (begin - start) / kGranule; i <= (end - 1 - start) / kGranule; ++i)
    if (!check_and_record(line.pieces[i], std::max(begin, start + i * kGranule), now, pc))
      return false;
  const auto muted = [](const Cell& cell) { return cell.muted; };
  if (all && now.type != AccessType::kRead &&
      std::none_of(line.pieces.begin(), line.pieces.end(), muted)) {
    line.split = false;
    line.whole = line.pieces[0];
  }
  return true;
}

}  // namespace

void reset_shared_memory(int rank, std::size_t previously_used) {
  // 0xff is NaN in every floating-point format: data used before it is written is loud.
  std::memset(shared_arena[rank], 0xff, kArenaBytes);
  shadow[rank].resize(kArenaBytes / kLineBytes);
  const std::size_t lines = (previously_used + kLineBytes - 1) / kLineBytes;
  for (std::size_t i = 0; i < lines; ++i) {
    Line& line = shadow[rank][i];
    line.split = false;
    line.whole.initialised = line.whole.muted = line.whole.atomic_write = false;
    line.whole.reads.clear();
  }
}

bool check_shared(const void* pointer, std::size_t bytes, const Access& access, Pc pc) {
  if (!config().check_races || bytes == 0) return true;
  ++counters().checked_accesses;
  const auto position =
      static_cast<std::size_t>(static_cast<const unsigned char*>(pointer) - shared_arena[0]);
  std::vector<Line>& lines = shadow[position / kArenaBytes];
  const std::size_t begin = position % kArenaBytes, end = begin + bytes;
  for (std::size_t start = begin / kLineBytes * kLineBytes; start < end; start += kLineBytes)
    if (!check_line(lines[start / kLineBytes], start, std::max(begin, start),
                    std::min(end, start + kLineBytes), access, pc))
      return false;
  return true;
}

unsigned char* shared_pointer(std::uint32_t address, std::size_t bytes, const char* user, Pc pc,
                              const Block& of) {
  const std::int64_t offset = static_cast<std::int64_t>(address) - kSharedWindow;
  if (offset < 0 || offset + bytes > of.shared_bytes) {
    report(Defect::kOutOfBounds, pc, "%s: %zu bytes at shared byte %lld, but the block has %zu",
           user, bytes, static_cast<long long>(offset), of.shared_bytes);
    return nullptr;
  }
  return of.shared + offset;
}

std::string describe_agent(std::uint32_t agent) {
  const Block& owner = cluster->block_of(agent);
  const std::string where = cluster->blocks.size() > 1
                                ? " of block " + std::to_string(owner.rank) + " of the cluster"
                                : "";
  const auto threads = static_cast<std::uint32_t>(owner.thread_count);
  const std::uint32_t i = agent - owner.first_agent;
  if (i < threads) return "thread " + std::to_string(i) + where;
  if (i < 2 * threads) return "cp.async of thread " + std::to_string(i - threads) + where;
  return describe_hopper_agent(static_cast<int>(i - 2 * threads)) + where;
}

}  // namespace memeff::emulator
