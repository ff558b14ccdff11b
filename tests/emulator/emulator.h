// What a test (or the emulated backend) uses: configuration, launch, registered buffers, reports.
//
// Kernels themselves never include this file: they include cuda/common/device.cuh, which without
// nvcc takes its CUDA language from emulator/device.h.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace memeff::emulator {

enum class Schedule {
  kInOrder,   // threads 0, 1, 2, ... each until it blocks
  kReversed,  // the last thread first
  kRandom,    // seeded: any ready thread, or a random warp racing ahead of the others
};

struct Config {
  Schedule schedule = Schedule::kInOrder;
  std::uint64_t seed = 1;  // of Schedule::kRandom
  bool late_delivery =
      true;                 // asynchronous copies and products land at the last legal moment, else
                            // at once: code that forgets to wait, or to hold back, fails in one
  bool check_races = true;  // happens-before checks of shared and global memory
  std::size_t shared_memory_limit = 227 * 1024;  // bytes per block; 64, 99, 163 KiB on other GPUs
  std::size_t printed_reports = 20;              // further reports are kept, but not printed
  const void* stream = nullptr;                  // that everything must be launched on
  int launches_before_refusal = -1;  // the one after these is not accepted; negative: all are
  // Called when all threads of a warpgroup have issued a product; `block` is blockIdx.x.
  void (*on_wgmma)(int block, int warpgroup) = nullptr;
};
Config& config();

// Every kind of mistake the emulator looks for.
enum class Defect {
  kSharedRace,         // two unordered accesses of shared memory, one of them a write
  kGlobalRace,         // the same in global memory, inside a block or between blocks
  kOutOfBounds,        // outside the block's shared memory or outside every registered buffer
  kUninitialisedRead,  // of shared memory that nothing in this block has written
  kReadOnlyWrite,      // to a buffer registered as an input
  kMisaligned,         // address not a multiple of the access size
  kForeignStack,       // through a pointer to another thread's local variables
  kInFlightAtExit,     // a thread ends with asynchronous work it never waited for
  kDeadlock,           // threads wait for something that can no longer happen
  kDivergence,         // one warp or block meets at different instructions
  kMissingProxyFence,  // generic accesses not fenced against the asynchronous proxy
  kExitedBlock,        // shared memory of a cluster's block that has exited, or could have
  kBadArgument,        // an operand or a launch configuration that the hardware rejects
};
const char* name_of(Defect defect);

struct Report {
  Defect defect;
  std::string message;  // what happened, by whom
  std::string file;     // of the kernel line responsible, empty when unknown
  int line = 0;
};
const std::vector<Report>& reports();
void clear_reports();

// Kernels may touch registered memory only, so that bounds are exact. `granule` is the size of the
// smallest element in bytes; accesses of a race are told apart at this granularity.
enum class BufferAccess { kReadWrite, kReadOnly };
void register_buffer(const void* data, std::size_t bytes, const char* name, BufferAccess access,
                     int granule = 2);
void unregister_buffer(const void* data);

// Registers a buffer for the lifetime of this object.
class GlobalBuffer {
 public:
  GlobalBuffer(const void* data, std::size_t bytes, const char* name,
               BufferAccess access = BufferAccess::kReadWrite, int granule = 2)
      : data_(data) {
    register_buffer(data, bytes, name, access, granule);
  }
  ~GlobalBuffer() { unregister_buffer(data_); }
  GlobalBuffer(const GlobalBuffer&) = delete;
  GlobalBuffer& operator=(const GlobalBuffer&) = delete;

 private:
  const void* data_;
};

// Reports work on another stream than Config::stream. For what is not launched, as a memset.
void check_stream(const void* stream, const char* what);
// The error of a launch that was not accepted, or null; clears it, as cudaGetLastError does.
const char* take_launch_error();

// Work done since the start, for tests of the emulator and for reasoning about a kernel's cost.
struct Counters {
  std::uint64_t launches, fiber_switches, checked_accesses, barrier_arrivals, mma, ldmatrix,
      cp_async;
  std::uint64_t ldmatrix_conflicts;  // extra shared-memory passes because rows share a bank
  std::uint64_t wgmma, tma;
};
Counters& counters();

// Runs `body(arguments)` once per thread of the grid and returns when all have ended or a defect
// made it impossible to go on. Prefer MEMEFF_LAUNCH, which is the same line for nvcc.
// `cluster` blocks, neighbours along x, form a cluster. With `overlaps`, the grid may run at the same
// time as the one before it, and as those that it overlaps: what they write must not meet.
void launch_erased(const char* kernel_name, int cluster, bool overlaps, dim3 grid, dim3 block,
                   std::size_t dynamic_shared_bytes, const void* stream, void (*body)(const void*),
                   const void* arguments, std::size_t argument_bytes);

template <class Closure>
void launch(const char* kernel_name, int cluster, bool overlaps, dim3 grid, dim3 block,
            std::size_t dynamic_shared_bytes, const void* stream, const Closure& closure) {
  launch_erased(
      kernel_name, cluster, overlaps, grid, block, dynamic_shared_bytes, stream,
      [](const void* erased) { (*static_cast<const Closure*>(erased))(); }, &closure,
      sizeof(Closure));
}

}  // namespace memeff::emulator
