// Control over what stands in for torch in the torch-free build.
#pragma once

namespace memeff {

/// Sets what max_threads() returns from now on. At first it is the environment variable
/// MEMEFF_TEST_THREADS, or else the number of processors.
void set_max_threads(int threads);

}  // namespace memeff
