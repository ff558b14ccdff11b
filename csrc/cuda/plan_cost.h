// What a plan costs on a GPU, without running it.
#pragma once

#include "cuda/plan.h"

namespace memeff::cuda {

/// Of a product's result: a multiprocessor has one tile of this size in flight, or two of half of it.
constexpr int64_t kTileRows = 128, kTileColumns = 256;

/// The predicted time of a plan, as multiply-adds of products that fill the GPU: those of its own
/// products, of tiles that stay empty, and what passes in the time of its launches and memory traffic.
double predicted_cost(const GpuPlanRequest& request, const PlanTraits& traits, const Plan& plan);

}  // namespace memeff::cuda
