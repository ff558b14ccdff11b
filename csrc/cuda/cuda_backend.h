// The driver's backend on a GPU: places everything in the workspace and launches kernels, in the
// stream's order. Nothing waits for the device.
//
// All N tokens take part; those without a target have coefficients of zero. What a kept score is
// depends on the problem and its kernels (PlanTraits::keeps_16_bits):
//
//   16 bits      exp(z - max) of a tile of classes, and the maxima (StoredScores)
//   else         the product u = x W^T in the accumulation type
//
// Both turn into gradients in place, 16-bit ones for 16-bit inputs. Float products shrink, as do those
// of generic kernels where scores are computed again: row v of the gradients then has twice the stride,
// and starts where the row of the tokens that were converted together started. Products that read scores
// take those of 16 bits as they are, which then stay scores.
#pragma once

#include <memory>

#include "core/plan.h"
#include "core/problem.h"
#include "cuda/plan.h"
#include "driver/backend.h"

namespace memeff::cuda {

struct CudaContext {
  const Problem* problem;
  const CallPlan* call;
  char* workspace;  // layout(...).total bytes on the device
  void* stream;
};

/// Throws std::runtime_error when a launch is not accepted.
std::unique_ptr<Backend> make_cuda_backend(const CudaContext& context);

}  // namespace memeff::cuda
