#include "cuda/sm90/kernels.h"

namespace memeff::cuda::sm90 {

FusedKernels fused_kernels(int cluster) {
  if (cluster == 2)
    return {&linear_statistics<2>, &linear_gradient<2>, &grad_input_product<2>,
            &grad_weight_product<2>};
  return {&linear_statistics<1>,
          &linear_gradient<1>,
          &grad_input_product<1>,
          &grad_weight_product<1>,
          &grad_input_from_scores,
          &grad_weight_from_scores,
          &accepts};
}

}  // namespace memeff::cuda::sm90
