// Fibers: the CPU's stand-in for a GPU thread. A fiber is a stack and a saved stack pointer; it
// runs until it switches away by itself, so kernel code between two barriers is never interrupted.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(MEMEFF_EMULATOR_UCONTEXT)
#define MEMEFF_EMULATOR_USES_UCONTEXT 1
#include <ucontext.h>
#else
#define MEMEFF_EMULATOR_USES_UCONTEXT 0
#endif

namespace memeff::emulator {

struct FiberContext {
#if MEMEFF_EMULATOR_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// Makes `fiber` start at `entry` on the given stack at the first switch to it. `entry` never
// returns.
void fiber_prepare(FiberContext& fiber, char* stack, std::size_t stack_bytes, void (*entry)());

// Saves the running fiber in `from` and continues `to`.
void fiber_switch(FiberContext& from, FiberContext& to);

}  // namespace memeff::emulator
