// Conformance of the emulator: every primitive runs on a GPU and in the emulator, on the same
// inputs, and the outputs are compared. The PTX strings are never executed by the emulator, so on a
// machine with a GPU this is the first program to run.
//
// Each file of cases (conformance_sm80.cu, conformance_sm90.cu) is compiled twice, by nvcc and for
// the emulator, and yields one list of cases from each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/status.h"

namespace memeff::conformance {

enum class Input {
  kWords,         // random bits
  kBf16Integers,  // pairs of small integers: products and sums are exact in every order
  kFp16Integers,
  kBf16Normal,  // pairs of normally distributed numbers
  kFp16Normal,
};
enum class Compare {
  kBits,
  kFloats,  // up to the rounding of intermediate sums
};

constexpr int kWords = 16384;  // 32-bit words of input and of output of every case

struct Case {
  const char* name;
  Input input;
  Compare compare;
  unsigned threads;
  std::size_t shared_bytes;
  // One of two: a kernel that is launched with one block, or a function that launches what it
  // wants. Both get memory of the device.
  void (*kernel)(const uint32_t* in, uint32_t* out);
  Status (*launch)(const Case&, uint32_t* in, uint32_t* out);
  // Copies `in` and `out` to the device and `out` back.
  Status (*run)(const Case&, const uint32_t* in, uint32_t* out);
};

std::vector<Case> gpu_cases_sm80();
std::vector<Case> emulated_cases_sm80();
std::vector<Case> gpu_cases_sm90();
std::vector<Case> emulated_cases_sm90();

}  // namespace memeff::conformance
