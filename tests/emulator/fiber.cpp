#include "emulator/fiber.h"

#include <cstdint>

namespace memeff::emulator {

#if MEMEFF_EMULATOR_USES_UCONTEXT

// Portable, but each switch makes two system calls to save and restore the signal mask.
void fiber_prepare(FiberContext& fiber, char* stack, std::size_t stack_bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void fiber_switch(FiberContext& from, FiberContext& to) { swapcontext(&from.context, &to.context); }

#else

// A kernel of 256 threads switches fibers at every barrier, shuffle and mma, millions of times in a
// test. Only the callee-saved registers of the System V ABI have to survive the call, so a switch
// is six pushes, an exchange of stack pointers and six pops.
extern "C" void memeff_fiber_switch(void** save_stack_pointer, void* next_stack_pointer);

asm(R"(
.text
.globl memeff_fiber_switch
.type memeff_fiber_switch, @function
memeff_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size memeff_fiber_switch, .-memeff_fiber_switch
.section .note.GNU-stack, "", @progbits
.text
)");

void fiber_prepare(FiberContext& fiber, char* stack, std::size_t stack_bytes, void (*entry)()) {
  // The first switch pops six registers and returns into `entry`. The ABI wants the stack pointer
  // at a function's entry to be 8 below a multiple of 16, as if the function had been called.
  const auto top = (reinterpret_cast<std::uintptr_t>(stack) + stack_bytes) & ~std::uintptr_t{15};
  auto* slot = reinterpret_cast<std::uintptr_t*>(top);
  *--slot = 0;  // the return address of `entry`: it has no caller
  *--slot = reinterpret_cast<std::uintptr_t>(entry);
  for (int callee_saved = 0; callee_saved < 6; ++callee_saved) *--slot = 0;
  fiber.stack_pointer = slot;
}

void fiber_switch(FiberContext& from, FiberContext& to) {
  memeff_fiber_switch(&from.stack_pointer, to.stack_pointer);
}

#endif

}  // namespace memeff::emulator
