// Shared by the emulator's own sources, which are compiled without instrumentation.
#pragma once

#include "emulator/clock.h"
#include "emulator/emulator.h"
#include "emulator/fiber.h"

#include <bitset>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>

namespace memeff::emulator {

// Where in the kernel something happened: the return address of the hook or primitive it called.
using Pc = const void*;
#define MEMEFF_CALLER_PC (__builtin_return_address(0))

// ---- reports (report.cpp) ----

struct SourceLine {
  std::string file;
  int line = 0;
};
SourceLine source_line(
    Pc pc);  // the innermost line that is neither a PTX primitive nor a CUDA header
__attribute__((format(printf, 3, 4))) void report(Defect defect, Pc pc, const char* format, ...);

// ---- happens-before (clock.h) ----

enum class Proxy : std::uint8_t { kGeneric, kAsync };
enum class AccessType : std::uint8_t { kRead, kWrite, kAtomic };

struct Access {
  AccessType type;
  Step by;
  const Clock* knowledge;  // what the issuing thread knows at the moment of issue
  Proxy proxy = Proxy::kGeneric;
};

// ---- threads, blocks and clusters ----

struct AsyncCopy {  // one cp.async
  unsigned char* destination;
  const void* source;
  int bytes, source_bytes;  // the rest is filled with zeros
};
struct AsyncCopyGroup {
  std::vector<AsyncCopy> copies;
  std::uint32_t clock = 0;
};

constexpr std::size_t kStackBytes = 256 * 1024;  // of a thread

enum class ThreadState { kReady, kBlocked, kDone };

struct Block;

struct Thread {
  Block* block;
  uint3 index;
  int linear, lane, warp;
  std::uint32_t agent;
  ThreadState state = ThreadState::kReady;
  const char* waits_for = "";
  Pc waits_at = nullptr;
  FiberContext fiber;
  char* stack = nullptr;
  Clock clock;
  bool waited_for_grid = false;            // griddepcontrol.wait
  bool arrived_at_cluster = false;         // and has not waited since
  int cluster_phase = 0;                   // of the last arrival
  AsyncCopyGroup open_copies;              // issued, not yet committed
  std::deque<AsyncCopyGroup> copy_groups;  // committed, not yet waited for
};

struct Barrier {
  int arrived = 0, expected = 0;
  bool whole_block = false;   // __syncthreads: everybody who has not exited
  std::bitset<1024> present;  // threads that have arrived
  std::vector<Thread*> waiting;
  Clock joined;
  Pc first_pc = nullptr;
};

// Lanes of one warp that have arrived at a collective operation and wait for the others.
enum class WarpOp {
  kSync,
  kShuffle,
  kVote,
  kMatch,
  kLdmatrix,
  kStmatrix,
  kMma,
  kClusterBarrier,
  kSetmaxnreg,
  kNamedBarrier
};
struct WarpMeeting {
  WarpOp op;
  unsigned mask = 0, arrived = 0;
  Pc first_pc = nullptr;
  void (*complete)(WarpMeeting&) = nullptr;  // run once, by the last lane
  Thread* thread[32] = {};
  void* operand[32] = {};
};

constexpr int kAsyncAgents = 104;  // besides cp.async: wgmma, TMA loads and stores (hopper.h)

struct HopperState;  // mbarriers and warpgroups (hopper.h)
struct HopperDeleter {
  void operator()(HopperState*) const;
};

// What another block did to this one's shared memory: its last access, and where it was made.
struct RemoteAccess {
  std::uint32_t clock = 0;
  Pc pc = nullptr;
};

struct Block {
  uint3 index;
  int rank = 0;  // in its cluster
  int thread_count = 0, live = 0;
  std::uint32_t first_agent = 0;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<Thread> threads;
  bool waited_for_grid = false;                           // one of its threads
  Clock exits;                                            // what exited threads knew
  std::map<std::uint32_t, RemoteAccess> remote_accesses;  // by agent
  Barrier barriers[16];
  std::vector<std::vector<WarpMeeting>> meetings;  // per warp
  std::vector<unsigned> live_lanes;  // per warp; those that have exited are not waited for
  struct StaticArray {
    const char *function, *name;
    unsigned char* data;
  };
  std::vector<StaticArray> static_arrays;
  std::unique_ptr<HopperState, HopperDeleter> hopper;

