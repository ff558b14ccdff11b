// How often the ranks of a sharded vocabulary exchange something in a call, for memeff.plan.
#pragma once

#include <cstdint>

#include "core/plan.h"
#include "core/problem.h"

namespace memeff {

struct Collectives {
  int64_t all_gathers = 0;
  int64_t all_reduces = 0;
};

/// Those of one operator, by the driver's own loops over a backend that computes nothing. `shared_numbers`:
/// how many each rank gives for a token. Class weights take one all-gather more.
Collectives count_collectives(const Problem& problem, const PlanRequest& request, const Plan& plan,
                              int64_t shared_numbers);

}  // namespace memeff
