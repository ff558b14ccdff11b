// Chooses the CPU backend, and reports it to the planner.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "cpu/bf16_backend.h"
#include "cpu/blas_backend.h"
#include "cpu/features.h"
#include "cpu/parallel.h"

namespace memeff {
namespace {

constexpr char kAvx512Bf16[] = "avx512_bf16", kPortable[] = "bf16_portable", kBlas[] = "blas",
               kBatchInvariant[] = "batch_invariant";

/// What computes the products of bf16 calls, or the scores of all.
std::string chosen_products() {
  const char* forced = std::getenv("MEMEFF_CPU_KERNELS");
  if (forced != nullptr && *forced != '\0') return forced;
  return cpu_features().avx512_bf16 ? kAvx512Bf16 : kBlas;
}

bool bf16_kernels_support(const Problem& problem) {
  // With a soft cap, the gradients of smoothing, of sums of logits and of the entropy need the score itself, which the bf16
  // kernels do not keep; the largest scores are picked from whole slices, and probability targets are
  // read element by element anyway.
  const TokenStatistics* statistics = problem.token_statistics;
  const bool entropy_gradient = statistics != nullptr && statistics->grad_entropy != nullptr;
  const bool needs_scores =
      problem.softcap > 0 && (reaches_all_classes(problem) || entropy_gradient);
  const bool top = statistics != nullptr && statistics->top > 0;
  return problem.dtype == DType::kBFloat16 && problem.probabilities == nullptr && !needs_scores &&
         !top && problem.features > 0;
}

/// Per-tile partial sums that the problem needs: see Partial in cpu/tokens.h.
int count_partials(const Problem& problem) {
  return 2 + (wants_logit_sum(problem) ? 1 : 0) + (wants_entropy(problem) ? 1 : 0) +
         (wants_argmax(problem) ? 1 : 0) + (problem.probabilities != nullptr ? 3 : 0);
}

}  // namespace

std::string complete_request(const Problem& problem, CpuPlanRequest* request) {
  const std::string products = chosen_products();
  const bool handwritten = products == kAvx512Bf16 || products == kPortable;
  if (!handwritten && products != kBlas && products != kBatchInvariant) {
    return "MEMEFF_CPU_KERNELS='" + products + "': expected '" + kAvx512Bf16 + "', '" + kPortable +
           "', '" + kBlas + "' or '" + kBatchInvariant + "'";
  }
  if (products == kAvx512Bf16 && !cpu_features().avx512_bf16) {
    return std::string("MEMEFF_CPU_KERNELS='") + kAvx512Bf16 +
           "': this processor has no AVX512-BF16, expected '" + kPortable + "' or '" + kBlas + "'";
  }
  request->bf16_kernels = handwritten && bf16_kernels_support(problem);
  request->blas = !request->bf16_kernels;
  request->fixed_order = products == kBatchInvariant;
  request->targets = problem.targets;
  request->partials = count_partials(problem);
  request->threads = std::max(max_threads(), request->most_threads);
  request->shared_numbers =
      problem.shard == nullptr ? 0 : rank_numbers(problem, request->statistics_known).count;
  return "";
}

std::string kernels_of(const CpuPlanRequest& request) {
  if (request.bf16_kernels) return chosen_products();
  return request.fixed_order ? kBatchInvariant : kBlas;
}

std::string plan_call(const Problem& problem, const PlanRequest& request, CpuCallPlan* call) {
  call->request = CpuPlanRequest{request};
  const std::string error = complete_request(problem, &call->request);
  if (!error.empty()) return error;
  call->plan.kernels = kernels_of(call->request);
  call->plan.kernels_reason =
      std::getenv("MEMEFF_CPU_KERNELS") != nullptr ? "MEMEFF_CPU_KERNELS" : "default";
  return make_plan(call->request, &call->plan);
}

std::unique_ptr<Backend> make_cpu_backend(const CpuContext& context) {
  if (context.request->bf16_kernels) {
#if defined(__x86_64__)
    if (chosen_products() == kAvx512Bf16)
      return std::make_unique<Bf16Backend>(context, bf16_kernels_avx512bf16());
#endif
    return std::make_unique<Bf16Backend>(context, bf16_kernels_portable());
  }
  if (context.problem->dtype == DType::kFloat64)
    return std::make_unique<BlasBackend<double>>(context);
  return std::make_unique<BlasBackend<float>>(context);
}

}  // namespace memeff
