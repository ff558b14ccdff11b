// What a CPU backend works on.
#pragma once

#include "core/planner.h"
#include "core/problem.h"

namespace memeff {

struct CpuContext {
  const Problem* problem;
  const PlanRequest* request;
  const Plan* plan;
  char* workspace;  // layout_workspace(request, plan).total bytes
};

}  // namespace memeff
