// From targets and partial statistics to what the loss and the gradient need of each token.
//
//   prepare_tokens      target [N] -> class, w_y, and the numbers that all tokens share
//   merge_statistics    ranges r of classes, each with its maximum m_r, -> the whole vocabulary:
//                         m = max_r m_r,  S = sum_r exp(m_r - m) s_r,  lse = m + log S
//                         entropy = log S - 1/S sum_r exp(m_r - m) (e_r + (m_r - m) s_r)
//                       and plain sums over r of the other statistics
//                     (numbers of several ranks: generic/tokens_of_ranks.cu)
//   restore_statistics  lse as an earlier merge left it
//   mark_tiles          stored tiles without enough probability mass to matter
//
// The last step of merging and restoring makes the coefficients (kernel_arguments.h) of
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
// All of this is small next to one block of scores; arithmetic is in fp64 and in a fixed order.
#include <cmath>

#include "cuda/common/block_sum.cuh"
#include "cuda/common/vector_io.cuh"
#include "cuda/tokens.h"

namespace memeff::cuda {

namespace {

constexpr int kThreads = 256;  // of kernels with one thread per token

unsigned blocks_of(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

bool in_double(const Problem& problem) {
  return accumulation_dtype(problem.dtype) == DType::kFloat64;
}

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

// ---- targets ----

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

// An upper bound of what `magnitude` (Factors) of a token may be, before its lse is known. Logits that
// torch computes in fp16 are below 2^16. Of statistics that are differentiated in the forward pass
// nothing is known yet: then coefficients up to 2^12 and, times hidden states, up to 2^28 fit.
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

// ---- coefficients ----

// Factors of p_v, of the target and of w_v in the gradient, the latter two to be subtracted; and of
// p_v (z_v - expected_logit), with sum_v p_v z_v. No term of a gradient is larger than `magnitude`.
struct Factors {
  double softmax = 0.0, target = 0.0, weighted = 0.0, entropy = 0.0, expected_logit = 0.0;
  double magnitude = 0.0;

  MEMEFF_DEVICE void multiply(double factor) {
    softmax *= factor, target *= factor, weighted *= factor, entropy *= factor;
  }
};

// Coefficients of token statistics, from the caller's upstream gradients (core/problem.h).
MEMEFF_DEVICE Factors factors_of_statistics(const Problem& problem, const TokenArrays& tokens,
                                            int64_t token, double lse) {
  const TokenStatistics& wanted = tokens.wanted;
  const int64_t target = tokens.target[token];
  Factors factors;
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

MEMEFF_DEVICE Factors factors_of(const Problem& problem, const TokenArrays& tokens, int64_t token,
                                 double lse, double target_mass) {
  if (tokens.for_statistics) return factors_of_statistics(problem, tokens, token, lse);
  Factors factors;
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

template <class A>
MEMEFF_DEVICE void store_coefficients(const Problem& problem, const TokenArrays& tokens,
                                      int64_t token, double lse, double target_mass,
                                      Factors factors) {
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

// ---- merging ----

// A thread block owns 32 adjacent tokens, so that a warp reads 128 adjacent bytes of a range, and
// its 16 warps take every sixteenth range: with one thread per token alone, a block of 1024 tokens
// and 1000 ranges would leave most of a GPU idle. Two passes over the maxima (the second one comes
// from L2): the first finds m, after which each range needs one exponential. The 16 results per
// token meet in shared memory (10 KiB, 12 in fp64).
//
// Numerics: exp(m_r - m) is computed in A, because fp64 exponentials are slow on most GPUs; its
// error is that of the partial sums themselves. Sums over ranges and the logarithm are in fp64.
constexpr int kMergedTokens = 32;
constexpr int kMergingWarps = 16;
constexpr int kMergeScratch = kMergedTokens * kMergingWarps;

MEMEFF_DEVICE double sum_over_warps(double value, double* scratch) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  __syncthreads();  // an earlier sum may still be read
  scratch[warp * kMergedTokens + lane] = value;
  __syncthreads();
  double sum = 0.0;
  for (int other = 0; other < kMergingWarps; ++other) sum += scratch[other * kMergedTokens + lane];
  return sum;
}

// A token's sum over all ranges: `values` points to its element of the first range.
template <class A>
MEMEFF_DEVICE double sum_over_ranges(const void* values, int64_t column, int64_t stride,
                                     int64_t ranges, double* scratch) {
  double sum = 0.0;
  for (int64_t r = threadIdx.y; r < ranges; r += kMergingWarps)
    sum += static_cast<double>(static_cast<const A*>(values)[r * stride + column]);
  return sum_over_warps(sum, scratch);
}

template <class A>
struct Maximum {
  A value;
  int64_t range;  // the first one that has it
};

template <class A>
MEMEFF_DEVICE Maximum<A> maximum_over_ranges(const PartialStatistics& partials, int64_t column,
                                             int64_t ranges) {
  MEMEFF_SHARED_ARRAY(A, values, kMergeScratch);
  MEMEFF_SHARED_ARRAY(int64_t, places, kMergeScratch);
  const int lane = threadIdx.x, warp = threadIdx.y;
  Maximum<A> best{A(-INFINITY), 0};
  for (int64_t r = warp; r < ranges; r += kMergingWarps) {
    const A value = static_cast<const A*>(partials.max)[r * partials.max_stride + column];
    if (value > best.value || value != value) best = {value, r};
  }
  values[warp * kMergedTokens + lane] = best.value;
  places[warp * kMergedTokens + lane] = best.range;
  __syncthreads();
  for (int other = 0; other < kMergingWarps; ++other) {
    const Maximum<A> theirs{values[other * kMergedTokens + lane],
                            places[other * kMergedTokens + lane]};
    if (theirs.value > best.value || theirs.value != theirs.value ||
        (theirs.value == best.value && theirs.range < best.range))
      best = theirs;
  }
  return best;
}

template <class A>
__global__ void __launch_bounds__(kMergedTokens* kMergingWarps)
    merge_statistics_kernel(Problem problem, TokenArrays tokens, int64_t begin, int64_t end,
                            PartialStatistics partials, int64_t ranges) {
  MEMEFF_SHARED_ARRAY(double, scratch, kMergeScratch);
  const int64_t own_column = int64_t{blockIdx.x} * kMergedTokens + threadIdx.x;
  // Threads without a token read the last one's numbers, because of the barriers.
  const int64_t column = own_column < end - begin ? own_column : end - begin - 1;
  const int64_t token = begin + column, stride = partials.stride;

  const Maximum<A> maximum = maximum_over_ranges<A>(partials, column, ranges);
  double sum = 0.0, offset_sum = 0.0;
  for (int64_t r = threadIdx.y; r < ranges; r += kMergingWarps) {
    const A max = static_cast<const A*>(partials.max)[r * partials.max_stride + column];
    const A offset = max - maximum.value;
    // A range of -inf alone adds nothing (offset may be NaN); NaN in a sum stays visible.
    const A scale = max == A(-INFINITY) ? A(0) : std::exp(offset);
    const double range_sum = static_cast<const A*>(partials.sum)[r * stride + column];
    sum += static_cast<double>(scale) * range_sum;
    if (tokens.entropy != nullptr && scale > A(0)) {
      const double entropy = static_cast<const A*>(partials.entropy)[r * stride + column];
      offset_sum +=
          static_cast<double>(scale) * (entropy + static_cast<double>(offset) * range_sum);
    }
  }
  sum = sum_over_warps(sum, scratch);
  const double log_sum = log(sum);
  // exp(inf - inf) is NaN, but its logarithm is known. With a NaN among the logits that is the maximum.
  const auto top = static_cast<double>(maximum.value);
  const double lse = top == INFINITY ? top : top + log_sum;
  const bool writes = threadIdx.y == 0 && own_column < end - begin;

  if (tokens.entropy != nullptr) {
    offset_sum = sum_over_warps(offset_sum, scratch);
    if (writes) tokens.entropy[token] = log_sum - offset_sum / sum;
  }
  if (tokens.smooth != nullptr) {
    const double smooth = sum_over_ranges<A>(partials.smooth, column, stride, ranges, scratch);
    if (writes) tokens.smooth[token] = smooth;
  }
  double target_mass = 0.0;
  if (problem.probabilities != nullptr) {
    const double dot = sum_over_ranges<A>(partials.target_dot, column, stride, ranges, scratch);
    const double plain = sum_over_ranges<A>(partials.target_plain, column, stride, ranges, scratch);
    target_mass = sum_over_ranges<A>(partials.target_mass, column, stride, ranges, scratch);
    if (writes) {
      tokens.target_dot[token] = dot;
      tokens.target_plain[token] = plain;
      tokens.target_mass[token] = target_mass;
    }
  }
  if (!writes) return;

  tokens.lse[token] = lse;
  if (tokens.maximum != nullptr) tokens.maximum[token] = maximum.value;
  if (tokens.argmax != nullptr) {
    const bool any = maximum.value > A(-INFINITY);
    tokens.argmax[token] = any ? partials.argmax[maximum.range * stride + column] : 0;
  }
  if (tokens.for_statistics || tokens.shared) return;
  if (problem.probabilities == nullptr) target_mass = tokens.target_mass[token];
  const Factors factors = factors_of(problem, tokens, token, lse, target_mass);
  store_coefficients<A>(problem, tokens, token, lse, target_mass, factors);
}

// ---- restoring ----

constexpr int kMassThreads = 256;

// sum_v w_v q_v, one thread block per token: the backward op knows lse, but not this.
__global__ void __launch_bounds__(kMassThreads)
    probability_mass_kernel(Problem problem, TokenArrays tokens) {
  MEMEFF_SHARED_ARRAY(double, scratch, kMaxWarpsPerBlock);
  const int64_t token = blockIdx.x;
  const int64_t first = token * problem.probabilities_token_stride;
  double mass = 0.0;
  for (int64_t v = threadIdx.x; v < problem.vocab; v += kMassThreads) {
    const double q = load_any<double>(problem.probabilities, problem.probabilities_dtype,
                                      first + v * problem.probabilities_class_stride);
    mass += problem.class_weight == nullptr ? q : q * problem.class_weight[v];
  }
  mass = block_sum(mass, scratch);
  if (threadIdx.x == 0) tokens.target_mass[token] = mass;
}

// From `known`, the lse of all tokens.
template <class A>
__global__ void __launch_bounds__(kThreads)
    set_coefficients_kernel(Problem problem, TokenArrays tokens, const double* known, int64_t begin,
                            int64_t end) {
  const int64_t token = begin + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= end) return;
  const double lse = known[token], target_mass = tokens.target_mass[token];
  tokens.lse[token] = lse;
  const Factors factors = factors_of(problem, tokens, token, lse, target_mass);
  store_coefficients<A>(problem, tokens, token, lse, target_mass, factors);
}

// ---- tiles that a gradient may leave out ----

constexpr int kMarkingWarps = 8;

// A warp decides about one tile, four tokens per lane; the warps of a block have adjacent tiles of
// classes. Bound by reading the partial statistics once.
__global__ void __launch_bounds__(32 * kMarkingWarps)
    mark_tiles_kernel(TokenArrays tokens, int64_t begin, int64_t end, PartialStatistics partials,
                      TileMarks to) {
  const int64_t range = int64_t{blockIdx.y} * kMarkingWarps + threadIdx.y;
  if (range * kStoredTile >= to.vocab) return;
  const int64_t rest = to.vocab - range * kStoredTile;
  const int64_t classes = rest < kStoredTile ? rest : kStoredTile;
  const auto enough =
      static_cast<float>(to.mass * static_cast<double>(classes) / static_cast<double>(to.vocab));
  const auto* max = static_cast<const float*>(partials.max) + range * partials.max_stride;
  const auto* sum = static_cast<const float*>(partials.sum) + range * partials.stride;
  bool counts = false;
  for (int i = threadIdx.x; i < kTokenTile; i += 32) {
    const int64_t column = int64_t{blockIdx.x} * kTokenTile + i;
    if (column >= end - begin) break;
    const int64_t target = tokens.target[begin + column];
    if (target == kNoTarget) continue;  // left out: its gradient is zero anyway
    const double offset = static_cast<double>(max[column]) - tokens.lse[begin + column];
    const float mass = sum[column] * expf(static_cast<float>(offset));
    // Not "mass >= enough": NaN must not be left out, nor what a bad target turns into NaN.
    counts |=
        !(mass < enough) || target == kBadTarget || (target >= 0 && target / kStoredTile == range);
  }
  const int any = __any_sync(~0u, counts);
  if (threadIdx.x == 0) to.marks[range * to.stride + blockIdx.x] = any != 0 ? 1 : 0;
}

// ---- launches that several functions share ----

Status launch_scalars(const Problem& problem, const TokenArrays& tokens, double* own,
                      const double* all, int64_t ranks, void* stream) {
  MEMEFF_LAUNCH(scalars_kernel, dim3(1), dim3(kScalarThreads), 0, stream, problem, tokens, own, all,
                ranks);
  return launch_status();
}

Status launch_coefficients(const Problem& problem, const TokenArrays& tokens, const double* lse,
                           int64_t begin, int64_t end, void* stream) {
  if (begin == end) return {};
  const auto set =
      in_double(problem) ? set_coefficients_kernel<double> : set_coefficients_kernel<float>;
  MEMEFF_LAUNCH(set, dim3(blocks_of(end - begin, kThreads)), dim3(kThreads), 0, stream, problem,
                tokens, lse, begin, end);
  return launch_status();
}

}  // namespace

Status prepare_tokens(const Problem& problem, const TokenArrays& tokens, void* stream) {
  const auto read_targets =
      in_double(problem) ? read_targets_kernel<double> : read_targets_kernel<float>;
  if (problem.tokens > 0)
    MEMEFF_LAUNCH(read_targets, dim3(blocks_of(problem.tokens, kThreads)), dim3(kThreads), 0,
                  stream, problem, tokens);
  return launch_scalars(problem, tokens, nullptr, nullptr, 0, stream);
}

Status say_totals(const Problem& problem, const TokenArrays& tokens, double* own, void* stream) {
  return launch_scalars(problem, tokens, own, nullptr, 0, stream);
}

Status merge_totals(const Problem& problem, const TokenArrays& tokens, const double* all,
                    int64_t ranks, void* stream) {
  return launch_scalars(problem, tokens, nullptr, all, ranks, stream);
}

Status merge_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                        int64_t end, const PartialStatistics& partials, int64_t ranges,
                        void* stream) {
  if (begin == end) return {};
  if ((tokens.entropy != nullptr && partials.entropy == nullptr) ||
      (tokens.argmax != nullptr && partials.argmax == nullptr) ||
      (tokens.smooth != nullptr && partials.smooth == nullptr))
    return {"merge_statistics: a statistic is wanted whose partial statistics are not given"};
  const auto merge =
      in_double(problem) ? merge_statistics_kernel<double> : merge_statistics_kernel<float>;
  MEMEFF_LAUNCH(merge, dim3(blocks_of(end - begin, kMergedTokens)),
                dim3(kMergedTokens, kMergingWarps), 0, stream, problem, tokens, begin, end,
                partials, ranges);
  return launch_status();
}

Status restore_statistics(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                          int64_t end, void* stream) {
  if (begin == end) return {};
  if (problem.probabilities != nullptr)
    MEMEFF_LAUNCH(probability_mass_kernel, dim3(static_cast<unsigned>(problem.tokens)),
                  dim3(kMassThreads), 0, stream, problem, tokens);
  return launch_coefficients(problem, tokens, problem.lse, begin, end, stream);
}

Status set_coefficients(const Problem& problem, const TokenArrays& tokens, int64_t begin,
                        int64_t end, void* stream) {
  return launch_coefficients(problem, tokens, tokens.lse, begin, end, stream);
}

Status mark_tiles(const Problem& problem, const TokenArrays& tokens, int64_t begin, int64_t end,
                  const PartialStatistics& partials, const TileMarks& marks, void* stream) {
  if (!is_16_bit(problem.dtype)) return {"mark_tiles: scores are stored of 16-bit inputs only"};
  if (problem.probabilities != nullptr || (problem.label_smoothing > 0 && !tokens.weighted_apart))
    return {"mark_tiles: class probabilities and label smoothing reach every tile"};
  if (begin == end) return {};
  const dim3 grid(blocks_of(end - begin, kTokenTile),
                  blocks_of(marks.vocab, kStoredTile * kMarkingWarps));
  MEMEFF_LAUNCH(mark_tiles_kernel, grid, dim3(32, kMarkingWarps), 0, stream, tokens, begin, end,
                partials, marks);
  return launch_status();
}

}  // namespace memeff::cuda
