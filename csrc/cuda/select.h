// Which kernels a problem runs on: plain C++, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.h"

namespace memeff::cuda {

/// A family of kernels. The generic ones leave matrix products to torch (cuBLAS). sm90x2 are those of
/// sm90 in clusters of two thread blocks; sm90rs the products of sm90, straight from kept scores
/// where these can be used so. What each can do is a row of the table in select.cpp.
enum class Family { kGeneric, kSm80, kSm90, kSm90x2, kSm90rs };

/// What was measured on one GPU at one shape: the fastest families, whole calls compared.
struct MeasuredChoice {
  const char* gpu = "";  // its name, "NVIDIA H200"
  int capability = 0;    // as in Gpu
  DType dtype = DType::kBFloat16;
  int64_t tokens = 0, features = 0, vocab = 0;
  bool skips = false;  // measured with skip_mass
  Family scores = Family::kGeneric, products = Family::kGeneric;
};

struct Selection {
  Family scores = Family::kGeneric;    // x W^T with statistics or gradients in its epilogue
  Family products = Family::kGeneric;  // grad_input and grad_weight from gradients of the logits
  // Why these: asked for; else the measurement that was followed; else predicted to win in the
  // memory that the call may take (choose_plan); else the rule by default.
  bool forced = false;
  const MeasuredChoice* measured = nullptr;
  bool predicted = false;

  /// Whether scores are kept in 16 bits (StoredScores) rather than as products of type A.
  bool stores_16_bits() const { return scores != Family::kGeneric; }
};

struct Gpu {
  int capability = 0;       // compute capability, 10 major + minor: 75, 80, 86, 89, 90, 100, 120
  std::string name{};       // as the CUDA runtime has it; "" where nobody knows
  int multiprocessors = 0;  // 0 where nobody knows
};

/// Where nobody knows: those of a GPU that is often met with this compute capability.
int multiprocessors_of(const Gpu& gpu);

/// The table of measured choices: measured_choices.inc, which scripts/verify_gpu.py writes.
const std::vector<MeasuredChoice>& measured_choices();

/// The families for the problem on that GPU:
///
///   1. `forced` where the problem and the GPU allow it: "" or "scores,products", two names of
///      families (the environment variable MEMEFF_CUDA_KERNELS, for tests and benchmarks);
///   2. what `measured` has for it. A row counts if it was measured on this compute capability, in
///      this dtype, with or without skip_mass as the problem is, at a shape whose tokens, features
///      and classes each differ by no more than a factor of 4, and if its families can run the
///      problem. Rows of a GPU of the same name come first; then the nearest shape, by the sum of
///      the three |log2(ratio)|; then the first;
///   3. the newest family that the problem and the GPU allow for the scores; for the products
///      cuBLAS, or with skip_mass the same family. choose_plan (plan.h) may prefer the latter.
///
/// A name that means nothing is reported in `error`.
Selection select_kernels(const Problem& problem, const Gpu& gpu, const std::string& forced,
                         const std::vector<MeasuredChoice>& measured, std::string* error);

/// The value of MEMEFF_CUDA_KERNELS, "" where it is not set.
std::string forced_kernels();

/// "scores,products", as in `forced`.
std::string name_of(const Selection& selection);
/// "default", "predicted", "measured on NVIDIA H200 at 8192x4096x128256" or "MEMEFF_CUDA_KERNELS".
std::string reason_of(const Selection& selection);

}  // namespace memeff::cuda
