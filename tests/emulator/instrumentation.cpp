// The compiler's view of plain loads and stores. Kernels are compiled with -fsanitize=thread and
// linked without its runtime: the calls it inserts before every access arrive here.
#include "emulator/device_api.h"
#include "emulator/internal.h"

#include <link.h>

#include <algorithm>

namespace memeff::emulator {

namespace {

const Thread* stack_owner(const void* pointer) {
  const auto* p = static_cast<const char*>(pointer);
  for (const Block& b : cluster->blocks)
    for (const Thread& thread : b.threads)
      if (p >= thread.stack && p < thread.stack + kStackBytes) return &thread;
  return nullptr;
}

// Constants that the compiler put into a read-only segment of the program or one of its libraries.
bool is_constant(const void* pointer) {
  struct Query {
    std::uintptr_t address;
    bool found;
  } query{reinterpret_cast<std::uintptr_t>(pointer), false};
  dl_iterate_phdr(
      [](dl_phdr_info* module, std::size_t, void* data) {
        auto& q = *static_cast<Query*>(data);
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          const std::uintptr_t begin = module->dlpi_addr + segment.p_vaddr;
          const bool read_only = segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0;
          if (read_only && q.address >= begin && q.address < begin + segment.p_memsz)
            q.found = true;
        }
        return 0;
      },
      &query);
  return query.found;
}

void check_plain_shared(const void* pointer, std::size_t bytes, AccessType type, Pc pc) {
  const auto offset = static_cast<const unsigned char*>(pointer) - block->shared;
  if (offset + bytes > block->shared_bytes) {
    report(Defect::kOutOfBounds, pc, "%s of %zu bytes at shared byte %td, but the block has %zu",
           type == AccessType::kRead ? "read" : "write", bytes, offset, block->shared_bytes);
    abandon_launch();
  }
  if (overlaps_mbarrier(pointer, bytes)) {
    report(Defect::kBadArgument, pc, "plain access to an mbarrier at shared byte %td", offset);
    return;
  }
  check_shared(pointer, bytes, generic_access(type, *current), pc);
}

// Stops the launch when the access itself would damage memory that is not the kernel's.
void check_plain(const void* pointer, std::size_t bytes, AccessType type, bool aligned, Pc pc) {
  if (current == nullptr) return;  // host code of the same file
  const auto* p = static_cast<const char*>(pointer);
  if (p >= current->stack && p < current->stack + kStackBytes) return;
  if (aligned && is_misaligned(pointer, bytes)) {
    report(Defect::kMisaligned, pc, "%zu bytes at %p", bytes, pointer);
    abandon_launch();
  }
  if (in_shared_arena(pointer)) return check_plain_shared(pointer, bytes, type, pc);

  const std::size_t before = reports().size();
  if (check_global(pointer, bytes, type, pc, false)) return;
  if (reports().size() != before) abandon_launch();
  const bool argument = p >= cluster->arguments && p < cluster->arguments + cluster->argument_bytes;
  if (type == AccessType::kRead && (argument || is_constant(pointer))) return;
  if (const Thread* owner = stack_owner(pointer)) {
    report(Defect::kForeignStack, pc, "local variable of thread %d", owner->linear);
    return;
  }
  check_global(pointer, bytes, type, pc);  // unknown address: report it
  abandon_launch();
}

}  // namespace

void touch_atomically(void* pointer, std::size_t bytes) {
  const Pc pc = MEMEFF_CALLER_PC;
  if (is_misaligned(pointer, bytes)) report(Defect::kMisaligned, pc, "atomic at %p", pointer);
  if (in_shared_arena(pointer)) {
    check_plain_shared(pointer, bytes, AccessType::kAtomic, pc);
  } else if (!check_global(pointer, bytes, AccessType::kAtomic, pc)) {
    abandon_launch();
  }
}

void check_alignment(const void* pointer, std::size_t bytes) {
  if (!is_misaligned(pointer, bytes)) return;
  report(Defect::kMisaligned, MEMEFF_CALLER_PC, "%zu bytes at %p", bytes, pointer);
  abandon_launch();
}

void copy_unchecked(void* destination, const void* source, std::size_t bytes) {
  std::memcpy(destination, source, bytes);
}

// ---- built-in variables and shared-memory addresses ----

uint3 thread_index() { return current->index; }
uint3 block_index() { return block->index; }
dim3 block_dim() { return cluster->dim; }
dim3 grid_dim() { return cluster->grid; }

