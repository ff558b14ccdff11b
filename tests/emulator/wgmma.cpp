// Asynchronous products of a warpgroup: D[64,n] += A[64,16] B[16,n].
//
// Accumulator i of thread t: row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2),
//                            column 2 (t % 4) + i % 2 + 8 (i / 4).
// A in registers, register i of thread t: the same rows with i % 2, columns 2 (t % 4) + 8 (i / 2)
// and the next.
//
// Operands in shared memory are described by 64-bit descriptors; with 128-byte swizzle they consist
// of atoms of 8 rows of 128 bytes, each aligned to 1024:
//   K-major    a row is 64 adjacent k of one m (or n); `stride` bytes from one group of 8 m to the
//              next
//   MN-major   a row is 64 adjacent m (or n) of one k; `leading` bytes from one group of 64 m to
//              the next, `stride` bytes from one group of 8 k to the next
#include <algorithm>

#include "emulator/hopper.h"

namespace memeff::emulator {

namespace {

Warpgroup& my_group() { return hopper().warpgroups[current->linear / 128]; }
int my_index() { return current->linear % 128; }
std::uint32_t my_agent() { return block->async_agent(current->warp); }

struct Descriptor {
  std::uint32_t start, leading, stride;
};

Descriptor decode(std::uint64_t bits) {
  const auto field = [&](int shift) {
    return static_cast<std::uint32_t>(bits >> shift & 0x3fff) << 4;
  };
  return {field(0), field(16), field(32)};
}

void check_descriptor(std::uint64_t bits, const char* operand, Pc pc) {
  const Descriptor d = decode(bits);
  if (bits >> 62 != 1)
    report(Defect::kBadArgument, pc, "wgmma operand %s: only 128-byte swizzle is emulated",
           operand);
  if ((d.start & 0x380) != 0 || (bits >> 49 & 7) != 0)
    report(Defect::kBadArgument, pc, "wgmma operand %s does not start in row 0 of a swizzle atom",
           operand);
}

std::uint32_t swizzled(std::uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Shared address of element (mn, k) of an operand.
std::uint32_t element_address(const Descriptor& d, bool mn_major, int mn, int k) {
  const std::uint32_t address =
      mn_major ? d.start + mn / 64 * d.leading + mn % 64 * 2 + k / 8 * d.stride + k % 8 * 128
               : d.start + mn / 8 * d.stride + mn % 8 * 128 + k * 2;
  return swizzled(address);
}

// Checks the reads of elements [begin, end) x 16 in pieces of 16 bytes.
bool check_operand(std::uint64_t bits, bool mn_major, int begin, int end, const Access& access,
                   const char* name, Pc pc) {
  const Descriptor d = decode(bits);
  for (int mn = begin; mn < end; mn += mn_major ? 8 : 1)
    for (int k = 0; k < 16; k += mn_major ? 1 : 8) {
      const unsigned char* piece =
          shared_pointer(element_address(d, mn_major, mn, k), 16, name, pc);
      if (piece == nullptr || !check_shared(piece, 16, access, pc)) return false;
    }
  return true;
}

float widen(const WgmmaShape& shape, std::uint32_t bits) {
  const auto half = static_cast<std::uint16_t>(bits);
  return shape.bf16 ? bf16_to_float(half) : fp16_to_float(half);
}

float load_element(const WgmmaOp& op, std::uint64_t descriptor, bool mn_major, int mn, int k) {
  const std::uint32_t address = element_address(decode(descriptor), mn_major, mn, k);
  std::uint16_t bits = 0x7fff;  // NaN: the address has been reported
  if (address >= kSharedWindow && address - kSharedWindow + 2 <= kArenaBytes)
    std::memcpy(&bits, block->shared + address - kSharedWindow, 2);
  return widen(op.shape, bits);
}

float a_element(const WgmmaOp& op, int row, int k) {
  if (!op.a_in_registers) return load_element(op, op.a_descriptor, op.shape.a_transposed, row, k);
  const int thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
  const std::uint32_t pair = op.a_registers[thread][row % 16 / 8 + k / 8 * 2];
  return widen(op.shape, k % 2 != 0 ? pair >> 16 : pair);
}

void execute(Warpgroup& group, WgmmaOp& op) {
  const int n = op.shape.n;
  static double a[64][16], b[16][256], d[64][256];
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) a[row][k] = a_element(op, row, k);
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < n; ++column)
      b[k][column] = load_element(op, op.b_descriptor, op.shape.b_transposed, column, k);

