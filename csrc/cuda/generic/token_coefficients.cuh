// The coefficients (kernel_arguments.h) of a token's gradient, from its statistics:
//
//   dz_v / g = p_v ( (1-eps) w_y + eps/V sum_v w_v + 2 z_loss lse D/D_z )
//              - (1-eps) w_y [v == y]  (or (1-eps) w_v q_v)  - eps/V w_v
//
// with D, D_z the denominators of the two parts of the loss and g the token's weight times its
// upstream gradient times logit_scale / D. For 16-bit inputs the factors that all tokens share are
// left to output_scale: rounded into every gradient they would err the same way each time.
//
// fp16 gradients hold no number beyond 65504, but their products may still be finite: token weights,
// upstream gradients times a loss scale, z_loss with a large lse. So the coefficients of a token are
// stored 2^-e_n times where they exceed 4096. grad_input takes that back row by row (input_scale); in
// grad_weight, a sum over tokens, the hidden states of token n count 2^(e_n - E) times, with one
// exponent E for the call, which output_scale takes back. Powers of two: nothing is rounded, unless
// hidden states that count little become smaller than fp16 has digits for.
//
// One thread per token, arithmetic in fp64.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/tokens.h"

namespace memeff::cuda {

// Whether the factors that all tokens share are applied to sums of gradients (output_scale). For
// device code; core/dtype.h has no device functions.
MEMEFF_DEVICE bool scales_sums(const Problem& problem) {
  return problem.dtype == DType::kBFloat16 || problem.dtype == DType::kFloat16;
}

// Binary digits of coefficients that fp16 gradients bear: 2^12, so that sums of their terms, and the
// distance of a logit from the expected one, leave them below 65504.
constexpr int kLargestDigits = 12;

// The digits of a positive number before its point, less those that may stay.
MEMEFF_DEVICE int digits_too_many(double magnitude) {
  if (!(magnitude > 0.0) || !isfinite(magnitude)) return -kLargestDigits;
  return ilogb(magnitude) + 1 - kLargestDigits;
}

// Factors of p_v, of the target and of w_v in the gradient, the latter two to be subtracted; and of
// p_v (z_v - expected_logit), with sum_v p_v z_v. No term of a gradient is larger than `magnitude`.
struct GradientFactors {
  double softmax = 0.0, target = 0.0, weighted = 0.0, entropy = 0.0, expected_logit = 0.0;
  double magnitude = 0.0;

