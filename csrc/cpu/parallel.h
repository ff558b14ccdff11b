// The one way in which CPU code uses threads. Two implementations, chosen at link time: torch's pool
// in the extension (threads_and_gemm_torch.cpp), std::thread in the torch-free build (tests/cpp).
#pragma once

#include <cstdint>
#include <functional>

namespace memeff {

int max_threads();

/// Calls body(begin, end, thread) on ranges of `grain` indices (the last may be shorter) that cover [0, n),
/// each taken by the next free thread; 0 <= thread < max_threads(). Threads that a busy machine slows
/// down then hold up the others less than with fixed shares. Bodies must not depend on the order.
void parallel_for(int64_t n, int64_t grain,
                  const std::function<void(int64_t begin, int64_t end, int thread)>& body);

}  // namespace memeff
