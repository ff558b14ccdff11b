// cp.async, ldmatrix, stmatrix and mma.sync.
#include "emulator/device_api.h"
#include "emulator/internal.h"

#include <algorithm>
#include <cmath>

namespace memeff::emulator {

// ---- cp.async: every thread has its own queue of groups ----

namespace {

void deliver(const AsyncCopy& copy) {
  std::memcpy(copy.destination, copy.source, copy.source_bytes);
  std::memset(copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

void cp_async(std::uint32_t destination, const void* source, int bytes, int source_bytes) {
  const Pc pc = MEMEFF_CALLER_PC;
  ++counters().cp_async;
  unsigned char* target = shared_pointer(destination, bytes, "cp.async", pc);
  if (target == nullptr) return;
  if (source_bytes < 0 || source_bytes > bytes || (bytes != 4 && bytes != 8 && bytes != 16)) {
    report(Defect::kBadArgument, pc, "cp.async of %d bytes from %d", bytes, source_bytes);
    return;
  }
  if (destination % bytes != 0 || reinterpret_cast<std::uintptr_t>(source) % bytes != 0) {
    report(Defect::kMisaligned, pc, "cp.async of %d bytes: shared address %u, source %p", bytes,
           destination - kSharedWindow, source);
    return;
  }
  if (source_bytes > 0 && !check_global(source, source_bytes, AccessType::kRead, pc)) return;

  const std::uint32_t agent = block->copy_agent(*current);
  if (current->open_copies.copies.empty()) current->open_copies.clock = cluster->tick(agent);
  const Access write{AccessType::kWrite, {agent, current->open_copies.clock}, &current->clock};
  check_shared(target, bytes, write, pc);

  const AsyncCopy copy{target, source, bytes, source_bytes};
  current->open_copies.copies.push_back(copy);
  if (config().late_delivery)
    std::memset(target, 0xff, bytes);  // until it lands, nothing there can be relied on
  else
    deliver(copy);
}

void cp_async_commit() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies = {};
}

void cp_async_wait(int groups_still_in_flight) {
  while (static_cast<int>(current->copy_groups.size()) > groups_still_in_flight) {
    const AsyncCopyGroup& group = current->copy_groups.front();
    if (config().late_delivery)
      for (const AsyncCopy& copy : group.copies) deliver(copy);
    current->clock.learn({block->copy_agent(*current), group.clock});
    current->copy_groups.pop_front();
  }
}

void copies_thread_exits() {
  std::size_t pending = current->open_copies.copies.size();
  for (const AsyncCopyGroup& group : current->copy_groups) pending += group.copies.size();
  if (pending != 0)
    report(Defect::kInFlightAtExit, nullptr, "the thread exits with %zu cp.async in flight",
           pending);
}

// ---- ldmatrix, stmatrix: 8x8 matrices of 16-bit elements ----
//
// Lane 8 j + i holds the address of row i of matrix j. A lane's register j holds two elements of
// matrix j: row lane / 4, columns 2 (lane % 4) and the next; row and column swap when transposed.

namespace {

struct MatrixOperand {
  std::uint32_t* registers;
  int matrices;
  std::uint32_t row_address;
  bool transposed;
  Pc pc;
};

struct ElementPair {
  int row[2], column[2];
};
ElementPair elements_of_lane(int lane, bool transposed) {
  const int slow = lane / 4, fast = lane % 4 * 2;
  if (transposed) return {{fast, fast + 1}, {slow, slow}};
  return {{slow, slow}, {fast, fast + 1}};
}

// Extra passes over the 32 banks: 8 rows of 16 bytes fit one pass when no two share 4 banks.
int bank_conflicts(const WarpMeeting& meeting, int matrix) {
  int users[8] = {};
  for (int row = 0; row < 8; ++row)
    ++users[static_cast<MatrixOperand*>(meeting.operand[matrix * 8 + row])->row_address >> 4 & 7];
  return *std::max_element(users, users + 8) - 1;
}

// The row that `lane` addresses, checked, or null.
unsigned char* matrix_row(const WarpMeeting& meeting, int lane, AccessType type, const char* user) {
  const auto& op = *static_cast<MatrixOperand*>(meeting.operand[lane]);
  if (op.row_address % 16 != 0) {
    report(Defect::kMisaligned, op.pc, "%s: row address %u of lane %d is not a multiple of 16",
           user, op.row_address - kSharedWindow, lane);
    return nullptr;
  }
  unsigned char* row = shared_pointer(op.row_address, 16, user, op.pc);
  if (row != nullptr) check_shared(row, 16, generic_access(type, *meeting.thread[lane]), op.pc);
  return row;
}

void complete_ldmatrix(WarpMeeting& meeting) {
  if (meeting.arrived != ~0u) return;  // reported as divergence
  ++counters().ldmatrix;
  const auto& shape = *static_cast<MatrixOperand*>(meeting.operand[0]);
  for (int matrix = 0; matrix < shape.matrices; ++matrix) {
    counters().ldmatrix_conflicts += bank_conflicts(meeting, matrix);
    std::uint16_t element[8][8];
    std::memset(element, 0xff, sizeof element);
    for (int row = 0; row < 8; ++row)
      if (auto* data = matrix_row(meeting, matrix * 8 + row, AccessType::kRead, "ldmatrix"))
        std::memcpy(element[row], data, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const ElementPair at = elements_of_lane(lane, shape.transposed);
      const std::uint32_t low = element[at.row[0]][at.column[0]];
      const std::uint32_t high = element[at.row[1]][at.column[1]];
      static_cast<MatrixOperand*>(meeting.operand[lane])->registers[matrix] = low | high << 16;
    }
  }
}

void complete_stmatrix(WarpMeeting& meeting) {
  if (meeting.arrived != ~0u) return;
  const auto& shape = *static_cast<MatrixOperand*>(meeting.operand[0]);
  for (int matrix = 0; matrix < shape.matrices; ++matrix) {
    std::uint16_t element[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const ElementPair at = elements_of_lane(lane, shape.transposed);
      const std::uint32_t pair =
          static_cast<MatrixOperand*>(meeting.operand[lane])->registers[matrix];
      element[at.row[0]][at.column[0]] = static_cast<std::uint16_t>(pair);
      element[at.row[1]][at.column[1]] = static_cast<std::uint16_t>(pair >> 16);
    }
    for (int row = 0; row < 8; ++row)
      if (auto* data = matrix_row(meeting, matrix * 8 + row, AccessType::kWrite, "stmatrix"))
        std::memcpy(data, element[row], 16);
  }
}

}  // namespace

void ldmatrix(std::uint32_t* registers, int matrices, std::uint32_t row_address, bool transposed) {
  const Pc pc = MEMEFF_CALLER_PC;
  MatrixOperand mine{registers, matrices, row_address, transposed, pc};
  warp_meet(WarpOp::kLdmatrix, ~0u, &mine, true, pc, complete_ldmatrix);
}

void stmatrix(std::uint32_t row_address, const std::uint32_t* registers, int matrices,
              bool transposed) {
  const Pc pc = MEMEFF_CALLER_PC;
  MatrixOperand mine{const_cast<std::uint32_t*>(registers), matrices, row_address, transposed, pc};
  warp_meet(WarpOp::kStmatrix, ~0u, &mine, true, pc, complete_stmatrix);
}

// ---- mma.sync m16n8k8 and m16n8k16 ----
//
// With group = lane / 4 and pair = 2 (lane % 4):
//   A register i   row group + 8 (i % 2), columns pair + 8 (i / 2) and the next
//   B register i   rows pair + 8 i and the next, column group
//   C, D float i   row group + 8 (i / 2), column pair + i % 2

float fp16_to_float(std::uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31)
    magnitude = mantissa != 0 ? NAN : INFINITY;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  else
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return sign != 0 ? -magnitude : magnitude;
}

std::uint32_t min_of_halves(std::uint32_t a, std::uint32_t b) {
  const auto smaller = [](std::uint32_t x, std::uint32_t y) -> std::uint32_t {
    const float of_x = fp16_to_float(static_cast<std::uint16_t>(x));
    const float of_y = fp16_to_float(static_cast<std::uint16_t>(y));
    if (std::isnan(of_x) && std::isnan(of_y)) return 0x7fff;
    return std::isnan(of_y) || of_x < of_y ? x : y;
  };
  return smaller(a & 0xffff, b & 0xffff) | smaller(a >> 16, b >> 16) << 16;
}

namespace {

struct MmaOperand {
  MmaType type;
  int k;
  float* d;
  const std::uint32_t *a, *b;
};

void complete_mma(WarpMeeting& meeting) {
  if (meeting.arrived != ~0u) return;
  ++counters().mma;
  const auto& shape = *static_cast<MmaOperand*>(meeting.operand[0]);
  auto widen = [&](std::uint32_t bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    return shape.type == MmaType::kBf16 ? bf16_to_float(half) : fp16_to_float(half);
  };
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& op = *static_cast<MmaOperand*>(meeting.operand[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < shape.k / 4; ++i)
      for (int half = 0; half < 2; ++half)
        a[group + 8 * (i % 2)][pair + 8 * (i / 2) + half] = widen(op.a[i] >> 16 * half);
    for (int i = 0; i < shape.k / 8; ++i)
      for (int half = 0; half < 2; ++half)
        b[pair + 8 * i + half][group] = widen(op.b[i] >> 16 * half);
  }
  // Products of 16-bit floats are exact in double; the sum is rounded once. Hardware truncates
  // intermediate sums, so results on a GPU differ in the last bits.
  for (int row = 0; row < 16; ++row) {
    const auto d = [&](int column) -> float& {
      const int lane = row % 8 * 4 + column / 2;
      return static_cast<MmaOperand*>(meeting.operand[lane])->d[row / 8 * 2 + column % 2];
    };
    double sums[8];  // side by side, for vector instructions
    for (int column = 0; column < 8; ++column) sums[column] = d(column);
    for (int k = 0; k < shape.k; ++k)
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; ++column) d(column) = static_cast<float>(sums[column]);
  }
}

}  // namespace

void mma_m16n8(MmaType type, int k, float* d, const std::uint32_t* a, const std::uint32_t* b) {
  MmaOperand mine{type, k, d, a, b};
  warp_meet(WarpOp::kMma, ~0u, &mine, true, MEMEFF_CALLER_PC, complete_mma);
}

}  // namespace memeff::emulator
