// What of a plan takes memory and work: shared by its layout (layout.cpp), the search
// (plan.cpp) and its cost (plan_cost.cpp).
#pragma once

#include "core/dtype.h"
#include "cuda/plan.h"

namespace memeff::cuda {

constexpr int64_t kGenericRange = 512;  // classes per partial statistics of stored products

inline int64_t accumulation_size(const PlanRequest& r) {
  return size_of(accumulation_dtype(r.dtype));
}

/// Bytes of one kept score.
int64_t kept_score_bytes(const PlanRequest& request, const PlanTraits& traits);

/// Whether a product may write a gradient by itself, without fp32 sums in between.
bool writes_gradients(const PlanTraits& traits);
/// The same of grad_input, whose sums must leave this rank where others have a part of the vocabulary.
bool writes_input(const PlanRequest& request, const PlanTraits& traits);

/// Tokens whose scores are kept: at a time under token chunks, in all under vocab slices.
int64_t kept_tokens(const PlanRequest& request, const Plan& plan);
/// Tokens under vocab slices whose gradients are computed from scores made again.
int64_t fresh_tokens(const PlanRequest& request, const Plan& plan);

/// Rows of grad_input that are summed in the workspace; those of them that are while scores are kept.
int64_t summed_tokens(const PlanRequest& request, const PlanTraits& traits, const Plan& plan);
int64_t summed_while_kept(const PlanRequest& request, const PlanTraits& traits, const Plan& plan);

/// Rows of the parts of grad_input's sums (Plan::input_parts); 0: there is one.
int64_t rows_of_parts(const PlanRequest& request, const Plan& plan);

/// Whether products write grad_weight by themselves, slice by slice: one product the whole slice, or
/// several that add up in its own memory. No other sums are needed then.
bool products_write_weight(const PlanRequest& request, const PlanTraits& traits, const Plan& plan);

}  // namespace memeff::cuda
