#include "cuda/select.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <list>
#include <mutex>

namespace memeff::cuda {
namespace {

constexpr const Architecture* kArchitectures[] = {
#define MEMEFF_ROW(name) &name::architecture,
    MEMEFF_CUDA_ARCHITECTURES(MEMEFF_ROW)
#undef MEMEFF_ROW
};

enum class Role { kScores, kProducts };
bool can_be(const KernelSet& kernels, Role role) {
  return role == Role::kProducts || !kernels.reads_scores;
}

bool find(const std::string& name, Role role, KernelSet* found) {
  for (const KernelSet& kernels : all_kernel_sets())
    if (name == name_of(kernels) && can_be(kernels, role)) {
      *found = kernels;
      return true;
    }
  return false;
}

std::string names(Role role) {
  std::string list;
  for (const KernelSet& kernels : all_kernel_sets())
    if (can_be(kernels, role)) list += (list.empty() ? "" : ", ") + name_of(kernels);
  return list;
}

bool can_run(const KernelSet& kernels, const Problem& problem, const Gpu& gpu) {
  return kernels.architecture->can_run(problem, gpu);
}

/// Whether these products can work on what those scores are kept as: both generic, or both of 16
/// bits. (cuBLAS reads gradients of any kind.)
bool fit(const KernelSet& scores, const KernelSet& products) {
  return !products.fused() || scores.fused();
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

const MeasuredChoice* nearest(const MeasuredChoices& measured, const Problem& p, const Gpu& gpu) {
  const auto banned = [&](const KernelSet& kernels) {
    return std::count(measured.banned.begin(), measured.banned.end(),
                      std::pair{gpu.name, name_of(kernels)}) > 0;
  };
  const MeasuredChoice* best = nullptr;
  int best_rank = 0;  // 2: of this machine, 1: of this GPU
  double least = std::numeric_limits<double>::infinity();
  for (const MeasuredChoice& row : measured.rows) {
    if (row.capability != gpu.capability || row.dtype != p.dtype || row.skips != skips_tiles(p))
      continue;
    Selection kernels;
    if (!parse_kernels(row.kernels, &kernels) || !can_run(kernels.scores, p, gpu) ||
        !can_run(kernels.products, p, gpu) || !fit(kernels.scores, kernels.products) ||
        banned(kernels.scores) || banned(kernels.products))
      continue;
    const bool is_this_gpu = gpu.name == row.gpu;
    if (row.here && !is_this_gpu) continue;
    const int rank = row.here ? 2 : is_this_gpu ? 1 : 0;
    const double far = distance(row, p);
    if (std::isinf(far) || rank < best_rank) continue;
    if (far >= least && rank == best_rank) continue;
    best = &row;
    best_rank = rank;
    least = far;
  }
  return best;
}

/// The choices, and what they were before each addition: calls of other threads may still read that.
struct KnownChoices {
  std::mutex adding;
  std::list<MeasuredChoices> versions{{committed_choices()}};
  std::atomic<const MeasuredChoices*> newest{&versions.back()};
};

KnownChoices& known_choices() {
  static KnownChoices known;
  return known;
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

const MeasuredChoices& measured_choices() { return *known_choices().newest; }

void add_tuned(const MeasuredChoices& tuned) {
  KnownChoices& known = known_choices();
  const std::lock_guard<std::mutex> lock(known.adding);
  MeasuredChoices all = *known.newest;
  all.rows.insert(all.rows.end(), tuned.rows.begin(), tuned.rows.end());
  all.banned.insert(all.banned.end(), tuned.banned.begin(), tuned.banned.end());
  known.newest = &known.versions.emplace_back(std::move(all));
}

const std::vector<MeasuredChoice>& committed_choices() {
  static const std::vector<MeasuredChoice> rows = {
#include "cuda/measured_choices.inc"
  };
  return rows;
}

Selection select_kernels(const Problem& problem, const Gpu& gpu, const std::string& forced,
                         const MeasuredChoices& measured, std::string* error) {
  Selection chosen;
  chosen.capability = gpu.capability;
  for (const Architecture* row : kArchitectures)
    if (row->fused && row->can_run(problem, gpu)) chosen.others_can_run = true;
  if (forced.empty()) {
    chosen.measured = nearest(measured, problem, gpu);
    if (chosen.measured != nullptr) parse_kernels(chosen.measured->kernels, &chosen);
    return chosen;
  }

  Selection wanted;
  if (!parse_kernels(forced, &wanted)) {
    *error = "MEMEFF_CUDA_KERNELS='" + forced + "': expected one of " + names(Role::kScores) +
             " for scores, a comma, and one of " + names(Role::kProducts) + " for products";
    return chosen;
  }
  chosen.forced = true;
  // A family that cannot run the problem: the newest that can.
  if (can_run(wanted.scores, problem, gpu)) {
    chosen.scores = wanted.scores;
  } else {
    for (const Architecture* row : kArchitectures)
      if (row->can_run(problem, gpu)) chosen.scores.architecture = row;
  }
  const bool possible =
      can_run(wanted.products, problem, gpu) && fit(chosen.scores, wanted.products);
  chosen.products = possible ? wanted.products : KernelSet{};
  return chosen;
}

bool parse_kernels(const std::string& names, Selection* selection) {
  const size_t comma = names.find(',');
  return comma != std::string::npos &&
         find(names.substr(0, comma), Role::kScores, &selection->scores) &&
         find(names.substr(comma + 1), Role::kProducts, &selection->products);
}

bool operator==(const KernelSet& a, const KernelSet& b) {
  return a.architecture == b.architecture && a.cluster == b.cluster &&
         a.reads_scores == b.reads_scores;
}

std::string name_of(const KernelSet& kernels) {
  const Architecture& row = *kernels.architecture;
  for (const Variant *v = row.variants, *end = v + row.variant_count; v != end; ++v)
    if (v->cluster == kernels.cluster && v->reads_scores == kernels.reads_scores)
      return std::string(row.name) + v->suffix;
  return row.name;
}

std::vector<KernelSet> all_kernel_sets() {
  std::vector<KernelSet> all;
  for (const Architecture* row : kArchitectures)
    for (size_t i = 0; i < row->variant_count; ++i)
      all.push_back({row, row->variants[i].cluster, row->variants[i].reads_scores});
  return all;
}

std::string forced_kernels() {
  const char* value = std::getenv("MEMEFF_CUDA_KERNELS");
  return value == nullptr ? "" : value;
}

std::string describe_choice(const Problem& problem, const Gpu& gpu, const std::string& forced) {
  std::string text = forced.empty() ? "" : forced + " of ";
  for (const Architecture* row : kArchitectures)
    if (row->can_run(problem, gpu)) text += row->name + std::string(" ");
  return text + "on " + std::to_string(gpu.capability) + "x" +
         std::to_string(multiprocessors_of(gpu));
}

std::string name_of(const Selection& selection) {
  return name_of(selection.scores) + "," + name_of(selection.products);
}

std::string reason_of(const Selection& selection) {
  if (selection.forced) return "MEMEFF_CUDA_KERNELS";
  if (selection.predicted) return "predicted";
  if (selection.measured == nullptr)
    return selection.others_can_run ? "default; run memeff-tune to use faster ones" : "default";
  const MeasuredChoice& row = *selection.measured;
  return (row.here ? "tuned on " : "measured on ") + row.gpu + " at " + std::to_string(row.tokens) +
         "x" + std::to_string(row.features) + "x" + std::to_string(row.vocab);
}

std::string in_words(const Selection& selection) {
  return name_of(selection) + " kernels (" + reason_of(selection) + ")";
}

}  // namespace memeff::cuda
