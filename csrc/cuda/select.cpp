#include "cuda/select.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

namespace memeff::cuda {
namespace {

/// What a family has kernels for.
struct FamilyRow {
  Family family;
  const char* name;
  bool scores, products;
  // Taken without a measurement where it can run; the last such row counts.
  bool by_default;
};
constexpr FamilyRow kFamilies[] = {
    {Family::kGeneric, "generic", true, true, true}, {Family::kSm80, "sm80", true, true, true},
    {Family::kSm90, "sm90", true, true, true},       {Family::kSm90x2, "sm90x2", true, true, false},
    {Family::kSm90rs, "sm90rs", false, true, false},
};

/// TMA reads rows that start at multiples of 16 bytes and do not overlap, as those of an expanded
/// tensor do.
bool rows_suit_tma(const void* data, int64_t stride, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && stride >= columns;
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
  return gpu.capability == 90 && p.features % 8 == 0 &&
         rows_suit_tma(p.input, p.input_stride, p.features) &&
         rows_suit_tma(p.weight, p.weight_stride, p.features);
}

/// Whether these products can work on what those scores leave behind: both generic, or both of 16
/// bits. (cuBLAS reads gradients of any kind.)
bool fit(Family scores, Family products) {
  return products == Family::kGeneric || scores != Family::kGeneric;
}

const char* name_of(Family family) {
  for (const FamilyRow& row : kFamilies)
    if (row.family == family) return row.name;
  return "";
}

const FamilyRow* family_called(const std::string& name) {
  for (const FamilyRow& row : kFamilies)
    if (name == row.name) return &row;
  return nullptr;
}

std::string names(bool FamilyRow::* does) {
  std::string list;
  for (const FamilyRow& row : kFamilies)
    if (row.*does) list += (list.empty() ? "" : ", ") + std::string(row.name);
  return list;
}

/// Sum of |log2(ratio)| of the three sizes; infinite where one differs by more than a factor of 4.
double distance(const MeasuredChoice& row, const Problem& p) {
  const int64_t sizes[3][2] = {
      {row.tokens, p.tokens}, {row.features, p.features}, {row.vocab, p.vocab}};
  double sum = 0;
  for (const auto& [measured, wanted] : sizes) {
    if (measured <= 0 || wanted <= 0) return std::numeric_limits<double>::infinity();
    const double factor =
        std::abs(std::log2(static_cast<double>(measured) / static_cast<double>(wanted)));
    if (factor > 2) return std::numeric_limits<double>::infinity();
    sum += factor;
  }
  return sum;
}

const MeasuredChoice* nearest(const std::vector<MeasuredChoice>& measured, const Problem& p,
                              const Gpu& gpu) {
  const MeasuredChoice* best = nullptr;
  bool best_is_this_gpu = false;
  double least = std::numeric_limits<double>::infinity();
  for (const MeasuredChoice& row : measured) {
    if (row.capability != gpu.capability || row.dtype != p.dtype || row.skips != (p.skip_mass > 0))
      continue;
    if (!can_run(row.scores, p, gpu) || !can_run(row.products, p, gpu) ||
        !fit(row.scores, row.products))
      continue;
    const bool is_this_gpu = gpu.name == row.gpu;
    const double far = distance(row, p);
    if (std::isinf(far) || (best_is_this_gpu && !is_this_gpu)) continue;
    if (far >= least && is_this_gpu == best_is_this_gpu) continue;
    best = &row;
    best_is_this_gpu = is_this_gpu;
    least = far;
  }
  return best;
}

}  // namespace

int multiprocessors_of(const Gpu& gpu) {
  if (gpu.multiprocessors > 0) return gpu.multiprocessors;
  switch (gpu.capability) {
    case 75: return 40;    // T4
    case 80: return 108;   // A100
    case 86: return 84;    // A40
    case 89: return 142;   // L40
    case 100: return 148;  // B200
    case 120: return 170;  // RTX 5090
    default: return 132;   // H100, H200
  }
}

const std::vector<MeasuredChoice>& measured_choices() {
  static const std::vector<MeasuredChoice> rows = {
#include "cuda/measured_choices.inc"
  };
  return rows;
}

Selection select_kernels(const Problem& problem, const Gpu& gpu, const std::string& forced,
                         const std::vector<MeasuredChoice>& measured, std::string* error) {
  Selection chosen;
  for (const FamilyRow& row : kFamilies)
    if (row.by_default && can_run(row.family, problem, gpu)) chosen.scores = row.family;
  // The fused kernels keep what no library product can: no logits, 16-bit scores. For plain products
  // cuBLAS is the choice until a handwritten one has measured faster on the GPU at hand; those that
  // skip tiles do less work than any library product.
  if (problem.skip_mass > 0) chosen.products = chosen.scores;
  if (forced.empty()) {
    if (const MeasuredChoice* row = nearest(measured, problem, gpu))
      chosen = {row->scores, row->products, false, row};
    return chosen;
  }

  const size_t comma = forced.find(',');
  const FamilyRow *scores = nullptr, *products = nullptr;
  if (comma != std::string::npos) {
    scores = family_called(forced.substr(0, comma));
    products = family_called(forced.substr(comma + 1));
  }
  if (scores == nullptr || products == nullptr || !scores->scores || !products->products) {
    *error = "MEMEFF_CUDA_KERNELS='" + forced + "': expected one of " + names(&FamilyRow::scores) +
             " for scores, a comma, and one of " + names(&FamilyRow::products) + " for products";
    return chosen;
  }
  chosen.forced = true;
  if (can_run(scores->family, problem, gpu)) chosen.scores = scores->family;
  chosen.products = can_run(products->family, problem, gpu) ? products->family : Family::kGeneric;
  if (!fit(chosen.scores, chosen.products)) chosen.products = Family::kGeneric;
  return chosen;
}

std::string forced_kernels() {
  const char* value = std::getenv("MEMEFF_CUDA_KERNELS");
  return value == nullptr ? "" : value;
}

std::string name_of(const Selection& selection) {
  return std::string(name_of(selection.scores)) + "," + name_of(selection.products);
}

std::string reason_of(const Selection& selection) {
  if (selection.forced) return "MEMEFF_CUDA_KERNELS";
  if (selection.predicted) return "predicted";
  if (selection.measured == nullptr) return "default";
  const MeasuredChoice& row = *selection.measured;
  return std::string("measured on ") + row.gpu + " at " + std::to_string(row.tokens) + "x" +
         std::to_string(row.features) + "x" + std::to_string(row.vocab);
}

}  // namespace memeff::cuda
