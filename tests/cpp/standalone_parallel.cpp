// parallel_for over std::thread, for the torch-free build.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/math.h"
#include "cpu/parallel.h"
#include "standalone.h"

namespace memeff {
namespace {

int initial_threads() {
  const char* wanted = std::getenv("MEMEFF_TEST_THREADS");
  const int processors = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, wanted != nullptr ? std::atoi(wanted) : processors);
}

std::atomic<int>& thread_limit() {
  static std::atomic<int> limit{initial_threads()};
  return limit;
}

}  // namespace

void set_max_threads(int threads) { thread_limit() = threads; }

int max_threads() { return thread_limit(); }

void parallel_for(int64_t n, int64_t grain,
                  const std::function<void(int64_t begin, int64_t end, int thread)>& body) {
  const int64_t ranges = ceil_div(n, grain);
  const int workers = static_cast<int>(std::min<int64_t>(ranges, max_threads()));
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t range = next++; range < ranges; range = next++) {
      body(range * grain, std::min(n, (range + 1) * grain), thread);
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < workers; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace memeff