  const auto for_each_accumulator = [&](auto body) {
    for (int thread = 0; thread < 128; ++thread) {
      std::vector<float>& registers = group.in_flight[thread][op.accumulator[thread]];
      for (int i = 0; i < n / 2; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
        const int column = thread % 4 * 2 + i % 2 + i / 4 * 8;
        body(registers[i], d[row][column]);
      }
    }
  };
  for_each_accumulator(
      [&](float in_register, double& sum) { sum = op.accumulate ? in_register : 0.0; });
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < n; ++column) d[row][column] += a[row][k] * b[k][column];
  for_each_accumulator(
      [](float& in_register, double sum) { in_register = static_cast<float>(sum); });
  op.executed = true;
}

// Products of one warpgroup execute in order.
void execute_up_to(Warpgroup& group, int number) {
  for (int i = group.first_op; i <= number; ++i) {
    WgmmaOp& op = group.ops[i - group.first_op];
    if (!op.executed && op.issued == 128) execute(group, op);
  }
}

void forget_finished(Warpgroup& group) {
  const int waited_by_all = *std::min_element(group.waited, group.waited + 128);
  while (group.first_op < waited_by_all) {
    group.ops.pop_front();
    ++group.first_op;
  }
}

// Gives a thread the accumulators that no product in flight uses any more.
void return_accumulators(Warpgroup& group, int thread) {
  auto& in_flight = group.in_flight[thread];
  for (auto entry = in_flight.begin(); entry != in_flight.end();) {
    bool busy = false;
    for (int i = group.waited[thread]; i < group.issued[thread]; ++i)
      busy |= group.ops[i - group.first_op].accumulator[thread] == entry->first;
    if (busy) {
      ++entry;
      continue;
    }
    std::copy(entry->second.begin(), entry->second.end(), entry->first);
    entry = in_flight.erase(entry);
  }
}

bool same_operands(const WgmmaOp& a, const WgmmaOp& b) {
  return a.a_descriptor == b.a_descriptor && a.b_descriptor == b.b_descriptor &&
         a.accumulate == b.accumulate && a.a_in_registers == b.a_in_registers &&
         a.shape.n == b.shape.n && a.shape.bf16 == b.shape.bf16 &&
         a.shape.a_transposed == b.shape.a_transposed &&
         a.shape.b_transposed == b.shape.b_transposed;
}

}  // namespace

void wgmma_fence() { my_group().fenced[my_index()] = true; }

void wgmma(const WgmmaShape& shape, float* d, std::uint64_t a_descriptor,
           const std::uint32_t* a_registers, std::uint64_t b_descriptor, bool accumulate) {
  const Pc pc = MEMEFF_CALLER_PC;
  Warpgroup& group = my_group();
  const int me = my_index();
  if (!group.fenced[me]) {
    report(Defect::kBadArgument, pc,
           "wgmma without wgmma.fence since its registers were last accessed");
    group.fenced[me] = true;
  }

  WgmmaOp wanted;
  wanted.shape = shape;
  wanted.a_descriptor = a_descriptor;
  wanted.b_descriptor = b_descriptor;
  wanted.accumulate = accumulate;
  wanted.a_in_registers = a_registers != nullptr;
  const int number = group.issued[me]++;
  if (number - group.first_op == static_cast<int>(group.ops.size())) {
    group.ops.push_back(wanted);
    if (a_registers == nullptr) check_descriptor(a_descriptor, "A", pc);
    check_descriptor(b_descriptor, "B", pc);
  }
  WgmmaOp& op = group.ops[number - group.first_op];
  if (!same_operands(op, wanted))
    report(Defect::kDivergence, pc, "the threads of a warpgroup issue different wgmma");
  op.a_source[me] = a_registers;
  if (a_registers != nullptr) std::memcpy(op.a_registers[me], a_registers, 16);

  // Registers of the accumulator are not to be touched until the product has been waited for.
  op.accumulator[me] = d;
  auto& held = group.in_flight[me][d];
  if (held.empty()) held.assign(d, d + shape.n / 2);
  std::memset(d, 0xff, shape.n / 2 * sizeof(float));

  // Each warp reads its 16 rows of A and all of B, knowing what its first thread knows, which for
  // an aligned instruction stands for all of them.
  if (current->lane == 0) {
    op.clock[me / 32] = cluster->tick(my_agent());
    const Access access{
        AccessType::kRead, {my_agent(), op.clock[me / 32]}, &current->clock, Proxy::kAsync};
    const int row = me / 32 * 16;
    if (op.a_in_registers ||
        check_operand(a_descriptor, shape.a_transposed, row, row + 16, access, "wgmma A", pc))
      check_operand(b_descriptor, shape.b_transposed, 0, shape.n, access, "wgmma B", pc);
  }
  if (++op.issued < 128) return;
  ++counters().wgmma;
  if (config().on_wgmma != nullptr)
    config().on_wgmma(static_cast<int>(block->index.x), current->linear / 128);
  if (!config().late_delivery) execute_up_to(group, number);
  for (Thread* thread : group.waiting) wake(*thread);
  group.waiting.clear();
}

