// Compares every primitive on the GPU with the emulator. Exit status: 0 all agree, 1 some differ,
// 77 nothing to compare with (no GPU, or built without nvcc).
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>

#include "emulator/conformance.h"
#include "emulator/emulator.h"

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

// Returns the number of cases that fail. Without a GPU the emulator's side runs alone.
int run_all(const std::vector<Case>& emulated, const std::vector<Case>& gpu) {
  int failures = 0;
  for (std::size_t i = 0; i < emulated.size(); ++i) {
    const Case& c = emulated[i];
    const std::vector<uint32_t> in = make_input(c.input);
    std::vector<uint32_t> expected(kWords, 0), got(kWords, 0);
    bool good = c.run(c, in.data(), expected.data());
    int differences = 0;
    if (!gpu.empty()) {
      good = gpu[i].run(gpu[i], in.data(), got.data()) && good;
      for (int w = 0; w < kWords; ++w) differences += agree(c.compare, expected[w], got[w]) ? 0 : 1;
    }
    const bool passed = good && differences == 0;
    failures += passed ? 0 : 1;
    std::printf("%-6s %s", passed ? "ok" : "FAILED", c.name);
    if (differences != 0) std::printf(": %d of %d words differ", differences, kWords);
    std::printf("\n");
  }
  return failures;
}

// 10 * major + minor, or 0 without a usable GPU.
int compute_capability() {
#if defined(MEMEFF_WITH_GPU)
  int devices = 0, major = 0, minor = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  return 10 * major + minor;
#else
  return 0;
#endif
}

}  // namespace

int main() {
  const int capability = compute_capability();
  std::vector<Case> sm80, sm90;
#if defined(MEMEFF_WITH_GPU)
  if (capability >= 80) sm80 = gpu_cases_sm80();
#if defined(MEMEFF_WITH_SM90)
  if (capability == 90) sm90 = gpu_cases_sm90();
#endif
#endif
  int failures = run_all(emulated_cases_sm80(), sm80);
  failures += run_all(emulated_cases_sm90(), sm90);
  if (failures != 0) return 1;
  if (sm80.empty()) {
    std::printf("SKIPPED: the emulator's side ran, but there is no GPU to compare it with\n");
    return 77;
  }
  std::printf("compute capability %d.%d%s\n", capability / 10, capability % 10,
              sm90.empty() ? ": the cases of sm_90 were not compared" : "");
  return 0;
}
