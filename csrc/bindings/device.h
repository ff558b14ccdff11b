// What the operators need of the device that their tensors are on. One implementation per device:
// cpu_device.cpp, cuda_device.cpp, and the emulated GPU of tests/kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "core/planner.h"
#include "core/problem.h"

namespace memeff {

class Device {
 public:
  virtual ~Device() = default;

  /// Whether values of tensors may be looked at. On a GPU that would wait for the device.
  virtual bool values_are_at_hand() const = 0;

  /// As make_plan of core/planner.h, for this device's kernels. Completes the request by what depends
  /// on the device.
  virtual std::string make_plan(const Problem& problem, PlanRequest* request, Plan* plan) const = 0;
  /// Runs the problem by that plan, in a workspace of plan.workspace_bytes. `like` is a tensor on
  /// the device.
  virtual void run(const Problem& problem, const PlanRequest& request, const Plan& plan,
                   const at::Tensor& like) const = 0;

  /// to = from * scale, element by element; contiguous, of one dtype; may be the same tensor.
  /// `scale` has one element.
  virtual void scale(const at::Tensor& from, const at::Tensor& scale,
                     const at::Tensor& to) const = 0;
};

}  // namespace memeff
