// Which kernels a problem runs on: plain C++, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/problem.h"
#include "cuda/architecture.h"

namespace memeff::cuda {

/// Kernels of one architecture in one of its variants. Its name is that of the architecture and the
/// variant's suffix: "generic", "sm80", "sm90", "sm90x2" (clusters of two thread blocks), "sm90rs"
/// (gradient products that read scores).
struct KernelSet {
  const Architecture* architecture = &generic::architecture;
  int cluster = 1;
  bool reads_scores = false;

  bool fused() const { return architecture->fused; }
};
bool operator==(const KernelSet& a, const KernelSet& b);
std::string name_of(const KernelSet& kernels);

/// Every variant of every architecture, in the table's order.
std::vector<KernelSet> all_kernel_sets();

/// What was measured on one GPU at one shape: the fastest kernels, whole calls compared.
struct MeasuredChoice {
  std::string gpu{};   // its name, "NVIDIA H200"
  int capability = 0;  // as in Gpu
  DType dtype = DType::kBFloat16;
  int64_t tokens = 0, features = 0, vocab = 0;
  bool skips = false;                       // measured with tiles skipped
  std::string kernels = "generic,generic";  // "scores,products"
  bool here = false;                        // by memeff-tune, on this machine
};

/// All that is known of kernels: choices, and those that memeff-tune saw fail, by the GPU's name.
struct MeasuredChoices {
  std::vector<MeasuredChoice> rows;
  std::vector<std::pair<std::string, std::string>> banned{};  // GPU, one name of kernels
};

struct Selection {
  KernelSet scores;    // x W^T with statistics or gradients in its epilogue
  KernelSet products;  // grad_input and grad_weight from gradients of the logits
  // Why these: asked for; else the measurement that was followed; else predicted to win in the
  // memory that the call may take (choose_plan); else by default, though others could run, too.
  bool forced = false;
  const MeasuredChoice* measured = nullptr;
  bool predicted = false;
  bool others_can_run = false;
  int capability = 0;  // of the GPU
};

/// Where it is unknown: those of a GPU that is often met with this compute capability.
int multiprocessors_of(const Gpu& gpu);

/// The table of measured choices: measured_choices.inc, which scripts/verify_gpu.py writes.
const std::vector<MeasuredChoice>& committed_choices();

/// That table, and what memeff-tune has found on this machine (memeff/tuning.py reads its file).
const MeasuredChoices& measured_choices();
/// Adds to it. Other threads may plan calls meanwhile.
void add_tuned(const MeasuredChoices& tuned);

/// The kernels for the problem on that GPU:
///
///   1. `forced` where the problem and the GPU allow it: "" or "scores,products", two names of
///      kernels (the environment variable MEMEFF_CUDA_KERNELS, for tests and benchmarks);
///   2. what `measured` has for it. A row counts if it was measured on this compute capability, in
///      this dtype, skipping tiles or not as the problem does, at a shape whose tokens, features
///      and classes each differ by no more than a factor of 4, and if its kernels can run the
///      problem and are not banned. Rows of this machine come first (for the GPU of that name alone),
///      then those of a GPU of the same name; then the nearest shape, by the sum of the three
///      |log2(ratio)|; then the first. With a memory budget choose_plan (plan.h) may prefer products
///      of the same architecture as the scores;
///   3. generic: what runs unless asked for or measured is certain to work.
///
/// A name that means nothing is reported in `error`.
Selection select_kernels(const Problem& problem, const Gpu& gpu, const std::string& forced,
                         const MeasuredChoices& measured, std::string* error);

/// The value of MEMEFF_CUDA_KERNELS, "" where it is not set.
std::string forced_kernels();

/// What a choice depends on in addition to shapes and what was measured, in a few words: the families that
/// can run the problem, forced kernels, the GPU.
std::string describe_choice(const Problem& problem, const Gpu& gpu, const std::string& forced);

/// "scores,products", as in `forced`.
std::string name_of(const Selection& selection);
/// Sets both kernels from such a name; false if it means nothing.
bool parse_kernels(const std::string& names, Selection* selection);
/// "default", "default; run memeff-tune to use faster ones", "predicted", "measured on NVIDIA H200 at
/// 8192x4096x128256", "tuned on ..." or "MEMEFF_CUDA_KERNELS".
std::string reason_of(const Selection& selection);
/// For errors: "generic,generic kernels (default; run memeff-tune to use faster ones)".
std::string in_words(const Selection& selection);

}  // namespace memeff::cuda
