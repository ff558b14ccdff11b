// Launches: one cluster at a time (without clusters: one block), one fiber per thread. A fiber runs
// until it waits for others.
#include "emulator/internal.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>

namespace memeff::emulator {

Thread* current = nullptr;
Block* block = nullptr;
Cluster* cluster = nullptr;

Config& config() {
  static Config instance;
  return instance;
}
Counters& counters() {
  static Counters instance{};
  return instance;
}

namespace {

constexpr int kMaxThreads = 1024;

FiberContext scheduler_fiber;
std::mt19937_64 random_bits;
int launches = 0;
// Launches that overlap are of a kind, and count their clusters in common.
int launch_groups = 0, clusters_of_group = 0;
std::size_t shared_used_before[kMaxClusterSize] = {};
const char* launch_error = nullptr;
void (*kernel_body)(const void*) = nullptr;

// Stacks are mapped once and reused by every block; untouched pages cost nothing.
char* stack_of_thread(int i) {
  static std::vector<char*> stacks;
  while (static_cast<int>(stacks.size()) <= i) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[i];
}

void yield_to_scheduler() { fiber_switch(current->fiber, scheduler_fiber); }

void fiber_main() {
  kernel_body(cluster->arguments);
  copies_thread_exits();
  hopper_thread_exits();
  current->state = ThreadState::kDone;
  --block->live;
  // Those who wait for "everybody still alive" may have been waiting for this thread only.
  barrier_thread_exits();
  warp_thread_exits();
  cluster_thread_exits();
  yield_to_scheduler();
  std::abort();  // a finished fiber is never resumed
}

uint3 unflatten(unsigned i, dim3 dim) {
  return {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
}

void create_threads(Block& b) {
  b.threads.resize(b.thread_count);
  for (int i = 0; i < b.thread_count; ++i) {
    Thread& thread = b.threads[i];
    thread.block = &b;
    thread.index = unflatten(i, cluster->dim);
    thread.linear = i;
    thread.lane = i % 32;
    thread.warp = i / 32;
    thread.agent = b.first_agent + static_cast<std::uint32_t>(i);
    thread.stack = stack_of_thread(b.rank * b.thread_count + i);
    thread.clock = Clock(cluster->nothing, thread.agent, b.copy_agent(thread));
    fiber_prepare(thread.fiber, thread.stack, kStackBytes, fiber_main);
  }
  b.exits = Clock(cluster->nothing);
  b.meetings.resize((b.thread_count + 31) / 32);
  b.live_lanes.resize(b.meetings.size(), ~0u);
  if (b.thread_count % 32 != 0) b.live_lanes.back() = (1u << b.thread_count % 32) - 1;
}

// The order in which ready threads run until each of them blocks.
std::vector<Thread*> next_round(Cluster& c) {
  std::vector<Thread*> ready;
  for (Block& b : c.blocks)
    for (Thread& thread : b.threads)
      if (thread.state == ThreadState::kReady) ready.push_back(&thread);
  if (ready.empty()) return ready;
  switch (config().schedule) {
    case Schedule::kInOrder: break;
    case Schedule::kReversed: std::reverse(ready.begin(), ready.end()); break;
    case Schedule::kRandom:
      if (random_bits() % 2 == 0) {
        std::shuffle(ready.begin(), ready.end(), random_bits);
      } else {
        // One warp runs alone, as far as it can get: the others fall behind by several barriers.
        const Thread& one = *ready[random_bits() % ready.size()];
        auto elsewhere = [&](const Thread* other) {
          return other->warp != one.warp || other->block != one.block;
        };
        ready.erase(std::remove_if(ready.begin(), ready.end(), elsewhere), ready.end());
      }
      break;
  }
  return ready;
}

// Hands over one pending bulk copy; which one is up to the hardware, hence to the random schedule.
bool deliver_one(Cluster& c) {
  if (c.deliveries.empty()) return false;
  const bool random = config().schedule == Schedule::kRandom;
  const std::size_t i = random ? random_bits() % c.deliveries.size() : 0;
  const auto deliver = std::move(c.deliveries[i]);
  c.deliveries.erase(c.deliveries.begin() + static_cast<std::ptrdiff_t>(i));
  deliver();
  return true;
}

void report_deadlock(const Block& b) {
  std::map<std::string, std::vector<int>> groups;
  Pc any_pc = nullptr;
  for (const Thread& thread : b.threads) {
    if (thread.state != ThreadState::kBlocked) continue;
    const SourceLine at = source_line(thread.waits_at);
    groups[std::string(thread.waits_for) + " at " + at.file + ":" + std::to_string(at.line)]
        .push_back(thread.linear);
    if (any_pc == nullptr) any_pc = thread.waits_at;
  }
  std::string where;
  for (const auto& [place, threads] : groups)
    where += "; " + std::to_string(threads.size()) + " (first " + std::to_string(threads.front()) +
             ", last " + std::to_string(threads.back()) + ") wait in " + place;
  report(Defect::kDeadlock, any_pc, "%d of %d threads of block %u,%u,%u cannot go on%s", b.live,
         b.thread_count, b.index.x, b.index.y, b.index.z, where.c_str());
}

// False when the launch must stop.
bool run_cluster(Cluster& c) {
  cluster = &c;
  for (Block& b : c.blocks) {
    reset_shared_memory(b.rank, shared_used_before[b.rank]);
    create_threads(b);
  }
  while (!c.abandoned) {
    const std::vector<Thread*> round = next_round(c);
    // With nobody ready, asynchronous work is at its last legal moment.
    if (round.empty() && !deliver_one(c)) break;
    for (Thread* const thread : round) {
      if (thread->state != ThreadState::kReady) continue;
      if (config().schedule == Schedule::kRandom && random_bits() % 64 == 0) deliver_one(c);
      current = thread;
      block = thread->block;
      ++counters().fiber_switches;
      fiber_switch(scheduler_fiber, current->fiber);
      current = nullptr;
      block = nullptr;
      if (c.abandoned) break;
    }
  }
  bool deadlock = false;
  for (const Block& b : c.blocks) {
    if (!c.abandoned && b.live > 0) {
      deadlock = true;
      report_deadlock(b);
    }
    shared_used_before[b.rank] = b.shared_bytes;
  }
  while (!c.abandoned && deliver_one(c)) {
  }
  cluster = nullptr;
  return !c.abandoned && !deadlock;
}

bool launch_is_legal(const char* kernel, int cluster_size, dim3 grid, dim3 dim,
                     std::size_t dynamic_bytes) {
  const std::uint64_t threads = std::uint64_t{dim.x} * dim.y * dim.z;
  const char* problem = nullptr;
  if (threads == 0 || threads > kMaxThreads || dim.z > 64) problem = "block dimensions";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) problem = "an empty grid";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) problem = "grid dimensions";
  if (dynamic_bytes > config().shared_memory_limit) problem = "dynamic shared memory";
  if (cluster_size < 1 || cluster_size > kMaxClusterSize) problem = "cluster size";
  if (problem == nullptr && grid.x % static_cast<unsigned>(cluster_size) != 0)
    problem = "a grid that is not made of whole clusters";
  if (problem == nullptr) return true;
  report(Defect::kBadArgument, nullptr,
         "launch of %s: %s (grid %u,%u,%u block %u,%u,%u cluster %d, %zu bytes)", kernel, problem,
         grid.x, grid.y, grid.z, dim.x, dim.y, dim.z, cluster_size, dynamic_bytes);
  return false;
}

}  // namespace

