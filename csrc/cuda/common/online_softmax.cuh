// Softmax statistics of a token that are computed from ranges of classes and merged.
#pragma once

#include "cuda/common/logit_transform.cuh"

namespace memeff::cuda {

// exp is taken relative to the maximum. With nothing but -inf so far, relative to 0: the sum stays
// 0, while a NaN logit still makes it NaN.
template <class A>
MEMEFF_DEVICE A reference_of(A max) {
  return max == A(-INFINITY) ? A(0) : max;
}

// Entropy, smooth and argmax take registers; kernels that rarely need them compile a second variant
// without (kFull false), in which these members stay what they are.
template <class A, bool kFull>
struct SoftmaxState {
  A max = A(-INFINITY);
  A sum = A(0);      // sum exp(z - max)
  A entropy = A(0);  // sum exp(z - max) (z - max)
  A smooth = A(0);   // sum w z
  int32_t argmax =
      0;  // of the vocabulary; set to the first class of the range before anything else

  // Takes the sums relative to a maximum that is at least as large.
  MEMEFF_DEVICE void raise(A new_max) {
    const A shift = max - reference_of(new_max);  // -inf when there was nothing but -inf
    const A factor = exponential(shift);
    // Where the factor is 0, shift * sum may be infinite: a mask need not be -inf to be that large.
    if (kFull) entropy = factor > A(0) ? factor * (entropy + shift * sum) : A(0);
    sum *= factor;
    max = new_max;
  }

  // Takes in a logit that is not larger than max.
  MEMEFF_DEVICE void add(A z) {
    const A shifted = z - reference_of(max);
    const A e = exponential(shifted);
    sum += e;
    if (kFull && z != A(-INFINITY)) entropy += e * shifted;  // x exp x tends to 0 as x to -inf
  }

  MEMEFF_DEVICE void merge(SoftmaxState other) {
    // Equal maxima: the first class wins, whatever the order of merging.
    if (kFull && (other.max > max || (other.max == max && other.argmax < argmax)))
      argmax = other.argmax;
    const A new_max = larger(max, other.max);
    raise(new_max);
    other.raise(new_max);
    sum += other.sum;
    if (!kFull) return;
    entropy += other.entropy;
    smooth += other.smooth;
  }

  // Writes what is wanted as the statistics of range `range`.
  MEMEFF_DEVICE void write(const PartialStatistics& to, int64_t range, int64_t token) const {
    static_cast<A*>(to.max)[range * to.max_stride + token] = max;
    const int64_t at = range * to.stride + token;
    static_cast<A*>(to.sum)[at] = sum;
    if (!kFull) return;
    if (to.entropy != nullptr) static_cast<A*>(to.entropy)[at] = entropy;
    if (to.smooth != nullptr) static_cast<A*>(to.smooth)[at] = smooth;
    if (to.argmax != nullptr) to.argmax[at] = argmax;
  }
};

// Whether kFull states are needed.
inline bool wants_full(const PartialStatistics& partials) {
  return partials.entropy != nullptr || partials.smooth != nullptr || partials.argmax != nullptr;
}

}  // namespace memeff::cuda
