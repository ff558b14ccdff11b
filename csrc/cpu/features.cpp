#include "cpu/features.h"

#include <cstdlib>
#include <cstring>

namespace memeff {
namespace {

CpuFeatures detect() {
  CpuFeatures features;
#if defined(__x86_64__)
  const char* limit = std::getenv("MEMEFF_CPU_CAPABILITY");
  if (limit == nullptr) limit = "";
  __builtin_cpu_init();
  if (std::strcmp(limit, "generic") == 0) return features;
  features.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(limit, "avx2") == 0) return features;
  features.avx512 = features.avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  if (std::strcmp(limit, "avx512") == 0) return features;
  features.avx512_bf16 = features.avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return features;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const char* cpu_capability() {
  const CpuFeatures& features = cpu_features();
  if (features.avx512_bf16) return "avx512_bf16";
  if (features.avx512) return "avx512";
  return features.avx2 ? "avx2" : "generic";
}

}  // namespace memeff
