// Registered global buffers: exact bounds, read-only inputs, and races inside a cluster and between
// clusters (without clusters: blocks). Clusters of a launch have no order, so any conflict between
// two of them is a race; so is one between launches that may overlap, unless the later thread has
// waited for the grid before. All other launches follow one another.
#include "emulator/internal.h"

#include <algorithm>
#include <map>

namespace memeff::emulator {

namespace {

// The shadow of one granule. Two readers are remembered: enough to catch a write that overtakes a
// read, at a cost that buffers of many megabytes can bear.
struct Cell {
  int launches = -1;
  int write_cluster = -1, read_cluster = -1;
  bool atomic_write = false, several_reading_clusters = false;
  Step write;
  Step reads[2];
  int read_count = 0;
};

struct Buffer {
  const unsigned char* data;
  std::size_t bytes;
  std::string name;
  bool read_only;
  std::size_t granule;
  std::vector<Cell> cells;  // none for read-only buffers
};

std::map<const unsigned char*, Buffer> buffers;
Buffer* last_found = nullptr;

Buffer* buffer_below(const unsigned char* pointer) {
  auto next = buffers.upper_bound(pointer);
  return next == buffers.begin() ? nullptr : &std::prev(next)->second;
}

bool contains(const Buffer& buffer, const unsigned char* pointer, std::size_t bytes) {
  return pointer >= buffer.data && pointer + bytes <= buffer.data + buffer.bytes;
}

bool ordered(const Step& earlier) { return earlier.clock <= current->clock.seen(earlier.agent); }

// Whether the cluster is of a launch whose end the current thread has waited for. (Others of its block
// may not rely on that without a barrier, which is not followed here: each has to wait by itself.)
bool has_ended(int earlier_cluster) {
  return earlier_cluster < cluster->first && current != nullptr && current->waited_for_grid;
}

bool by_this_block(const Step& step) { return &cluster->block_of(step.agent) == block; }

const char* conflict(const Cell& cell, AccessType type) {
  const bool both_atomic = cell.atomic_write && type == AccessType::kAtomic;
  if (cell.write_cluster >= 0 && !both_atomic && !has_ended(cell.write_cluster)) {
    if (cell.write_cluster != cluster->number) return "written by another block";
    if (!ordered(cell.write))
      return by_this_block(cell.write) ? "written by another thread of this block"
                                       : "written by another block of the cluster";
  }
  if (type == AccessType::kRead) return nullptr;
  if (cell.several_reading_clusters ||
      (cell.read_cluster >= 0 && cell.read_cluster != cluster->number))
    return "read by another block";
  for (int i = 0; i < cell.read_count; ++i)
    if (!ordered(cell.reads[i]))
      return by_this_block(cell.reads[i]) ? "read by another thread of this block"
                                          : "read by another block of the cluster";
  return nullptr;
}

void record(Cell& cell, AccessType type, const Step& step) {
  if (type != AccessType::kRead) {
    cell.write_cluster = cluster->number;
    cell.write = step;
    cell.atomic_write = type == AccessType::kAtomic;
    cell.read_cluster = -1;
    cell.read_count = 0;
    cell.several_reading_clusters = false;
    return;
  }
  if (cell.read_cluster != cluster->number) {
    cell.several_reading_clusters |= cell.read_cluster >= 0;
    cell.read_cluster = cluster->number;
    cell.read_count = 0;
  }
  for (int i = 0; i < cell.read_count; ++i)
    if (cell.reads[i].agent == step.agent || ordered(cell.reads[i])) {
      cell.reads[i] = step;
      return;
    }
  if (cell.read_count < 2) {
    cell.reads[cell.read_count++] = step;
  } else {
    cell.reads[0] = cell.reads[1];
    cell.reads[1] = step;
  }
}

const char* verb(AccessType type) {
  return type == AccessType::kRead    ? "read"
         : type == AccessType::kWrite ? "write"
                                      : "atomic update";
}

}  // namespace

void register_buffer(const void* data, std::size_t bytes, const char* name, BufferAccess access,
                     int granule) {
  const auto* begin = static_cast<const unsigned char*>(data);
  const bool read_only = access == BufferAccess::kReadOnly;
  Buffer buffer{begin, bytes, name, read_only, static_cast<std::size_t>(granule), {}};
  if (!read_only && config().check_races)
    buffer.cells.resize((bytes + buffer.granule - 1) / buffer.granule);
  buffers[begin] = std::move(buffer);
  last_found = nullptr;
}

void unregister_buffer(const void* data) {
  buffers.erase(static_cast<const unsigned char*>(data));
  last_found = nullptr;
}

bool is_misaligned(const void* pointer, std::size_t bytes) {
  const bool vector_size = bytes != 0 && (bytes & (bytes - 1)) == 0 && bytes <= 16;
  return vector_size && reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0;
}

bool check_global(const void* pointer, std::size_t bytes, AccessType type, Pc pc,
                  bool report_unknown, const Step* reading) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  Buffer* buffer = last_found;
  if (buffer == nullptr || !contains(*buffer, p, bytes)) {
    buffer = buffer_below(p);
    if (buffer == nullptr || !contains(*buffer, p, bytes)) {
      if (!report_unknown) return false;
      if (buffer != nullptr)
        report(Defect::kOutOfBounds, pc, "%s of %zu bytes at byte %td of buffer '%s' of %zu bytes",
               verb(type), bytes, p - buffer->data, buffer->name.c_str(), buffer->bytes);
      else
        report(Defect::kOutOfBounds, pc, "%s of %zu bytes at %p, in no registered buffer",
               verb(type), bytes, pointer);
      return false;
    }
    last_found = buffer;
  }
  if (type != AccessType::kRead && buffer->read_only) {
    report(Defect::kReadOnlyWrite, pc, "%s of byte %td of buffer '%s'", verb(type),
           p - buffer->data, buffer->name.c_str());
    return false;
  }
  if (buffer->cells.empty() || bytes == 0) return true;
  ++counters().checked_accesses;
  const Step step = reading != nullptr ? *reading : current->clock.step();
  const auto offset = static_cast<std::size_t>(p - buffer->data);
  for (std::size_t i = offset / buffer->granule; i <= (offset + bytes - 1) / buffer->granule; ++i) {
    Cell& cell = buffer->cells[i];
    if (cell.launches != cluster->launches) {
      cell = Cell{};
      cell.launches = cluster->launches;
    }
    if (const char* other = conflict(cell, type)) {
      report(Defect::kGlobalRace, pc, "%s of byte %zu of buffer '%s', which was %s", verb(type),
             i * buffer->granule, buffer->name.c_str(), other);
      record(cell, type, step);
      return true;
    }
    record(cell, type, step);
  }
  return true;
}

}  // namespace memeff::emulator
