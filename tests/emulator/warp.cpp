// Warp collectives: lanes meet, the last one to arrive computes everybody's result.
#include "emulator/device_api.h"
#include "emulator/internal.h"

#include <algorithm>

namespace memeff::emulator {

namespace {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::kSync: return "__syncwarp";
    case WarpOp::kShuffle: return "a warp shuffle";
    case WarpOp::kVote: return "a warp vote";
    case WarpOp::kMatch: return "__match_any_sync";
    case WarpOp::kLdmatrix: return "ldmatrix";
    case WarpOp::kStmatrix: return "stmatrix";
    case WarpOp::kMma: return "mma.sync";
    case WarpOp::kClusterBarrier: return "barrier.cluster";
    case WarpOp::kSetmaxnreg: return "setmaxnreg";
    case WarpOp::kNamedBarrier: return "bar.sync or bar.arrive";
  }
  return "?";
}

void finish(std::vector<WarpMeeting>& meetings, std::size_t i) {
  WarpMeeting meeting = meetings[i];
  meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(i));
  meeting.complete(meeting);
  for (int lane = 0; lane < 32; ++lane)
    if (meeting.arrived >> lane & 1) wake(*meeting.thread[lane]);
}

void check_same_instruction(const WarpMeeting& meeting, Pc pc) {
  if (meeting.first_pc == pc) return;
  const SourceLine mine = source_line(pc), first = source_line(meeting.first_pc);
  if (mine.line != first.line || mine.file != first.file)
    report(Defect::kDivergence, pc, "lanes of one warp execute different %s instructions: %s:%d",
           name_of(meeting.op), first.file.c_str(), first.line);
}

}  // namespace

void warp_meet(WarpOp op, unsigned mask, void* operand, bool aligned, Pc pc,
               void (*complete)(WarpMeeting&)) {
  if ((mask >> current->lane & 1) == 0) {
    report(Defect::kDivergence, pc, "%s: lane %d is not in its own mask %08x", name_of(op),
           current->lane, mask);
    return;
  }
  const unsigned live = block->live_lanes[current->warp];
  if (aligned && (mask & ~live) != 0)
    report(Defect::kDivergence, pc, "%s needs all lanes, but lanes %08x do not run", name_of(op),
           mask & ~live);

  auto& meetings = block->meetings[current->warp];
  auto same = [&](const WarpMeeting& meeting) {
    return meeting.op == op && meeting.mask == mask && (meeting.arrived >> current->lane & 1) == 0;
  };
  auto meeting = std::find_if(meetings.begin(), meetings.end(), same);
  if (meeting == meetings.end()) {
    meetings.emplace_back();
    meeting = meetings.end() - 1;
    meeting->op = op;
    meeting->mask = mask;
    meeting->first_pc = pc;
    meeting->complete = complete;
  } else if (aligned) {
    check_same_instruction(*meeting, pc);
  }
  meeting->arrived |= 1u << current->lane;
  meeting->thread[current->lane] = current;
  meeting->operand[current->lane] = operand;
  if ((mask & live & ~meeting->arrived) == 0)
    finish(meetings, static_cast<std::size_t>(meeting - meetings.begin()));
  else
    block_current(name_of(op), pc);
}

void meet_whole_warp(WarpOp op, Pc pc) {
  warp_meet(op, ~0u, nullptr, true, pc, [](WarpMeeting& meeting) {
    if (meeting.arrived != ~0u)
      report(Defect::kDivergence, meeting.first_pc, "%s: only lanes %08x come", name_of(meeting.op),
             meeting.arrived);
  });
}

void warp_thread_exits() {
  auto& meetings = block->meetings[current->warp];
  const unsigned live = block->live_lanes[current->warp] &= ~(1u << current->lane);
  for (std::size_t i = 0; i < meetings.size();) {
    if ((meetings[i].mask & live & ~meetings[i].arrived) == 0)
      finish(meetings, i);
    else
      ++i;
  }
}

void syncwarp(unsigned mask) {
  warp_meet(WarpOp::kSync, mask, nullptr, false, MEMEFF_CALLER_PC, [](WarpMeeting& meeting) {
    Clock joined(cluster->nothing);
    for (int lane = 0; lane < 32; ++lane)
      if (meeting.arrived >> lane & 1) joined.join(meeting.thread[lane]->clock);
    for (int lane = 0; lane < 32; ++lane) {
      if ((meeting.arrived >> lane & 1) == 0) continue;
      meeting.thread[lane]->clock.adopt(joined);
      meeting.thread[lane]->clock.release();
    }
  });
}

// Shuffles and votes exchange registers; unlike __syncwarp they do not order memory accesses.

namespace {

struct ShuffleOperand {
  Shuffle kind;
  std::uint64_t value, result;
  int operand, width;
  Pc pc;
};

int source_lane(const ShuffleOperand& op, int lane) {
  const int first = lane & ~(op.width - 1), end = first + op.width;
  int source = lane;
  switch (op.kind) {
    case Shuffle::kIndex: return first + (op.operand & (op.width - 1));
    case Shuffle::kUp: source = lane - op.operand; return source < first ? lane : source;
    case Shuffle::kDown: source = lane + op.operand; break;
    case Shuffle::kXor: source = lane ^ op.operand; break;
  }
  return source >= end ? lane : source;
}

struct VoteOperand {
  std::uint64_t value;
  unsigned result;
};

}  // namespace

std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t value, int operand, int width) {
  const Pc pc = MEMEFF_CALLER_PC;
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    report(Defect::kBadArgument, pc, "shuffle width %d", width);
    return value;
  }
  ShuffleOperand mine{kind, value, value, operand, width, pc};
  warp_meet(WarpOp::kShuffle, mask, &mine, false, pc, [](WarpMeeting& meeting) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((meeting.arrived >> lane & 1) == 0) continue;
      auto& op = *static_cast<ShuffleOperand*>(meeting.operand[lane]);
      const int source = source_lane(op, lane);
      if ((meeting.arrived >> source & 1) == 0)
        report(Defect::kDivergence, op.pc, "shuffle: lane %d reads lane %d, which takes no part",
               lane, source);
      else
        op.result = static_cast<ShuffleOperand*>(meeting.operand[source])->value;
    }
  });
  return mine.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  VoteOperand mine{predicate, 0};
  warp_meet(WarpOp::kVote, mask, &mine, false, MEMEFF_CALLER_PC, [](WarpMeeting& meeting) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (meeting.arrived >> lane & 1)
        votes |= (static_cast<VoteOperand*>(meeting.operand[lane])->value != 0 ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (meeting.arrived >> lane & 1)
        static_cast<VoteOperand*>(meeting.operand[lane])->result = votes;
  });
  return mine.result;
}

unsigned match_any(unsigned mask, std::uint64_t value) {
  VoteOperand mine{value, 0};
  warp_meet(WarpOp::kMatch, mask, &mine, false, MEMEFF_CALLER_PC, [](WarpMeeting& meeting) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((meeting.arrived >> lane & 1) == 0) continue;
      auto& op = *static_cast<VoteOperand*>(meeting.operand[lane]);
      for (int other = 0; other < 32; ++other)
        if ((meeting.arrived >> other & 1) != 0 &&
            static_cast<VoteOperand*>(meeting.operand[other])->value == op.value)
          op.result |= 1u << other;
    }
  });
  return mine.result;
}

}  // namespace memeff::emulator