void block_current(const char* waits_for, Pc pc) {
  current->state = ThreadState::kBlocked;
  current->waits_for = waits_for;
  current->waits_at = pc;
  yield_to_scheduler();
}

void abandon_launch() {
  cluster->abandoned = true;
  yield_to_scheduler();
  std::abort();
}

void check_stream(const void* stream, const char* what) {
  if (stream != config().stream)
    report(Defect::kBadArgument, nullptr, "%s on stream %p, expected that of the call, %p", what,
           stream, config().stream);
}

const char* take_launch_error() { return std::exchange(launch_error, nullptr); }

void launch_erased(const char* kernel_name, int cluster_size, bool overlaps, dim3 grid,
                   dim3 block_dim, std::size_t dynamic_shared_bytes, const void* stream,
                   void (*body)(const void*), const void* arguments, std::size_t argument_bytes) {
  static std::mutex one_launch_at_a_time;  // torch's autograd threads launch kernels too
  const std::lock_guard<std::mutex> guard(one_launch_at_a_time);
  if (!launch_is_legal(kernel_name, cluster_size, grid, block_dim, dynamic_shared_bytes)) return;
  check_stream(stream, kernel_name);
  if (config().launches_before_refusal >= 0 && config().launches_before_refusal-- == 0) {
    launch_error = "a launch that the emulator refuses, as it was told";
    return;
  }

  ++launches, ++counters().launches;
  if (!overlaps) ++launch_groups, clusters_of_group = 0;
  kernel_body = body;
  random_bits.seed(config().seed * 7919 + static_cast<std::uint64_t>(launches));
  std::vector<int> order(grid.x * grid.y * grid.z / static_cast<unsigned>(cluster_size));
  std::iota(order.begin(), order.end(), 0);
  if (config().schedule == Schedule::kReversed) std::reverse(order.begin(), order.end());
  if (config().schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), random_bits);

  bool ended = true, waited_for_grid = false;
  for (const int number : order) {
    Cluster c;
    c.dim = block_dim;
    c.grid = grid;
    c.first = clusters_of_group;
    c.number = c.first + number;
    c.launches = launch_groups;
    c.arguments = static_cast<const char*>(arguments);
    c.argument_bytes = argument_bytes;
    c.blocks = std::vector<Block>(cluster_size);
    for (int rank = 0; rank < cluster_size; ++rank) {
      Block& b = c.blocks[rank];
      b.index = unflatten(static_cast<unsigned>(number * cluster_size + rank), grid);
      b.rank = rank;
      b.thread_count = b.live = static_cast<int>(block_dim.x * block_dim.y * block_dim.z);
      b.first_agent = static_cast<std::uint32_t>(rank * b.agents());
      b.shared = shared_arena[rank];
      b.shared_bytes = dynamic_shared_bytes;
    }
    c.agent_clock.assign(cluster_size * c.blocks[0].agents(), 0);
    c.nothing = nothing_known(c.agents());
    c.barrier.arriving = Clock(c.nothing);
    ended = run_cluster(c);
    if (!ended) break;
    for (const Block& b : c.blocks) waited_for_grid |= b.waited_for_grid;
  }
  // A grid ends with its last block: one that waits is enough.
  if (overlaps && ended && !waited_for_grid)
    report(
        Defect::kInFlightAtExit, nullptr,
        "no block of %s ends with griddepcontrol.wait: the next launch would not wait for the one "
        "that this one overlaps",
        kernel_name);
  clusters_of_group += static_cast<int>(order.size());
}

}  // namespace memeff::emulator
