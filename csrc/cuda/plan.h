// Decides how a call runs on a GPU, before anything is allocated: plain C++, tested without a GPU. The
// plans are those of core/plan.h; sizes differ, because a GPU wants large products and hides nothing in a
// thread's cache:
//
//   scores, statistics    token_block tokens at a time, so that partial statistics stay small
//   grad_input            of kept scores: input_block tokens, all classes in one product
//   grad_weight           weight_block tokens, slice_vocab classes
#pragma once

#include <cstdint>
#include <string>

#include "core/plan.h"
#include "core/problem.h"
#include "cuda/select.h"

namespace memeff::cuda {

struct GpuPlanRequest : PlanRequest {
  bool upcasts = false;  // the GPU does not multiply the dtype: operands are upcast by torch
  int64_t multiprocessors = 132;
};

/// What follows from the problem and its kernels.
struct PlanTraits {
  Selection kernels;
  // Scores are kept in 16 bits (StoredScores) rather than as products of type A.
  bool keeps_16_bits = false;
  int partials = 2;     // partial statistics of A: max, sum, ...
  bool argmax = false;  // and one of int32
  bool skips = false;   // products leave tiles out
  // Label smoothing is left out of the gradients of the logits and added to their products, so that
  // tiles can be skipped.
  bool smoothing_apart = false;
  // Numbers of a token that ranks exchange (core/rank_numbers.h), and whether they add up sums of
  // grad_input that are rounded to bf16.
  int64_t shared_numbers = 0;
  bool rounds_sums = false;
  // grad_weight's product reads a copy of hidden states without those of tokens that have no gradient:
  // where it cannot leave these out by itself.
  bool copies_input = false;
};
PlanTraits plan_traits(const Problem& problem, const PlanRequest& request,
                       const Selection& kernels);

/// A plan with what only GPUs have.
struct Plan : memeff::Plan {
  bool products_from_scores = false;  // kept scores go into the products of gradients as they are
  int64_t copied_tokens = 0;          // whose hidden states are copied at a time, if they are
  // Parts of grad_input's sums over classes that are computed at the same time, where the product of kept
  // scores has fewer tiles than the GPU multiprocessors; fp32, added up afterwards.
  int64_t input_parts = 1;
};

/// A plan with what it was made for: all that a backend must know.
struct CallPlan {
  GpuPlanRequest request;
  PlanTraits traits;
  Plan plan;
};

/// The plan of a call on that GPU, with kernels selected. Returns "", or why there is none.
std::string plan_call(const Problem& problem, const PlanRequest& request, const Gpu& gpu,
                      CallPlan* call);

/// make_plan for the problem of `call->request` on these kernels. Where cuBLAS would compute the
/// products of gradients, without anybody having asked for it or measured it under such a memory
/// budget, and the handwritten products are predicted to be faster (they need no fp32 sums in addition
/// to the gradients), it takes those.
std::string choose_plan(const Problem& problem, const Selection& kernels, CallPlan* call);

/// Returns an empty string and fills `plan`, or says why no plan fits and the minimum budget.
std::string make_plan(const GpuPlanRequest& request, const PlanTraits& traits, Plan* plan);

}  // namespace memeff::cuda
