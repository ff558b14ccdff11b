// What lets the tests of the kernels (test_generic_*, test_sm80_*, ... of this folder) run on a GPU,
// unchanged: this file takes the place of the emulator, and nvcc's kernels that of the emulated
// ones. The tests then compare what the GPU computed with double precision. Reports stay empty: a
// GPU detects nothing, compute-sanitizer does when a test runs under it.
//
//   buffers    The tests keep them in std::vector and on the stack, and pass host pointers to
//              launchers. So operator new gives managed memory here: at the same address for both
//              sides, and in the GPU's own memory while a kernel works on it, with its caches as in
//              use. register_buffer maps the pages of anything else, which stay the host's.
//   launches   The emulator's are synchronous; CUDA_LAUNCH_BLOCKING makes the GPU's so, too.
//
// Without a GPU, or on one that the tested kernels are not for (MEMEFF_TEST_ARCH), the program
// ends with status 77 before main: skipped.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#include "emulator/emulator.h"

namespace memeff::emulator {

namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(error));
  std::fflush(stdout);
  _exit(EXIT_FAILURE);
}

[[noreturn]] void skip(const char* reason) {
  std::printf("SKIPPED: %s\n", reason);
  std::fflush(stdout);
  _exit(77);
}

void start_gpu() {
  setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
  int count = 0, major = 0, minor = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) skip(cudaGetErrorString(error));
  if (count == 0) skip("no GPU");
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
  require(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "attribute");
  const int arch = 10 * major + minor;
  // Without it the host must not touch any of the memory that all of the program uses while a kernel runs.
  int shares = 0;
  require(cudaDeviceGetAttribute(&shares, cudaDevAttrConcurrentManagedAccess, 0), "attribute");
  if (shares == 0) skip("the GPU and the host cannot use managed memory at the same time");
  // The code for 9.0 is sm_90a's, which runs there alone.
  if (MEMEFF_TEST_ARCH == 90 ? arch != 90 : arch < MEMEFF_TEST_ARCH) {
    char text[80];
    std::snprintf(text, sizeof text, "kernels for sm_%d, the GPU is sm_%d", MEMEFF_TEST_ARCH, arch);
    skip(text);
  }
}

// One region of managed memory from which all of the program's memory comes, in blocks of powers of two;
// freed blocks of a size form a list. (A region per allocation would take a millisecond each.)
class Arena {
 public:
  // Null before the arena is ready: the CUDA runtime, linked into this program, allocates as well.
  void* allocate(std::size_t bytes) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (begin_ == nullptr && !starting_) {
      starting_ = true;
      start_gpu();
      void* region = nullptr;
      require(cudaMallocManaged(&region, kBytes), "managed memory");
      begin_ = next_ = static_cast<unsigned char*>(region);
    }
    if (begin_ == nullptr) return nullptr;
    int order = 0;
    while ((kSmallest << order) < bytes + sizeof(Header)) ++order;
    Header* block = free_[order];
    if (block != nullptr) {
      free_[order] = block->next;
    } else {
      const std::size_t size = kSmallest << order;
      if (size > kBytes - static_cast<std::size_t>(next_ - begin_)) throw std::bad_alloc();
      block = new (next_) Header{order, nullptr};
      next_ += size;
    }
    return block + 1;
  }

  // Whether `data` was the arena's to take back.
  bool release(void* data) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (!contains(data)) return false;
    Header* block = static_cast<Header*>(data) - 1;
    block->next = free_[block->order];
    free_[block->order] = block;
    return true;
  }

  bool contains(const void* data) const {
    const auto* byte = static_cast<const unsigned char*>(data);
    return begin_ != nullptr && byte >= begin_ && byte < begin_ + kBytes;
  }

 private:
  struct alignas(128) Header {  // keeps what follows aligned to 128 bytes
    int order;
    Header* next;
  };
  static constexpr std::size_t kBytes = std::size_t{1} << 30, kSmallest = 256;

  std::recursive_mutex mutex_;
  bool starting_ = false;
  unsigned char* begin_ = nullptr;
  unsigned char* next_ = nullptr;
  Header* free_[31] = {};
};

// Never destroyed: memory is still freed when static objects are.
Arena& arena() {
  alignas(Arena) static unsigned char storage[sizeof(Arena)];
  static Arena* const instance = new (storage) Arena;
  return *instance;
}

// How many registered buffers lie on a page outside the arena.
constexpr std::uintptr_t kPage = 4096;
std::map<std::uintptr_t, int>& mapped_pages() {
  static std::map<std::uintptr_t, int> pages;
  return pages;
}

std::map<const void*, std::size_t>& buffers() {
  static std::map<const void*, std::size_t> sizes;
  return sizes;
}

template <class Visit>
void for_each_page(const void* data, std::size_t bytes, const Visit& visit) {
  const auto first = reinterpret_cast<std::uintptr_t>(data);
  for (std::uintptr_t page = first / kPage * kPage; page < first + bytes; page += kPage)
    visit(page);
}

}  // namespace

Config& config() {
  static Config instance;
  return instance;
}

Counters& counters() {
  static Counters instance{};
  return instance;
}

const std::vector<Report>& reports() {
  static const std::vector<Report> none;
  return none;
}

void clear_reports() {}

const char* name_of(Defect) { return ""; }

void register_buffer(const void* data, std::size_t bytes, const char* name, BufferAccess, int) {
  if (bytes == 0 || arena().contains(data)) return;
  buffers()[data] = bytes;
  for_each_page(data, bytes, [&](std::uintptr_t page) {
    void* start = reinterpret_cast<void*>(page);
    if (mapped_pages()[page]++ == 0)
      require(cudaHostRegister(start, kPage, cudaHostRegisterMapped), name);
  });
}

void unregister_buffer(const void* data) {
  const auto buffer = buffers().find(data);
  if (buffer == buffers().end()) return;
  for_each_page(data, buffer->second, [](std::uintptr_t page) {
    if (--mapped_pages()[page] == 0)
      require(cudaHostUnregister(reinterpret_cast<void*>(page)), "cudaHostUnregister");
  });
  buffers().erase(buffer);
}

}  // namespace memeff::emulator

void* operator new(std::size_t bytes) {
  if (void* data = memeff::emulator::arena().allocate(bytes)) return data;
  if (void* data = std::malloc(bytes)) return data;
  throw std::bad_alloc();
}
void operator delete(void* data) noexcept {
  if (data != nullptr && !memeff::emulator::arena().release(data)) std::free(data);
}
void operator delete(void* data, std::size_t) noexcept { operator delete(data); }
