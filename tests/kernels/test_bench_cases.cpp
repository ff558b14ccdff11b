// The cases of bench_cuda_kernels at small ragged shapes: each launch is accepted, and what it
// reads and writes lies within what the benchmark placed, in both modes of delivery. (What kernels
// compute is the other tests' business.)
#include <cstring>
#include <list>
#include <memory>
#include <set>

#include "benchmarks/cpp/cuda_cases.h"
#include "emulator/check.h"

namespace {

using namespace memeff;
using emulator::BufferAccess;

/// Host memory at its exact size, known to the emulator.
class EmulatedMemory : public bench::Memory {
 public:
  void* allocate(int64_t bytes, const char* name, int granule) override {
    const auto size = static_cast<size_t>(bytes);
    void* data = std::aligned_alloc(256, (size + 255) / 256 * 256);
    std::memset(data, 0xff, size);  // NaN
    allocated_.emplace_back(data);
    buffers_.emplace_back(data, size, name, BufferAccess::kReadWrite, granule);
    return data;
  }
  void copy(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::list<std::unique_ptr<void, Free>> allocated_;
  std::list<emulator::GlobalBuffer> buffers_;
};

std::set<std::string> run_all(const bench::Shape& shape, DType dtype, int capability) {
  std::set<std::string> families;
  for (const bool late : {true, false}) {
    emulator::config().late_delivery = late;
    EmulatedMemory memory;
    for (const bench::Case& one : make_cases(shape, dtype, capability, memory, {}, nullptr)) {
      families.insert(one.family);
      if (one.prepare) one.prepare();
      const Status status = one.run();
      const bool clean = emulator::reports().empty();
      if (!status.ok() || !clean)
        std::printf("%s, %s, %s: %s\n", one.kernel.c_str(), one.family.c_str(), one.variant.c_str(),
                    status.ok() ? "reports" : status.message);
      CHECK(status.ok());
      CHECK(clean);
      CHECK(one.flops >= 0 && one.bytes > 0);
      emulator::clear_reports();
    }
  }
  return families;
}

}  // namespace

int main() {
  emulator::config().printed_reports = 3;
  const std::set<std::string> fused{"generic", "sm80", "sm90", "sm90rs", "sm90x2"};
  CHECK(run_all({136, 72, 400}, DType::kBFloat16, 90) == fused);
  CHECK(run_all({8, 16, 130}, DType::kFloat16, 90) == fused);
  CHECK(run_all({40, 24, 300}, DType::kFloat16, 75) == std::set<std::string>{"generic"});
  return emulator::finish("test_bench_cases");
}
