// What the operators need of the device that their tensors are on. One implementation per device:
// cpu_device.cpp, cuda_device.cpp, and the emulated GPU of tests/kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "core/plan.h"
#include "core/problem.h"

namespace memeff {

/// What a plan depends on in addition to the call.
struct DeviceFacts {
  int threads = 0;
  std::string kernels;  // that compute the products, or what their choice depends on
};

class Device {
 public:
  virtual ~Device() = default;

  /// Whether values of tensors may be looked at. On a GPU that would wait for the device.
  virtual bool values_are_at_hand() const = 0;

  /// Returns "" and the plan, or why no plan fits and the sizes of the smallest.
  virtual std::string plan(const Problem& problem, const PlanRequest& request,
                           Plan* plan) const = 0;
  /// Plans the problem and runs it, in a workspace of its own; or returns why no plan fits. `like` is a
  /// tensor on the device.
  virtual std::string run(const Problem& problem, const PlanRequest& request,
                          const at::Tensor& like) const = 0;

  /// What ranks that share a vocabulary must have in common to plan alike.
  virtual DeviceFacts facts(const Problem& problem) const = 0;

  /// to = from * scale, element by element; contiguous, of one dtype; may be the same tensor.
  /// `scale` has one element.
  virtual void scale(const at::Tensor& from, const at::Tensor& scale,
                     const at::Tensor& to) const = 0;
};

}  // namespace memeff
