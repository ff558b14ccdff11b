// Clusters: barrier.cluster, the blocks' access to each other's shared memory, and whether that is
// still there.
#include "emulator/device_api_sm90.h"
#include "emulator/internal.h"

namespace memeff::emulator {

std::uint32_t cluster_rank() { return static_cast<std::uint32_t>(block->rank); }
std::uint32_t cluster_size() { return static_cast<std::uint32_t>(cluster->blocks.size()); }

// ---- barrier.cluster: everybody who has not exited arrives, then waits ----

namespace {

void complete_if_all_arrived(ClusterBarrier& barrier) {
  if (barrier.arrived == 0 || barrier.arrived < cluster->live()) return;
  barrier.completed = barrier.arriving;
  barrier.arrived = 0;
  ++barrier.phase;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

}  // namespace

void cluster_arrive() {
  const Pc pc = MEMEFF_CALLER_PC;
  meet_whole_warp(WarpOp::kClusterBarrier, pc);
  ClusterBarrier& barrier = cluster->barrier;
  if (current->arrived_at_cluster) {
    report(Defect::kBadArgument, pc, "barrier.cluster.arrive, but the last one was not waited for");
    return;
  }
  current->arrived_at_cluster = true;
  current->cluster_phase = barrier.phase;
  barrier.arriving.join(current->clock);
  current->clock.release();
  ++barrier.arrived;
  complete_if_all_arrived(barrier);
}

void cluster_wait() {
  const Pc pc = MEMEFF_CALLER_PC;
  meet_whole_warp(WarpOp::kClusterBarrier, pc);
  ClusterBarrier& barrier = cluster->barrier;
  if (!current->arrived_at_cluster) {
    report(Defect::kBadArgument, pc, "barrier.cluster.wait without an arrival");
    return;
  }
  if (current->cluster_phase == barrier.phase) {
    barrier.waiting.push_back(current);
    block_current("barrier.cluster.wait", pc);
  }
  current->arrived_at_cluster = false;
  current->clock.join(barrier.completed);
}

// ---- overlapping launches: in truth they follow one another; see global_memory.cpp ----

void launch_dependents() {}
void wait_for_grid() { block->waited_for_grid = current->waited_for_grid = true; }

// ---- distributed shared memory ----

namespace {

constexpr int kRankShift = 24;  // far above all offsets; rank + 1, as 0 is the block itself

}  // namespace

std::uint32_t map_shared(std::uint32_t address, std::uint32_t rank) {
  if (rank >= cluster_size()) {
    report(Defect::kBadArgument, MEMEFF_CALLER_PC, "mapa to block %u of a cluster of %u", rank,
           cluster_size());
    return address;
  }
  return address | (rank + 1) << kRankShift;
}

Block& block_at(std::uint32_t cluster_address) {
  const std::uint32_t rank = cluster_address >> kRankShift;
  return rank == 0 ? *block : cluster->blocks[rank - 1];
}

std::uint32_t address_in_block(std::uint32_t cluster_address) {
  return cluster_address & ((1u << kRankShift) - 1);
}

void note_remote_access(Block& target, const Step& step, Pc pc) {
  if (&target == block) return;
  if (target.live == 0)
    report(Defect::kExitedBlock, pc,
           "access to the shared memory of block %d of the cluster, which "
           "has exited",
           target.rank);
  target.remote_accesses[step.agent] = {step.clock, pc};
}

// Shared memory is gone with a block's last thread. That some thread of the block knew of the
// access means that it came before.
void cluster_thread_exits() {
  ClusterBarrier& barrier = cluster->barrier;
  if (current->arrived_at_cluster && current->cluster_phase == barrier.phase) --barrier.arrived;
  complete_if_all_arrived(barrier);

  block->exits.join(current->clock);
  if (block->live > 0) return;
  for (const auto& [agent, access] : block->remote_accesses)
    if (access.clock > block->exits.seen(agent))
      report(Defect::kExitedBlock, access.pc,
             "block %d of the cluster exits, and nothing orders that after this access by %s",
             block->rank, describe_agent(agent).c_str());
}

}  // namespace memeff::emulator
