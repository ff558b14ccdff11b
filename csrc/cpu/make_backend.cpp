// Chooses the CPU backend, and tells the planner about it.
#include "cpu/bf16_backend.h"
#include "cpu/blas_backend.h"
#include "cpu/features.h"
#include "cpu/parallel.h"

namespace memeff {
namespace {

bool uses_bf16_kernels(const Problem& problem) {
  // With a soft cap, label smoothing and the gradient of the entropy need the score itself, which the bf16
  // kernels do not keep; the largest scores are picked from whole slices, and probability targets are
  // read element by element anyway.
  const TokenStatistics* statistics = problem.token_statistics;
  const bool entropy_gradient = statistics != nullptr && statistics->grad_entropy != nullptr;
  const bool needs_scores =
      problem.softcap > 0 && (problem.label_smoothing > 0 || entropy_gradient);
  const bool top = statistics != nullptr && statistics->top > 0;
  return problem.dtype == DType::kBFloat16 && problem.probabilities == nullptr && !needs_scores &&
         !top && problem.features > 0 && cpu_features().avx512_bf16;
}

/// Per-tile partial sums that the problem needs: see Partial in cpu/tokens.h.
int count_partials(const Problem& problem) {
  return 2 + (problem.label_smoothing > 0 ? 1 : 0) + (wants_entropy(problem) ? 1 : 0) +
         (wants_argmax(problem) ? 1 : 0) + (problem.probabilities != nullptr ? 3 : 0);
}

}  // namespace

void complete_request(const Problem& problem, PlanRequest* request) {
  request->bf16_kernels = uses_bf16_kernels(problem);
  request->cpu_blas = !request->bf16_kernels;
  request->compact_sums = true;
  request->partials = count_partials(problem);
  request->threads = max_threads();
}

std::unique_ptr<Backend> make_cpu_backend(const CpuContext& context) {
#if defined(__x86_64__)
  if (context.request->bf16_kernels) return std::make_unique<Bf16Backend>(context);
#endif
  if (context.problem->dtype == DType::kFloat64)
    return std::make_unique<BlasBackend<double>>(context);
  return std::make_unique<BlasBackend<float>>(context);
}

}  // namespace memeff
