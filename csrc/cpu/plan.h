// Decides how a call runs on the CPU (core/plan.h).
#pragma once

#include <cstdint>
#include <string>

#include "core/plan.h"

namespace memeff {

struct CpuPlanRequest : PlanRequest {
  bool bf16_kernels = false;  // scores come from the fused bf16 kernels (16 bits each)
  bool blas = false;         // a BLAS computes the products; it packs operands in memory of its own
  bool fixed_order = false;  // scores come from ColumnKernels::multiply
  int partials = 2;          // per-tile partial sums: max, sum [, of logits] [, entropy, argmax]
  int64_t targets = 1;       // class indices per token
  int64_t shared_numbers = 0;  // of a token, which ranks exchange: see core/rank_numbers.h
  int threads = 1;
};

/// A plan with what it was made for: all that a backend must know.
struct CpuCallPlan {
  CpuPlanRequest request;
  Plan plan;
};

/// Upper bound of the memory in which a BLAS packs the operands of any plan's products.
int64_t library_bytes(const CpuPlanRequest& request);

/// Returns an empty string and fills `plan`, or says why no plan fits (and the minimum budget).
std::string make_plan(const CpuPlanRequest& request, Plan* plan);

}  // namespace memeff
