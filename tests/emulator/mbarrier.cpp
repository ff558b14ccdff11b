// mbarriers, the fences of the asynchronous proxy, and the life cycle of a block's Hopper state.
#include <algorithm>
#include <iterator>
#include <set>
#include <string>

#include "emulator/hopper.h"

namespace memeff::emulator {

void HopperDeleter::operator()(HopperState* state) const { delete state; }

HopperState& hopper(Block& of) {
  if (of.hopper == nullptr) {
    of.hopper.reset(new HopperState);
    of.hopper->warpgroups.resize((of.thread_count + 127) / 128);
  }
  return *of.hopper;
}

void hopper_thread_exits() {
  if (block->hopper == nullptr) return;
  wgmma_thread_exits();
  setmaxnreg_thread_exits();
  bulk_stores_thread_exits();
}

std::string describe_hopper_agent(int index) {
  if (index < kWgmmaAgents) return "wgmma of warp " + std::to_string(index);
  index -= kWgmmaAgents;
  if (index < kMbarrierAgents) return "the TMA load of mbarrier #" + std::to_string(index);
  return "a TMA store";
}

bool overlaps_mbarrier(const void* pointer, std::size_t bytes) {
  if (block->hopper == nullptr) return false;
  const auto& barriers = hopper().mbarriers;
  const std::uint32_t begin = window_address(pointer);
  const auto first = barriers.lower_bound(begin & ~7u);
  return first != barriers.end() && first->first < begin + bytes;
}

Mbarrier* find_mbarrier(std::uint32_t address, const char* user, Pc pc, Block& of) {
  auto& mbarriers = hopper(of).mbarriers;
  const auto entry = mbarriers.find(address);
  if (entry == mbarriers.end()) {
    report(Defect::kBadArgument, pc, "%s: shared byte %u is not an initialised mbarrier", user,
           address - kSharedWindow);
    return nullptr;
  }
  const Step& init = entry->second.initialised_by;
  if (init.clock > current->clock.seen(init.agent))
    report(Defect::kSharedRace, pc, "%s is not ordered after mbarrier.init by %s", user,
           describe_agent(init.agent).c_str());
  return &entry->second;
}

void mbarrier_init(std::uint32_t address, int count) {
  const Pc pc = MEMEFF_CALLER_PC;
  auto& barriers = hopper().mbarriers;
  if (address % 8 != 0) report(Defect::kMisaligned, pc, "mbarrier.init at %u", address);
  if (shared_pointer(address, 8, "mbarrier.init", pc) == nullptr) return;
  if (count < 1 || count >= 1 << 20)
    report(Defect::kBadArgument, pc, "mbarrier.init with count %d", count);
  if (barriers.count(address) != 0)
    report(Defect::kBadArgument, pc, "mbarrier.init of a live mbarrier");
  if (static_cast<int>(barriers.size()) >= kMbarrierAgents) {
    report(Defect::kBadArgument, pc, "the emulator has room for %d mbarriers", kMbarrierAgents);
    abandon_launch();
  }
  Mbarrier barrier;
  barrier.count = barrier.pending = count;
  barrier.agent = block->async_agent(kWgmmaAgents + static_cast<int>(barriers.size()));
  barrier.arriving = barrier.completed = Clock(cluster->nothing);
  barrier.initialised_by = current->clock.step();
  barriers[address] = std::move(barrier);
  current->clock.release();
}

void mbarrier_inval(std::uint32_t address) {
  const Pc pc = MEMEFF_CALLER_PC;
  Mbarrier* barrier = find_mbarrier(address, "mbarrier.inval", pc);
  if (barrier == nullptr) return;
  if (!barrier->waiting.empty() || barrier->pending_bytes != 0)
    report(Defect::kBadArgument, pc, "mbarrier.inval of an mbarrier in use");
  hopper().mbarriers.erase(address);
}

void update_phase(Mbarrier& barrier, Pc pc) {
  if (barrier.pending < 0) {
    report(Defect::kBadArgument, pc, "mbarrier: more arrivals than its count %d", barrier.count);
    barrier.pending = 0;
  }
  constexpr std::int64_t kMaxBytes = (1 << 20) - 1;
  if (barrier.pending_bytes > kMaxBytes || barrier.pending_bytes < -kMaxBytes)
    report(Defect::kBadArgument, pc, "mbarrier: transaction count out of range");
  if (barrier.pending != 0 || barrier.pending_bytes != 0) return;

  barrier.phase ^= 1;
  barrier.pending = barrier.count;
  barrier.completed.join(barrier.arriving);
  auto& waiting = barrier.waiting;
  for (const auto& [thread, parity] : waiting)
    if (parity != barrier.phase) wake(*thread);
  const auto woken = [&](const auto& entry) { return entry.second != barrier.phase; };
  waiting.erase(std::remove_if(waiting.begin(), waiting.end(), woken), waiting.end());
}

namespace {

void arrive(Mbarrier& barrier, Pc pc) {
  barrier.arriving.join(current->clock);
  current->clock.release();
  --barrier.pending;
  update_phase(barrier, pc);
}

}  // namespace

void mbarrier_arrive(std::uint32_t address) {
  const Pc pc = MEMEFF_CALLER_PC;
  if (Mbarrier* barrier = find_mbarrier(address, "mbarrier.arrive", pc)) arrive(*barrier, pc);
}

void mbarrier_arrive_cluster(std::uint32_t cluster_address) {
  const Pc pc = MEMEFF_CALLER_PC;
  Block& target = block_at(cluster_address);
  Mbarrier* barrier =
      find_mbarrier(address_in_block(cluster_address), "mbarrier.arrive", pc, target);
  if (barrier == nullptr) return;
  note_remote_access(target, current->clock.step(), pc);
  arrive(*barrier, pc);
}

void mbarrier_expect_tx(std::uint32_t address, std::uint32_t bytes, bool also_arrive) {
  const Pc pc = MEMEFF_CALLER_PC;
  Mbarrier* barrier = find_mbarrier(address, "mbarrier.expect_tx", pc);
  if (barrier == nullptr) return;
  barrier->pending_bytes += bytes;
  if (also_arrive) arrive(*barrier, pc);
}

bool mbarrier_test(std::uint32_t address, int parity) {
  const Pc pc = MEMEFF_CALLER_PC;
  Mbarrier* barrier = find_mbarrier(address, "mbarrier.test_wait", pc);
  if (barrier == nullptr || barrier->phase == parity) return false;
  current->clock.join(barrier->completed);
  return true;
}

// What a report calls the wait, by the mbarrier's number among the block's in the order of addresses.
// Kept for good: threads point there.
const char* name_of_wait(std::uint32_t address, int parity) {
  static std::set<std::string> names;
  const auto& mbarriers = hopper().mbarriers;
  const auto number = std::distance(mbarriers.begin(), mbarriers.find(address));
  return names
      .insert("mbarrier " + std::to_string(number) + ", wait for parity " + std::to_string(parity))
      .first->c_str();
}

void mbarrier_wait(std::uint32_t address, int parity) {
  const Pc pc = MEMEFF_CALLER_PC;
  Mbarrier* barrier = find_mbarrier(address, "mbarrier.try_wait", pc);
  if (barrier == nullptr) return;
  if ((parity & ~1) != 0) {
    report(Defect::kBadArgument, pc, "mbarrier.try_wait with parity %d", parity);
    return;
  }
  if (barrier->phase == parity) {
    barrier->waiting.emplace_back(current, parity);
    block_current(name_of_wait(address, parity), pc);
  }
  current->clock.join(barrier->completed);
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : hopper().mbarriers)
    if (barrier.initialised_by.agent == current->agent) barrier.fenced = true;
}

// All that this thread knows to have happened is now visible to the asynchronous proxy, too.
void fence_proxy_async() {
  current->clock.fence();
  current->clock.release();
  fence_mbarrier_init();
}

}  // namespace memeff::emulator
