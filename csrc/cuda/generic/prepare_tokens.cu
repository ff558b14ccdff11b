// Which tokens take part in a call, and the numbers that all of them share.
//
//   read_targets   target [N] -> class, w_y; one thread per token
//   scalars        -> CallScalars; one thread block
//
// Small next to one block of scores; arithmetic is in fp64 and in a fixed order.
#include <cmath>

#include "core/math.h"
#include "cuda/common/block_sum.cuh"
#include "cuda/generic/token_coefficients.cuh"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 256;

template <class A>
__global__ void __launch_bounds__(kThreads)
    read_targets_kernel(Problem problem, TokenArrays tokens) {
  const int64_t token = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= problem.tokens) return;
  int64_t target = kNoTarget;
  double mass = 0.0;
  A logit = A(0);
  if (problem.target != nullptr && problem.target[token] != problem.ignore_index) {
    target = problem.target[token];
    const int64_t here = target - tokens.first_class;
    if (target < 0 || target >= tokens.vocab) {
      // A kernel cannot raise an error. NaN spreads to whatever is made of this token.
      target = kBadTarget;
      mass = NAN;
      logit = static_cast<A>(NAN);
    } else {
      const bool is_here = here >= 0 && here < problem.vocab;
      target = is_here ? here : kElsewhere;
      // Another rank knows the weight of its class.
      mass = problem.class_weight == nullptr ? 1.0 : is_here ? problem.class_weight[here] : 0.0;
    }
  }
  tokens.target[token] = target;
  tokens.target_mass[token] = mass;
  if (tokens.target_logit != nullptr) static_cast<A*>(tokens.target_logit)[token] = logit;
}

// An upper bound of what `magnitude` (GradientFactors) of a token may be, before its lse is known.
// Logits that torch computes in fp16 are below 2^16. Of statistics that are differentiated in the
// forward pass nothing is known yet: then coefficients up to 2^12 and, times hidden states, up to
// 2^28 fit.
MEMEFF_DEVICE double bound_of(const Problem& problem, const TokenArrays& tokens, int64_t token,
                              double largest_weight, double total_weight, double z_share) {
  if (tokens.for_statistics) {
    const TokenStatistics& wanted = tokens.wanted;
    double bound = 0.0;
    if (wanted.differentiate != nullptr) return bound;
    if (wanted.grad_logprob != nullptr) bound += fabs(wanted.grad_logprob[token]);
    if (wanted.grad_lse != nullptr) bound += fabs(wanted.grad_lse[token]);
    if (wanted.grad_logit_sum != nullptr) bound = fmax(bound, fabs(wanted.grad_logit_sum[token]));
    if (wanted.grad_entropy != nullptr)
      bound = fmax(bound, 16.0 * fabs(wanted.grad_entropy[token]));
    return wanted.inverse_temperature == nullptr ? bound
                                                 : bound * wanted.inverse_temperature[token];
  }
  double g = problem.token_weight == nullptr ? 1.0 : fabs(problem.token_weight[token]);
  if (problem.grad_loss != nullptr && problem.reduction == Reduction::kNone)
    g *= fabs(problem.grad_loss[token]);
  const double eps = problem.label_smoothing;
  // Ranks that share a vocabulary need the same bound.
  const bool own = problem.probabilities == nullptr && !tokens.shared;
  const double mass = own ? tokens.target_mass[token] : largest_weight;
  const double largest_lse =
      problem.softcap > 0.0 ? problem.softcap + log(static_cast<double>(tokens.vocab)) : 65536.0;
  return g * ((1.0 - eps) * mass + eps / static_cast<double>(tokens.vocab) * total_weight +
              2.0 * fabs(problem.z_loss) * largest_lse * z_share);
}

constexpr int kScalarThreads = 1024;