unsigned char* dynamic_shared() { return block->shared; }

void* static_shared(std::size_t bytes, std::size_t alignment, const char* function,
                    const char* name) {
  for (const auto& array : block->static_arrays)
    if (array.function == function && std::strcmp(array.name, name) == 0) return array.data;
  const std::size_t offset = (block->shared_bytes + alignment - 1) / alignment * alignment;
  if (offset + bytes > std::min(kArenaBytes, config().shared_memory_limit)) {
    report(Defect::kBadArgument, MEMEFF_CALLER_PC,
           "shared array %s: %zu bytes exceed the limit %zu", name, offset + bytes,
           config().shared_memory_limit);
    abandon_launch();
  }
  block->shared_bytes = offset + bytes;
  block->static_arrays.push_back({function, name, block->shared + offset});
  return block->shared + offset;
}

std::uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - block->shared;
  if (offset < 0 || offset > static_cast<std::ptrdiff_t>(block->shared_bytes)) {
    report(Defect::kBadArgument, MEMEFF_CALLER_PC, "%p is not an address of shared memory",
           pointer);
    return 0;
  }
  return window_address(pointer);
}

}  // namespace memeff::emulator

// ---- entry points called by instrumented code ----

namespace {
using memeff::emulator::AccessType;
using memeff::emulator::check_plain;
}  // namespace

#define MEMEFF_HOOKS(bytes)                                             \
  void __tsan_read##bytes(void* p) {                                    \
    check_plain(p, bytes, AccessType::kRead, true, MEMEFF_CALLER_PC);   \
  }                                                                     \
  void __tsan_write##bytes(void* p) {                                   \
    check_plain(p, bytes, AccessType::kWrite, true, MEMEFF_CALLER_PC);  \
  }                                                                     \
  void __tsan_unaligned_read##bytes(void* p) {                          \
    check_plain(p, bytes, AccessType::kRead, false, MEMEFF_CALLER_PC);  \
  }                                                                     \
  void __tsan_unaligned_write##bytes(void* p) {                         \
    check_plain(p, bytes, AccessType::kWrite, false, MEMEFF_CALLER_PC); \
  }                                                                     \
  void __tsan_volatile_read##bytes(void* p) {                           \
    check_plain(p, bytes, AccessType::kRead, true, MEMEFF_CALLER_PC);   \
  }                                                                     \
  void __tsan_volatile_write##bytes(void* p) {                          \
    check_plain(p, bytes, AccessType::kWrite, true, MEMEFF_CALLER_PC);  \
  }

extern "C" {
MEMEFF_HOOKS(1)
MEMEFF_HOOKS(2)
MEMEFF_HOOKS(4)
MEMEFF_HOOKS(8)
MEMEFF_HOOKS(16)

void __tsan_read_range(void* p, std::size_t bytes) {
  check_plain(p, bytes, AccessType::kRead, false, MEMEFF_CALLER_PC);
}
void __tsan_write_range(void* p, std::size_t bytes) {
  check_plain(p, bytes, AccessType::kWrite, false, MEMEFF_CALLER_PC);
}
void* __tsan_memset(void* p, int value, std::size_t bytes) {
  check_plain(p, bytes, AccessType::kWrite, false, MEMEFF_CALLER_PC);
  return std::memset(p, value, bytes);
}
void* __tsan_memcpy(void* to, const void* from, std::size_t bytes) {
  check_plain(from, bytes, AccessType::kRead, false, MEMEFF_CALLER_PC);
  check_plain(to, bytes, AccessType::kWrite, false, MEMEFF_CALLER_PC);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, std::size_t bytes) {
  check_plain(from, bytes, AccessType::kRead, false, MEMEFF_CALLER_PC);
  check_plain(to, bytes, AccessType::kWrite, false, MEMEFF_CALLER_PC);
  return std::memmove(to, from, bytes);
}

// -fsanitize=alignment: compilers split vector accesses, so their alignment has to be checked where
// the type is still known. The handler's data (source line, type) is not needed.
void __ubsan_handle_type_mismatch_v1(void*, void* pointer) {
  using namespace memeff::emulator;
  if (current == nullptr) return;
  report(Defect::kMisaligned, MEMEFF_CALLER_PC, "object at %p", pointer);
  abandon_launch();
}

// Bookkeeping of the thread sanitizer that has no meaning here.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of function-local statics in host code of an instrumented file.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }
}
