// Instruction sets of the machine that the program runs on.
#pragma once

namespace memeff {

struct CpuFeatures {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, VL, DQ
  bool avx512_bf16 = false;  // ... and BF16
};

/// What the processor has, less what the environment variable MEMEFF_CPU_CAPABILITY
/// ("generic", "avx2", "avx512" or "avx512_bf16", the default) rules out.
const CpuFeatures& cpu_features();

/// The best of these names that applies.
const char* cpu_capability();

}  // namespace memeff
