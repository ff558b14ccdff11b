// Which kernels a problem runs on: plain C++, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>
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
  const char* gpu = "";  // its name, "NVIDIA H200"
  int capability = 0;    // as in Gpu
  DType dtype = DType::kBFloat16;
  int64_t tokens = 0, features = 0, vocab = 0;
  bool skips = false;                       // measured with tiles skipped
  const char* kernels = "generic,generic";  // "scores,products"
};

struct Selection {
  KernelSet scores;    // x W^T with statistics or gradients in its epilogue
  KernelSet products;  // grad_input and grad_weight from gradients of the logits
  // Why these: asked for; else the measurement that was followed; else predicted to win in the
  // memory that the call may take (choose_plan); else the rule by default.
  bool forced = false;
  const MeasuredChoice* measured = nullptr;
  bool predicted = false;
  int capability = 0;  // of the GPU

  /// Whether scores are kept in 16 bits (StoredScores) rather than as products of type A.
  bool stores_16_bits() const { return scores.fused(); }
};

/// Where it is unknown: those of a GPU that is often met with this compute capability.
int multiprocessors_of(const Gpu& gpu);

/// The table of measured choices: measured_choices.inc, which scripts/verify_gpu.py writes.
const std::vector<MeasuredChoice>& measured_choices();

/// The kernels for the problem on that GPU:
///
///   1. `forced` where the problem and the GPU allow it: "" or "scores,products", two names of
///      kernels (the environment variable MEMEFF_CUDA_KERNELS, for tests and benchmarks);
///   2. what `measured` has for it. A row counts if it was measured on this compute capability, in
///      this dtype, skipping tiles or not as the problem does, at a shape whose tokens, features
///      and classes each differ by no more than a factor of 4, and if its kernels can run the
///      problem. Rows of a GPU of the same name come first; then the nearest shape, by the sum of
///      the three |log2(ratio)|; then the first;
///   3. the last architecture of the table that the problem and the GPU allow for the scores; for the
///      products cuBLAS, or where tiles are skipped the same. choose_plan (plan.h) may prefer the
///      latter.
///
/// A name that means nothing is reported in `error`.
Selection select_kernels(const Problem& problem, const Gpu& gpu, const std::string& forced,
                         const std::vector<MeasuredChoice>& measured, std::string* error);

/// The value of MEMEFF_CUDA_KERNELS, "" where it is not set.
std::string forced_kernels();

/// "scores,products", as in `forced`.
std::string name_of(const Selection& selection);
/// Sets both kernels from such a name; false if it means nothing.
bool parse_kernels(const std::string& names, Selection* selection);
/// "default", "predicted", "measured on NVIDIA H200 at 8192x4096x128256" or "MEMEFF_CUDA_KERNELS".
std::string reason_of(const Selection& selection);

}  // namespace memeff::cuda