  int agents() const { return 2 * thread_count + kAsyncAgents; }
  std::uint32_t copy_agent(const Thread& t) const { return first_agent + thread_count + t.linear; }
  std::uint32_t async_agent(int i) const { return first_agent + 2 * thread_count + i; }
};

constexpr int kMaxClusterSize = 2;

// barrier.cluster: phases of arrivals by all threads of the cluster that have not exited.
struct ClusterBarrier {
  int arrived = 0, phase = 0;
  Clock arriving, completed;
  std::vector<Thread*> waiting;
};

// Blocks that run at the same time. Without clusters, each block is one by itself.
struct Cluster {
  dim3 dim, grid;          // of a block, of the launch
  int number = 0;          // among those of all launches that overlap
  int first = 0;           // number of this launch
  int launches = 0;        // the same for all of these, different for others
  bool abandoned = false;  // a defect after which running on would corrupt the test program
  const char* arguments = nullptr;  // readable: the launched closure, i.e. the kernel's arguments
  std::size_t argument_bytes = 0;
  std::vector<Block> blocks;
  std::vector<std::uint32_t> agent_clock;
  SharedKnowledge nothing;                        // known by anybody: the start
  std::vector<std::function<void()>> deliveries;  // pending bulk copies, in any order
  ClusterBarrier barrier;

  int agents() const { return static_cast<int>(agent_clock.size()); }
  std::uint32_t tick(std::uint32_t agent) { return ++agent_clock[agent]; }
  const Block& block_of(std::uint32_t agent) const { return blocks[agent / blocks[0].agents()]; }
  int live() const {
    int threads = 0;
    for (const Block& b : blocks) threads += b.live;
    return threads;
  }
};

extern Thread* current;  // null outside kernels
extern Block* block;     // of the current thread
extern Cluster* cluster;

void block_current(const char* waits_for, Pc pc);  // returns when another fiber has woken this one
inline void wake(Thread& thread) { thread.state = ThreadState::kReady; }
[[noreturn]] void abandon_launch();

inline Access generic_access(AccessType type, const Thread& thread) {
  return {type, thread.clock.step(), &thread.clock};
}

// ---- shared memory (shared_memory.cpp) ----

constexpr std::size_t kArenaBytes = 240 * 1024;
// The address of the first byte in the shared window. Not 0, so that null is not a valid address;
// 1024, so that alignment in the arena is alignment of the address.
constexpr std::uint32_t kSharedWindow = 1024;
extern unsigned char shared_arena[kMaxClusterSize][kArenaBytes];  // by rank

inline bool in_shared_arena(const void* pointer) {  // of the current block
  const auto* p = static_cast<const unsigned char*>(pointer);
  return p >= block->shared && p < block->shared + kArenaBytes;
}
inline std::uint32_t window_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - block->shared;
  return static_cast<std::uint32_t>(offset) + kSharedWindow;
}
void reset_shared_memory(int rank, std::size_t previously_used);
// The pointer may lie in the arena of another block.
bool check_shared(const void* pointer, std::size_t bytes, const Access& access, Pc pc);
// Pointer to `bytes` at a shared-window address, or null after a report.
unsigned char* shared_pointer(std::uint32_t address, std::size_t bytes, const char* user, Pc pc,
                              const Block& of = *block);
std::string describe_agent(std::uint32_t agent);

// ---- global memory (global_memory.cpp) ----

// False when the address lies in no registered buffer; `report_unknown` says whether to complain.
// `reading`: the asynchronous step that reads, where it is not the current thread itself.
bool check_global(const void* pointer, std::size_t bytes, AccessType type, Pc pc,
                  bool report_unknown = true, const Step* reading = nullptr);
bool is_misaligned(const void* pointer, std::size_t bytes);

// ---- warp collectives (warp.cpp) ----

void warp_meet(WarpOp op, unsigned mask, void* operand, bool aligned, Pc pc,
               void (*complete)(WarpMeeting&));
// For instructions that are .aligned: all lanes meet, and none leaves before.
void meet_whole_warp(WarpOp op, Pc pc);
void warp_thread_exits();
void barrier_thread_exits();

// ---- clusters (cluster.cpp) ----

// The two parts of an address in the cluster's shared memory.
Block& block_at(std::uint32_t cluster_address);
std::uint32_t address_in_block(std::uint32_t cluster_address);
// The current block touches the shared memory of `target`, which must be there until then.
void note_remote_access(Block& target, const Step& step, Pc pc);
void cluster_thread_exits();

// ---- asynchronous work (sm80.cpp, hopper) ----

void copies_thread_exits();
void hopper_thread_exits();
bool overlaps_mbarrier(const void* pointer, std::size_t bytes);
std::string describe_hopper_agent(int index);

inline float bf16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
float fp16_to_float(std::uint16_t bits);

}  // namespace memeff::emulator
