// Compares every primitive on the GPU with the emulator. Exit status: 0 all agree, 1 some differ,
// 77 nothing to compare with (no GPU, or built without nvcc).
//
// The cases run in a child process, from one to the next: a case that hangs, or after which CUDA is
// of no use any more, ends that process, and another one goes on with the next case. So one run
// reports all of them.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "emulator/conformance.h"

#if defined(MEMEFF_WITH_GPU)
#include <cuda_runtime_api.h>
#endif

using namespace memeff;
using namespace memeff::conformance;

namespace {

uint16_t bf16(float x) {  // of numbers that need no rounding, or whose rounding does not matter
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// The fp16 number with the value of a small integer, or near a normal number.
uint16_t fp16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023));
}

std::vector<uint32_t> make_input(Input kind) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint32_t> in(kWords);
  for (uint32_t& word : in) {
    const auto integer = [&] { return static_cast<float>(static_cast<int>(random() % 17) - 8); };
    uint32_t low = 0, high = 0;
    switch (kind) {
      case Input::kWords: low = random() & 0xffff, high = random() & 0xffff; break;
      case Input::kBf16Integers: low = bf16(integer()), high = bf16(integer()); break;
      case Input::kFp16Integers: low = fp16(integer()), high = fp16(integer()); break;
      case Input::kBf16Normal: low = bf16(normal(random)), high = bf16(normal(random)); break;
      case Input::kFp16Normal: low = fp16(normal(random)), high = fp16(normal(random)); break;
    }
    word = low | high << 16;
  }
  return in;
}

bool agree(Compare compare, uint32_t a, uint32_t b) {
  if (a == b) return true;
  if (compare == Compare::kBits) return false;
  float x, y;
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  const float size = std::max(1.f, std::max(x < 0 ? -x : x, y < 0 ? -y : y));
  return (x > y ? x - y : y - x) <= 1e-5f * size;
}

// Where the cases have got to, in memory that parent and child share.
struct Progress {
  int capability = 0;  // of the GPU; 0: there is none
  int next = 0;        // the case to run next, or that is running
  int failures = 0;
  bool done = false;
};

constexpr unsigned kSecondsPerCase = 20;  // including the start of CUDA

void print_result(const char* name, bool passed) {
  std::printf("%-6s %s\n", passed ? "ok" : "FAILED", name);
}

// Whether the case passes. Without a GPU's (null) the emulator's side runs alone.
bool run_one(const Case& emulated, const Case* gpu) {
  const std::vector<uint32_t> in = make_input(emulated.input);
  std::vector<uint32_t> expected(kWords, 0), got(kWords, 0);
  const Status first = emulated.run(emulated, in.data(), expected.data());
  const Status second = gpu == nullptr ? Status{} : gpu->run(*gpu, in.data(), got.data());
  std::vector<int> different;
  for (int w = 0; gpu != nullptr && second.ok() && w < kWords; ++w)
    if (!agree(emulated.compare, expected[w], got[w])) different.push_back(w);
  const bool passed = first.ok() && second.ok() && different.empty();
  print_result(emulated.name, passed);
  if (!first.ok()) std::printf("       emulator: %s\n", first.message);
  if (!second.ok()) std::printf("       GPU: %s\n", second.message);
  if (different.empty()) return passed;
  constexpr std::size_t kShown = 8;
  std::printf("       %zu of %d words differ; word, emulator, GPU:\n", different.size(), kWords);
  for (std::size_t i = 0; i < std::min(kShown, different.size()); ++i)
    std::printf("       %5d %08x %08x\n", different[i], expected[different[i]], got[different[i]]);
  return passed;
}

#if defined(MEMEFF_WITH_GPU)

// 10 * major + minor, or 0 without a usable GPU.
int compute_capability() {
  int devices = 0, major = 0, minor = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  return 10 * major + minor;
}

bool cuda_still_works() { return cudaFree(nullptr) == cudaSuccess; }

#else

int compute_capability() { return 0; }
bool cuda_still_works() { return true; }

#endif

// The GPU's side of each of the emulator's cases, null where this GPU or build has none.
std::vector<const Case*> gpu_cases(const std::vector<Case>& of, int capability, bool sm90) {
  static std::vector<Case> cases[2];
#if defined(MEMEFF_WITH_GPU)
  if (!sm90 && capability >= 80) cases[0] = gpu_cases_sm80();
#endif
#if defined(MEMEFF_WITH_SM90)
  if (sm90 && capability == 90) cases[1] = gpu_cases_sm90();
#endif
  (void)capability;
  std::vector<const Case*> list(of.size(), nullptr);
  for (std::size_t i = 0; i < cases[sm90].size(); ++i) list[i] = &cases[sm90][i];
  return list;
}

// The child: from the next case on, to the last or to one after which CUDA does not work.
void run_cases(Progress& progress) {
  progress.capability = compute_capability();
  std::vector<Case> emulated = emulated_cases_sm80();
  std::vector<const Case*> gpu = gpu_cases(emulated, progress.capability, false);
  const std::vector<Case> of_sm90 = emulated_cases_sm90();
  for (const Case* one : gpu_cases(of_sm90, progress.capability, true)) gpu.push_back(one);
  emulated.insert(emulated.end(), of_sm90.begin(), of_sm90.end());
  const int count = static_cast<int>(emulated.size());
  while (progress.next < count) {
    alarm(kSecondsPerCase);
    const bool passed = run_one(emulated[progress.next], gpu[progress.next]);
    std::fflush(stdout);
    alarm(0);
    progress.failures += passed ? 0 : 1;
    ++progress.next;
    if (!passed && !cuda_still_works()) return;
  }
  progress.done = true;
}

const char* name_of_case(int number) {
  const std::vector<Case> sm80 = emulated_cases_sm80(), sm90 = emulated_cases_sm90();
  const auto first = static_cast<int>(sm80.size());
  return number < first ? sm80[number].name : sm90[number - first].name;
}

}  // namespace

int main() {
  void* const shared =
      mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 1;
  Progress& progress = *new (shared) Progress;
  while (!progress.done) {
    const int before = progress.next;
    const pid_t child = fork();
    if (child < 0) return 1;
    if (child == 0) {
      run_cases(progress);
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (progress.done || (WIFEXITED(status) && progress.next > before)) continue;
    print_result(name_of_case(progress.next), false);
    std::printf("       %s\n", WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "no result");
    std::fflush(stdout);
    ++progress.failures;
    ++progress.next;
  }
  if (progress.failures != 0) return 1;
  const int capability = progress.capability;
  if (capability < 80) {
    std::printf("SKIPPED: the emulator's side ran, but there is no GPU to compare it with\n");
    return 77;
  }
  std::printf("compute capability %d.%d%s\n", capability / 10, capability % 10,
              capability == 90 ? "" : ": the cases of sm_90 were not compared");
  return 0;
}
