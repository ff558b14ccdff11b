#include "cuda/fused_kernels.h"

namespace memeff::cuda::sm90 {

FusedKernels fused_kernels(int cluster) {
  if (cluster == 2)
    return {&sm90x2::linear_statistics, &sm90x2::linear_gradient, &sm90x2::grad_input_product,
            &sm90x2::grad_weight_product};
  return {&linear_statistics,
          &linear_gradient,
          &grad_input_product,
          &grad_weight_product,
          &grad_input_from_scores,
          &grad_weight_from_scores,
          &accepts};
}

}  // namespace memeff::cuda::sm90
