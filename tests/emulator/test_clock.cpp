// Clocks that share their vectors against plain vectors: the same random events, the same knowledge.
#include "emulator/clock.h"

#include <algorithm>
#include <cstdio>
#include <random>

#include "emulator/check.h"

using namespace memeff::emulator;

namespace {

constexpr int kThreads = 8, kOthers = 3, kBarriers = 3;
constexpr int kAgents = 2 * kThreads + kOthers;  // threads, their copies, and what is asynchronous

struct Plain {
  std::vector<std::uint32_t> seen, seen_async;

  Plain() : seen(kAgents), seen_async(kAgents) {}
  void join(const Plain& other) {
    for (int i = 0; i < kAgents; ++i) {
      seen[i] = std::max(seen[i], other.seen[i]);
      seen_async[i] = std::max(seen_async[i], other.seen_async[i]);
    }
  }
};

struct Both {
  Clock clock;
  Plain plain;

  void join(const Both& other) {
    clock.join(other.clock);
    plain.join(other.plain);
  }
  void adopt(const Both& other) {
    clock.adopt(other.clock);
    plain.join(other.plain);
  }
  bool agree() const {
    for (std::uint32_t i = 0; i < kAgents; ++i)
      if (clock.seen(i) != plain.seen[i] || clock.seen_async(i) != plain.seen_async[i])
        return false;
    return true;
  }
};

void test_events(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const SharedKnowledge nothing = nothing_known(kAgents);
  std::vector<Both> threads(kThreads), barriers(kBarriers);
  for (std::uint32_t i = 0; i < kThreads; ++i) {
    threads[i].clock = Clock(nothing, i, kThreads + i);
    threads[i].plain.seen[i] = 1;
  }
  for (Both& barrier : barriers) barrier.clock = Clock(nothing);

  std::uint32_t steps = 0;
  for (int event = 0; event < 400; ++event) {
    const int t = below(kThreads);
    Both& thread = threads[t];
    Both& barrier = barriers[below(kBarriers)];
    switch (below(6)) {
      case 0: {  // everybody meets at a new barrier
        Both all{Clock(nothing), {}};
        for (Both& one : threads) all.join(one);
        for (Both& one : threads) one.adopt(all);
        break;
      }
      case 1:  // arrives
        barrier.join(thread);
        thread.clock.release();
        ++thread.plain.seen[t];
        break;
      case 2:  // a warp leaves
        for (int i = t / 4 * 4; i < t / 4 * 4 + 4; ++i) threads[i].join(barrier);
        break;
      case 3:  // a warp waits for something asynchronous
        ++steps;
        for (int i = t / 4 * 4; i < t / 4 * 4 + 4; ++i) {
          const auto agent = static_cast<std::uint32_t>(2 * kThreads + t % kOthers);
          threads[i].clock.learn({agent, steps});
          threads[i].plain.seen[agent] = steps;
        }
        break;
      case 4: {  // a thread waits for its copies
        const auto copies = static_cast<std::uint32_t>(kThreads + t);
        thread.clock.learn({copies, ++steps});
        thread.plain.seen[copies] = steps;
        break;
      }
      case 5:
        thread.clock.fence();
        for (int i = 0; i < kAgents; ++i)
          thread.plain.seen_async[i] = std::max(thread.plain.seen_async[i], thread.plain.seen[i]);
        break;
    }
    for (const Both& one : threads) CHECK(one.agree());
    for (const Both& one : barriers) CHECK(one.agree());
  }
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 200; ++seed) test_events(seed);
  return finish("test_clock");
}