  MEMEFF_DEVICE void multiply(double factor) {
    softmax *= factor, target *= factor, weighted *= factor, entropy *= factor;
  }
};

// Coefficients of token statistics, from the caller's upstream gradients (core/problem.h).
MEMEFF_DEVICE GradientFactors factors_of_statistics(const Problem& problem,
                                                    const TokenArrays& tokens, int64_t token,
                                                    double lse) {
  const TokenStatistics& wanted = tokens.wanted;
  const int64_t target = tokens.target[token];
  GradientFactors factors;
  if (target == kNoTarget && wanted.skip_ignored) return factors;
  double g = scales_sums(problem) ? 1.0 : problem.logit_scale;
  if (wanted.inverse_temperature != nullptr) g *= wanted.inverse_temperature[token];
  const bool has_target = target != kNoTarget && wanted.grad_logprob != nullptr;
  const double logprob = has_target ? g * wanted.grad_logprob[token] : 0.0;
  factors.softmax = -logprob;
  if (wanted.grad_lse != nullptr) factors.softmax += g * wanted.grad_lse[token];
  if (wanted.grad_entropy != nullptr) {
    factors.entropy = -g * wanted.grad_entropy[token];
    factors.expected_logit = lse - wanted.known_entropy[token];
  }
  factors.target = -logprob;
  if (wanted.grad_logit_sum != nullptr) factors.weighted = -g * wanted.grad_logit_sum[token];
  // p_v (z_v - expected_logit) is at most log V, the largest entropy.
  factors.magnitude = fmax(fmax(fabs(factors.softmax), fabs(logprob)),
                           fmax(fabs(factors.weighted), 16.0 * fabs(factors.entropy)));
  if (target == kBadTarget) factors.softmax = factors.target = NAN;
  return factors;
}

MEMEFF_DEVICE GradientFactors factors_of(const Problem& problem, const TokenArrays& tokens,
                                         int64_t token, double lse, double target_mass) {
  if (tokens.for_statistics) return factors_of_statistics(problem, tokens, token, lse);
  GradientFactors factors;
  if (problem.target != nullptr && tokens.target[token] == kNoTarget) return factors;
  double g = problem.token_weight == nullptr ? 1.0 : problem.token_weight[token];
  if (problem.grad_loss != nullptr && problem.reduction == Reduction::kNone)
    g *= problem.grad_loss[token];
  else if (problem.grad_loss != nullptr && !scales_sums(problem))
    g *= problem.grad_loss[0];
  const CallScalars* scalars = tokens.scalars;
  if (!scales_sums(problem)) g *= problem.logit_scale / scalars->denominator;
  const double eps = problem.label_smoothing;
  // With one class its probability is 1 and the cross entropy has no gradient: not even what rounding
  // leaves of terms that cancel, or the other last bits of a score that is computed again.
  const double cross_entropy = tokens.vocab == 1 && isfinite(lse) ? 0.0 : g;
  factors.target = cross_entropy * (1.0 - eps);
  factors.weighted = cross_entropy * eps / static_cast<double>(tokens.vocab);
  factors.softmax =
      factors.target * target_mass + factors.weighted * scalars->class_weight_total +
      g * 2.0 * problem.z_loss * lse * (scalars->denominator / scalars->z_denominator);
  factors.magnitude =
      fmax(fabs(factors.softmax), fmax(fabs(factors.target * target_mass),
                                       fabs(factors.weighted * scalars->class_weight_total)));
  return factors;
}

// e_n (CallScalars): no more than needed, unless the call's exponent wants hidden states to count less.
MEMEFF_DEVICE int exponent_of(double magnitude, int exponent_of_call) {
  const int least = digits_too_many(magnitude), most = least + kLargestDigits - 1;
  const int wanted = exponent_of_call < most ? exponent_of_call : most;
  return wanted > least ? (wanted > 0 ? wanted : 0) : (least > 0 ? least : 0);
}

// Stores what tokens.h lists from `shift` on.
template <class A>
MEMEFF_DEVICE void store_coefficients(const Problem& problem, const TokenArrays& tokens,
                                      int64_t token, double lse, double target_mass) {
  GradientFactors factors = factors_of(problem, tokens, token, lse, target_mass);
  int exponent = 0;
  if (problem.dtype == DType::kFloat16) {
    exponent = exponent_of(factors.magnitude, tokens.scalars->exponent);
    factors.multiply(ldexp(1.0, -exponent));
    if (tokens.input_scale != nullptr)
      tokens.input_scale[token] = static_cast<float>(ldexp(tokens.scalars->output_scale, exponent));
  }
  const A shift = static_cast<A>(lse);
  // Kernels compute exp(z - shift). What rounding lse changes in it is undone here.
  const double undone = isfinite(lse) ? exp(static_cast<double>(shift) - lse) : 1.0;
  double softmax = factors.softmax * undone;
  if (tokens.entropy_coefficient != nullptr) {
    const A entropy = static_cast<A>(factors.entropy * undone);
    const A centre = static_cast<A>(factors.expected_logit);
    static_cast<A*>(tokens.entropy_coefficient)[token] = entropy;
    static_cast<A*>(tokens.centre)[token] = centre;
    // So is what rounding the centre changes.
    if (factors.entropy != 0.0)
      softmax +=
          static_cast<double>(entropy) * (static_cast<double>(centre) - factors.expected_logit);
  }
  static_cast<A*>(tokens.shift)[token] = shift;
  static_cast<A*>(tokens.softmax)[token] = static_cast<A>(softmax);
  const bool soft = problem.probabilities != nullptr;
  const double target = soft ? -factors.target : -factors.target * target_mass;
  static_cast<A*>(tokens.target_coefficient)[token] = static_cast<A>(target);
  if (!soft) static_cast<A*>(tokens.target_rest)[token] = static_cast<A>(softmax + target);
  if (tokens.weighted != nullptr)
    static_cast<A*>(tokens.weighted)[token] = static_cast<A>(-factors.weighted);
  if (tokens.input_factor != nullptr) {
    // Not "== 0": a factor that is NaN is one.
    const bool counts = static_cast<A>(softmax) != A(0) || static_cast<A>(target) != A(0) ||
                        factors.weighted != 0.0 || factors.entropy != 0.0;
    const auto factor = static_cast<float>(ldexp(1.0, exponent - tokens.scalars->exponent));
    tokens.input_factor[token] = counts ? factor : 0.f;
  }
  if (tokens.target_gradient == nullptr || tokens.target_logit == nullptr) return;

  // The whole entry of the target's class: 1 - p keeps its digits only up here, in fp64.
  const double logit = static_cast<const A*>(tokens.target_logit)[token];
  const double weighted_part = tokens.weighted_apart ? 0.0 : factors.weighted;
  const double p = exp(logit - lse);
  double gradient = factors.softmax * p - (factors.target + weighted_part) * target_mass;
  if (factors.entropy != 0.0 && p != 0.0)
    gradient += factors.entropy * p * (logit - factors.expected_logit);
  if (problem.softcap > 0.0) {
    const double tanh = logit / problem.softcap;
    gradient *= 1.0 - tanh * tanh;
  }
  tokens.target_gradient[token] = static_cast<float>(gradient);
}

}  // namespace memeff::cuda
