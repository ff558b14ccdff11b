// The two plans, written once over the backend interface.
#pragma once

#include "core/plan.h"
#include "core/problem.h"
#include "driver/backend.h"

namespace memeff {

/// Runs the problem by the plan: loss and statistics, and the gradients that the problem has room for.
/// With lse known beforehand (the backward op), only gradients.
void run(const Problem& problem, const Plan& plan, bool statistics_known, Backend& backend);

}  // namespace memeff
