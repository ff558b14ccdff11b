// Vector clocks: what has happened before now, as far as somebody knows.
//
// Everybody who leaves a barrier knows the same but for what they do next. The vectors are therefore
// shared and copied when written, a thread keeps its own steps apart from them, and the vector of what
// many threads learn one after the other is made once: a barrier of 256 threads takes the time of 256
// steps, not that of 256 vectors of 600 agents.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace memeff::emulator {

// Step `clock` of agent `agent`. Agents are the threads of the cluster's blocks and everything
// asynchronous that these started.
struct Step {
  std::uint32_t agent = 0, clock = 0;
};

// Per agent, its last step that happened before now; the same for the asynchronous proxy, which
// fences advance.
struct Knowledge {
  std::vector<std::uint32_t> seen, seen_async;
};
using SharedKnowledge = std::shared_ptr<Knowledge>;

SharedKnowledge nothing_known(int agents);

class Clock {
 public:
  Clock() = default;
  explicit Clock(SharedKnowledge known) : known_(std::move(known)) {}
  // The clock of a thread, whose steps and copies are agents.
  Clock(SharedKnowledge known, std::uint32_t thread, std::uint32_t copies)
      : known_(std::move(known)), own_{{thread, 1, 0}, {copies, 0, 0}} {}

  std::uint32_t seen(std::uint32_t agent) const {
    for (const Own& own : own_)
      if (own.agent == agent) return own.seen;
    return known_->seen[agent];
  }
  std::uint32_t seen_async(std::uint32_t agent) const {
    for (const Own& own : own_)
      if (own.agent == agent) return own.seen_async;
    return known_->seen_async[agent];
  }

  Step step() const { return {own_[0].agent, own_[0].seen}; }
  // After a release (barrier arrival, fence) later steps of the thread are new ones.
  void release() { ++own_[0].seen; }
  void learn(const Step& step);
  void join(const Clock& other);
  // The same for a clock that has joined this one: all who adopt it share its vectors.
  void adopt(const Clock& other);
  // All that is known becomes visible to the asynchronous proxy, too.
  void fence();

 private:
  static constexpr std::uint32_t kNobody = ~0u;
  // What the owner alone advances; `known_` may say less about it.
  struct Own {
    std::uint32_t agent = kNobody, seen = 0, seen_async = 0;
  };

  template <class Change>
  void change(const SharedKnowledge& other, const Step& learned, Change change);
  void join_own(const Clock& other);

  SharedKnowledge known_;
  SharedKnowledge joined_;  // the last that was joined: `known_` includes it
  Own own_[2];
};

}  // namespace memeff::emulator
