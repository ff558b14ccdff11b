// What a CPU backend works on.
#pragma once

#include "core/problem.h"
#include "cpu/layout.h"

namespace memeff {

struct CpuContext {
  const Problem* problem;
  const CpuPlanRequest* request;
  const Plan* plan;
  char* workspace;  // layout_workspace(request, plan).total bytes
};

}  // namespace memeff
