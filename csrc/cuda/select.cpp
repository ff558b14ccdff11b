#include "cuda/select.h"

#include <cstdint>

namespace memeff::cuda {
namespace {

constexpr const char* kNames[] = {"generic", "sm80", "sm90"};

/// TMA reads rows that start at multiples of 16 bytes.
bool rows_are_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

bool can_run(Family family, const Problem& p, const Gpu& gpu) {
  if (family == Family::kGeneric) return true;
  // Class probabilities are as large as the logits, so reading those once more is no matter. With a
  // soft cap and label smoothing together the gradient needs the score itself, which exp(z - max)
  // does not give where it underflows.
  if (!is_16_bit(p.dtype) || p.features == 0 || p.probabilities != nullptr) return false;
  if (p.softcap > 0 && p.label_smoothing > 0) return false;
  if (family == Family::kSm80) return gpu.capability >= 80;
  // sm_90a code runs on compute capability 9.0 only.
  return gpu.capability == 90 && p.features % 8 == 0 && rows_are_aligned(p.input, p.input_stride) &&
         rows_are_aligned(p.weight, p.weight_stride);
}

bool parse(const std::string& name, Family* family) {
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    *family = static_cast<Family>(i);
    return true;
  }
  return false;
}

}  // namespace

Selection select_kernels(const Problem& problem, const Gpu& gpu, const std::string& forced,
                         std::string* error) {
  Selection chosen;
  for (const Family family : {Family::kSm80, Family::kSm90})
    if (can_run(family, problem, gpu)) chosen.scores = family;
  // The fused kernels keep what no library product can: no logits, 16-bit scores. For plain products
  // cuBLAS is the choice until a handwritten one has measured faster on the GPU at hand; those that
  // skip tiles do less work than any library product.
  if (problem.skip_mass > 0) chosen.products = chosen.scores;
  if (forced.empty()) return chosen;

  const size_t comma = forced.find(',');
  Family scores, products;
  if (comma == std::string::npos || !parse(forced.substr(0, comma), &scores) ||
      !parse(forced.substr(comma + 1), &products)) {
    *error = "MEMEFF_CUDA_KERNELS='" + forced +
             "': expected two of generic, sm80, sm90 with a comma between, for scores and products";
    return chosen;
  }
  if (can_run(scores, problem, gpu)) chosen.scores = scores;
  // The products read what the scores leave behind: both generic, or both of 16 bits.
  chosen.products = can_run(products, problem, gpu) ? products : Family::kGeneric;
  if (!chosen.stores_16_bits()) chosen.products = Family::kGeneric;
  return chosen;
}

std::string name_of(const Selection& selection) {
  return std::string(kNames[static_cast<int>(selection.scores)]) + "," +
         kNames[static_cast<int>(selection.products)];
}

}  // namespace memeff::cuda