// One block for the whole call: at most 16 bytes per token and 8 per class, read once. Ranks that share
// a vocabulary with class weights run it twice: `own` gets what this rank knows of the weights, `all` has
// what all ranks know.
__global__ void __launch_bounds__(kScalarThreads)
    scalars_kernel(Problem problem, TokenArrays tokens, double* own, const double* all,
                   int64_t ranks) {
  MEMEFF_SHARED_ARRAY(double, scratch, kMaxWarpsPerBlock);
  double counted = static_cast<double>(problem.tokens), weight = counted, bad = 0.0;
  if (problem.target != nullptr) {
    counted = weight = 0.0;
    for (int64_t token = threadIdx.x; token < problem.tokens; token += kScalarThreads) {
      const int64_t target = tokens.target[token];
      const double mass = tokens.target_mass[token];
      if (target == kNoTarget) continue;
      counted += 1.0;
      // A bad target has no weight of its own; gradients of the other tokens stay finite.
      if (target == kBadTarget) bad += 1.0;
      if (target != kBadTarget) weight += mass;
    }
    counted = block_sum(counted, scratch);
    weight = block_sum(weight, scratch);
    bad = block_sum(bad, scratch);
  }
  double total = static_cast<double>(tokens.vocab), largest = 1.0;
  if (problem.class_weight != nullptr) {
    total = largest = 0.0;
    for (int64_t v = threadIdx.x; v < problem.vocab; v += kScalarThreads) {
      total += problem.class_weight[v];
      largest = fmax(largest, problem.class_weight[v]);
    }
    total = block_sum(total, scratch);
    largest = block_max(largest, scratch);
  }
  if (own != nullptr && threadIdx.x == 0) own[0] = total, own[1] = weight, own[2] = largest;
  if (all != nullptr) {
    total = largest = 0.0;
    if (problem.target != nullptr)
      weight = 0.0;  // otherwise every token counts as 1, on every rank
    for (int64_t rank = 0; rank < ranks; ++rank) {
      total += all[kTotals * rank];
      if (problem.target != nullptr) weight += all[kTotals * rank + 1];
      largest = fmax(largest, all[kTotals * rank + 2]);
    }
  }
  weight += bad;
  CallScalars scalars{1.0, 1.0, total, 1.0, 0, 1.0f, 0};
  if (problem.reduction == Reduction::kMean) {
    scalars.denominator = problem.num_items != nullptr ? *problem.num_items : weight;
    scalars.z_denominator = problem.num_items != nullptr ? *problem.num_items : counted;
  }
  if (problem.dtype == DType::kFloat16) {
    double bound = 0.0;
    for (int64_t token = threadIdx.x; token < problem.tokens; token += kScalarThreads)
      if (problem.target == nullptr || tokens.target[token] >= 0 ||
          tokens.target[token] == kElsewhere)
        bound = fmax(bound, bound_of(problem, tokens, token, largest, total,
                                     scalars.denominator / scalars.z_denominator));
    const int digits = digits_too_many(block_max(bound, scratch));
    scalars.exponent = digits > 0 ? digits : 0;
  }
  if (threadIdx.x != 0) return;

  if (scales_sums(problem)) {
    // With every token left out gradients are 0, not 0/0, as in torch.
    scalars.output_scale =
        counted > 0.0 || tokens.for_statistics ? problem.logit_scale / scalars.denominator : 0.0;
    if (problem.grad_loss != nullptr && problem.reduction != Reduction::kNone)
      scalars.output_scale *= problem.grad_loss[0];
    scalars.output_scale_float = static_cast<float>(ldexp(scalars.output_scale, scalars.exponent));
  }
  *tokens.scalars = scalars;
}

Status launch_scalars(const Problem& problem, const TokenArrays& tokens, double* own,
                      const double* all, int64_t ranks, void* stream) {
  MEMEFF_LAUNCH(scalars_kernel, dim3(1), dim3(kScalarThreads), 0, stream, problem, tokens, own, all,
                ranks);
  return launch_status();
}

}  // namespace

Status prepare_tokens(const Problem& problem, const TokenArrays& tokens, void* stream) {
  const auto read_targets =
      in_double(problem) ? read_targets_kernel<double> : read_targets_kernel<float>;
  if (problem.tokens > 0)
    MEMEFF_LAUNCH(read_targets, dim3(static_cast<unsigned>(ceil_div(problem.tokens, kThreads))),
                  dim3(kThreads), 0, stream, problem, tokens);
  return launch_scalars(problem, tokens, nullptr, nullptr, 0, stream);
}

Status say_totals(const Problem& problem, const TokenArrays& tokens, double* own, void* stream) {
  return launch_scalars(problem, tokens, own, nullptr, 0, stream);
}

Status merge_totals(const Problem& problem, const TokenArrays& tokens, const double* all,
                    int64_t ranks, void* stream) {
  return launch_scalars(problem, tokens, nullptr, all, ranks, stream);
}

}  // namespace memeff::cuda
