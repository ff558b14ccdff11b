#include "emulator/internal.h"

#include <dlfcn.h>
#include <elf.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

namespace memeff::emulator {

namespace {

std::vector<Report> all_reports;

// A position-independent module is described by offsets from its base, any other by addresses.
std::uintptr_t module_base(const Dl_info& module) {
  const auto* header = static_cast<const Elf64_Ehdr*>(module.dli_fbase);
  return header->e_type == ET_DYN ? reinterpret_cast<std::uintptr_t>(module.dli_fbase) : 0;
}

bool is_kernel_source(const std::string& file) {
  for (const char* plumbing :
       {"/cuda/ptx/", "emulator/device.h", "emulator/emulator.h", "/include/"})
    if (file.find(plumbing) != std::string::npos) return false;
  return file.find("??") == std::string::npos;
}

SourceLine ask_addr2line(Pc pc) {
  Dl_info module;
  if (pc == nullptr || dladdr(pc, &module) == 0) return {};
  const char* path = module.dli_fname != nullptr && module.dli_fname[0] == '/' ? module.dli_fname
                                                                               : "/proc/self/exe";
  // A return address is one past the call, which may already belong to the next line.
  const auto offset = reinterpret_cast<std::uintptr_t>(pc) - 1 - module_base(module);
  char real_path[4096], address[32];
  if (realpath(path, real_path) == nullptr) return {};
  std::snprintf(address, sizeof address, " 0x%zx", static_cast<std::size_t>(offset));
  const std::string command =
      std::string("addr2line -i -e '") + real_path + "'" + address + " 2>/dev/null";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return {};
  SourceLine innermost, found;
  char text[4096];
  while (std::fgets(text, sizeof text, pipe) != nullptr) {
    const std::string entry(text);
    const std::size_t colon = entry.rfind(':');
    if (colon == std::string::npos) continue;
    SourceLine here{entry.substr(0, colon), std::atoi(entry.c_str() + colon + 1)};
    if (innermost.file.empty()) innermost = here;
    if (found.file.empty() && is_kernel_source(here.file)) found = here;
  }
  pclose(pipe);
  return found.file.empty() ? innermost : found;
}

}  // namespace

SourceLine source_line(Pc pc) {
  static std::unordered_map<Pc, SourceLine> known;
  const auto entry = known.find(pc);
  if (entry != known.end()) return entry->second;
  return known[pc] = ask_addr2line(pc);
}

const char* name_of(Defect defect) {
  switch (defect) {
    case Defect::kSharedRace: return "shared-memory race";
    case Defect::kGlobalRace: return "global-memory race";
    case Defect::kOutOfBounds: return "out of bounds";
    case Defect::kUninitialisedRead: return "uninitialised read";
    case Defect::kReadOnlyWrite: return "write to a read-only buffer";
    case Defect::kMisaligned: return "misaligned access";
    case Defect::kForeignStack: return "access to another thread's stack";
    case Defect::kInFlightAtExit: return "asynchronous work in flight at exit";
    case Defect::kDeadlock: return "deadlock";
    case Defect::kDivergence: return "divergence";
    case Defect::kMissingProxyFence: return "missing proxy fence";
    case Defect::kExitedBlock: return "shared memory of an exited block";
    case Defect::kBadArgument: return "bad argument";
  }
  return "?";
}

void report(Defect defect, Pc pc, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);

  Report entry{defect, text, "", 0};
  if (current != nullptr) {
    char who[128];
    std::snprintf(who, sizeof who, " [block %u,%u,%u thread %d warp %d lane %d]", block->index.x,
                  block->index.y, block->index.z, current->linear, current->warp, current->lane);
    entry.message += who;
  }
  // Looking up a line starts a process, so a flood of reports keeps only its beginning's lines.
  constexpr std::size_t kLocatedReports = 100;
  if (all_reports.size() < kLocatedReports) {
    const SourceLine where = source_line(pc);
    entry.file = where.file;
    entry.line = where.line;
  }
  if (all_reports.size() < config().printed_reports)
    std::fprintf(stderr, "emulator: %s: %s at %s:%d\n", name_of(defect), entry.message.c_str(),
                 entry.file.empty() ? "?" : entry.file.c_str(), entry.line);
  all_reports.push_back(std::move(entry));
}

const std::vector<Report>& reports() { return all_reports; }
void clear_reports() { all_reports.clear(); }

}  // namespace memeff::emulator