void wgmma_commit() {
  Warpgroup& group = my_group();
  group.groups[my_index()].push_back(group.issued[my_index()]);
}

void wgmma_wait(int pending) {
  const Pc pc = MEMEFF_CALLER_PC;
  Warpgroup& group = my_group();
  const int me = my_index();
  group.fenced[me] = false;
  auto& groups = group.groups[me];
  const int finished = static_cast<int>(groups.size()) - pending;
  if (finished <= 0) return;
  const int end = groups[finished - 1];
  groups.erase(groups.begin(), groups.begin() + finished);
  for (int i = group.waited[me]; i < end; ++i) {
    while (group.ops[i - group.first_op].issued < 128) {
      group.waiting.push_back(current);
      block_current("wgmma.wait_group, for warps that have not issued the product", pc);
    }
    execute_up_to(group, i);
    const WgmmaOp& op = group.ops[i - group.first_op];
    if (op.a_in_registers && std::memcmp(op.a_registers[me], op.a_source[me], 16) != 0)
      report(Defect::kBadArgument, pc, "registers of A changed before the wait for their product");
    current->clock.learn({my_agent(), op.clock[me / 32]});
  }
  group.waited[me] = std::max(group.waited[me], end);
  return_accumulators(group, me);
  forget_finished(group);
}

void wgmma_thread_exits() {
  const Warpgroup& group = my_group();
  if (group.waited[my_index()] < group.issued[my_index()])
    report(Defect::kInFlightAtExit, nullptr, "the thread exits with wgmma in flight");
}

// The block's registers belong to its warps, all of them: an increase waits for what others give.
void setmaxnreg(int registers, bool increase) {
  const Pc pc = MEMEFF_CALLER_PC;
  meet_whole_warp(WarpOp::kSetmaxnreg, pc);
  if (registers % 8 != 0 || registers < 24 || registers > 256)
    report(Defect::kBadArgument, pc, "setmaxnreg %d", registers);
  if (block->thread_count % 128 != 0)
    report(Defect::kBadArgument, pc, "setmaxnreg in a block that is not made of warpgroups");
  if (current->lane != 0) return;
  // At launch: what a thread of the only block on a multiprocessor can have.
  constexpr int kOfMultiprocessor = 65536, kMostOfThread = 255;
  const int launched = std::min(kOfMultiprocessor / block->thread_count, kMostOfThread) / 8 * 8;
  int& mine = my_group().registers[my_index() / 32];
  const int before = mine == 0 ? launched : mine;
  if (increase ? registers < before : registers > before)
    report(Defect::kBadArgument, pc, "setmaxnreg.%s %d of a warp that has %d",
           increase ? "inc" : "dec", registers, before);
  HopperState& state = hopper();
  while (registers - before > state.free_registers) {
    state.waiting_for_registers.push_back(current);
    block_current("setmaxnreg.inc, for registers of other warps", pc);
  }
  state.free_registers -= registers - before;
  mine = registers;
  for (Thread* thread : state.waiting_for_registers) wake(*thread);
  state.waiting_for_registers.clear();
}

void setmaxnreg_thread_exits() {
  if (block->live > 1) return;
  for (const Warpgroup& group : hopper().warpgroups)
    for (const int registers : group.registers)
      if (registers != group.registers[0])
        report(Defect::kDivergence, nullptr,
               "setmaxnreg: the warps of a warpgroup end with %d and %d registers, 0 as launched",
               group.registers[0], registers);
}

}  // namespace memeff::emulator
