// __syncthreads and the named barriers of PTX (bar.sync, bar.arrive).
#include "emulator/device_api.h"
#include "emulator/internal.h"

namespace memeff::emulator {

namespace {

void complete(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    thread->clock.adopt(barrier.joined);
    wake(*thread);
  }
  barrier = Barrier{};
}

int arrivals_needed(const Barrier& barrier) {
  return barrier.whole_block ? block->live : barrier.expected;
}

void check_agreement(const Barrier& barrier, int id, int expected, bool whole_block, Pc pc) {
  if (barrier.expected != expected || barrier.whole_block != whole_block) {
    report(Defect::kDivergence, pc, "barrier %d is used with counts %d and %d at once", id,
           barrier.expected, expected);
    return;
  }
  if (!whole_block || barrier.first_pc == pc) return;
  // The compiler may have duplicated one barrier of the source, so equal lines are fine.
  const SourceLine mine = source_line(pc), first = source_line(barrier.first_pc);
  if (mine.line != first.line || mine.file != first.file)
    report(Defect::kDivergence, pc, "threads of one block wait at different __syncthreads: %s:%d",
           first.file.c_str(), first.line);
}

void arrive(int id, int expected, bool whole_block, bool waits, Pc pc) {
  if (id < 0 || id > 15) {
    report(Defect::kBadArgument, pc, "there is no barrier %d", id);
    return;
  }
  if (!whole_block && (expected <= 0 || expected % 32 != 0))
    report(Defect::kBadArgument, pc, "barrier %d: count %d is not a multiple of 32", id, expected);

  Barrier& barrier = block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.whole_block = whole_block;
    barrier.first_pc = pc;
    barrier.joined = Clock(cluster->nothing);
  } else {
    check_agreement(barrier, id, expected, whole_block, pc);
  }
  if (barrier.present[current->linear])
    report(Defect::kDivergence, pc, "barrier %d: a thread arrives again before the others have",
           id);
  barrier.present.set(current->linear);
  barrier.joined.join(current->clock);
  current->clock.release();
  ++barrier.arrived;
  ++counters().barrier_arrivals;
  if (waits) barrier.waiting.push_back(current);
  if (barrier.arrived >= arrivals_needed(barrier)) {
    complete(barrier);
  } else if (waits) {
    block_current(whole_block ? "__syncthreads" : "bar.sync", pc);
  }
}

}  // namespace

void syncthreads() { arrive(0, block->thread_count, true, true, MEMEFF_CALLER_PC); }

// Named barriers are .aligned: whole warps come, and count 32 at a time.
void bar_sync(int barrier, int threads) {
  const Pc pc = MEMEFF_CALLER_PC;
  meet_whole_warp(WarpOp::kNamedBarrier, pc);
  arrive(barrier, threads, false, true, pc);
}
void bar_arrive(int barrier, int threads) {
  const Pc pc = MEMEFF_CALLER_PC;
  meet_whole_warp(WarpOp::kNamedBarrier, pc);
  arrive(barrier, threads, false, false, pc);
}

void barrier_thread_exits() {
  Barrier& barrier = block->barriers[0];
  if (barrier.whole_block && barrier.arrived > 0 && barrier.arrived >= block->live)
    complete(barrier);
}

}  // namespace memeff::emulator
