// State of a block's Hopper features: mbarriers, bulk copies (TMA) and asynchronous products
// (wgmma).
#pragma once

#include <deque>
#include <map>

#include "emulator/device_api_sm90.h"
#include "emulator/internal.h"

namespace memeff::emulator {

// Asynchronous agents besides cp.async, numbered from Block::async_agent(0).
constexpr int kWgmmaAgents = 32;      // products of each warp: warps finish at different times
constexpr int kMbarrierAgents = 56;   // TMA loads that complete on each mbarrier
constexpr int kBulkStoreAgents = 16;  // TMA stores of each thread that issues any
static_assert(kWgmmaAgents + kMbarrierAgents + kBulkStoreAgents == kAsyncAgents);

struct Mbarrier {
  int count = 0;    // arrivals that complete a phase
  int pending = 0;  // still missing in the current phase
  std::int64_t pending_bytes = 0;
  int phase = 0;              // parity of the current phase
  std::uint32_t agent = 0;    // stands for the TMA loads that complete here
  Clock arriving, completed;  // what arrivals of this phase, and of finished phases, knew
  Step initialised_by;
  bool fenced = false;  // the initialisation is visible to the asynchronous proxy
  std::vector<std::pair<Thread*, int>> waiting;  // and the parity each waits for
};

// One wgmma instruction of a warpgroup. Its 128 threads issue it one by one.
struct WgmmaOp {
  WgmmaShape shape;
  std::uint64_t a_descriptor = 0, b_descriptor = 0;
  bool accumulate = false, a_in_registers = false;
  std::uint32_t a_registers[128][4];
  const std::uint32_t* a_source[128];  // which must keep these values until the product has ended
  float* accumulator[128];
  int issued = 0;
  bool executed = false;
  std::uint32_t clock[4] = {};  // step of each warp's agent
};

struct Warpgroup {
  std::deque<WgmmaOp> ops;  // ops[0] has number `first_op`
  int first_op = 0;
  int issued[128] = {}, waited[128] = {};  // number of the next op to issue, to wait for
  bool fenced[128] = {};
  std::vector<int> groups[128];  // end of every committed group
  // Values of accumulators while products are in flight; the registers themselves are undefined.
  std::map<float*, std::vector<float>> in_flight[128];
  std::vector<Thread*> waiting;
  int registers[4] = {};  // per thread of each warp, once set; 0: as launched
};

struct BulkStore {
  TensorMap map;
  unsigned char* source;
  int column, row;
  bool add;
};
struct BulkStoreGroup {
  std::vector<BulkStore> stores;
  std::uint32_t clock = 0;
};
struct BulkStores {  // of one thread
  std::uint32_t agent = 0;
  BulkStoreGroup open;
  std::deque<BulkStoreGroup> groups;
};

struct HopperState {
  std::map<std::uint32_t, Mbarrier> mbarriers;  // by shared address
  std::vector<Warpgroup> warpgroups;
  std::map<int, BulkStores> stores;  // by thread
  int free_registers = 0;            // per thread of a warp, that no warp has
  std::vector<Thread*> waiting_for_registers;
};

HopperState& hopper(Block& of = *block);  // made when first used

// An initialised mbarrier whose initialisation the current thread may rely on, or null after a
// report.
Mbarrier* find_mbarrier(std::uint32_t address, const char* user, Pc pc, Block& of = *block);
// Completes the phase when nothing is missing any more.
void update_phase(Mbarrier& barrier, Pc pc);
void wgmma_thread_exits();
void setmaxnreg_thread_exits();
void bulk_stores_thread_exits();

}  // namespace memeff::emulator
