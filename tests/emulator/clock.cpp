#include "emulator/clock.h"

#include <algorithm>

namespace memeff::emulator {

namespace {

void raise(std::vector<std::uint32_t>& clocks, const std::vector<std::uint32_t>& others) {
  std::uint32_t* const a = clocks.data();
  const std::uint32_t* const b = others.data();
  for (std::size_t i = 0; i < clocks.size(); ++i) a[i] = std::max(a[i], b[i]);
}

// What became of shared vectors lately. Vectors in here are alive, so equal pointers mean equal
// vectors.
struct Change {
  SharedKnowledge from, other;
  Step learned;
  SharedKnowledge result;
};
constexpr int kRemembered = 16;
Change remembered[kRemembered];
int oldest = 0;

}  // namespace

SharedKnowledge nothing_known(int agents) {
  const std::vector<std::uint32_t> none(agents, 0);
  return std::make_shared<Knowledge>(Knowledge{none, none});
}

// Applies `change` to `known_`. `other` and `learned` say what it does: the same to the same vector
// has the same result.
template <class ChangeVector>
void Clock::change(const SharedKnowledge& other, const Step& learned, ChangeVector change) {
  if (known_.use_count() == 1) return change(*known_);
  for (const Change& c : remembered)
    if (c.from == known_ && c.other == other && c.learned.agent == learned.agent &&
        c.learned.clock == learned.clock) {
      known_ = c.result;
      return;
    }
  auto result = std::make_shared<Knowledge>(*known_);
  change(*result);
  remembered[oldest] = {known_, other, learned, result};
  oldest = (oldest + 1) % kRemembered;
  known_ = std::move(result);
}

void Clock::learn(const Step& step) {
  for (Own& own : own_)
    if (own.agent == step.agent) {
      own.seen = std::max(own.seen, step.clock);
      return;
    }
  if (known_->seen[step.agent] >= step.clock) return;
  change(nullptr, step, [&](Knowledge& known) { known.seen[step.agent] = step.clock; });
}

void Clock::join_own(const Clock& other) {
  for (Own& own : own_) {
    if (own.agent == kNobody) continue;
    own.seen = std::max(own.seen, other.seen(own.agent));
    own.seen_async = std::max(own.seen_async, other.seen_async(own.agent));
  }
}

void Clock::adopt(const Clock& other) {
  join_own(other);
  known_ = other.known_;
}

void Clock::join(const Clock& other) {
  join_own(other);
  if (other.known_ != known_ && other.known_ != joined_) {
    change(other.known_, {kNobody, 0}, [&](Knowledge& known) {
      raise(known.seen, other.known_->seen);
      raise(known.seen_async, other.known_->seen_async);
    });
    joined_ = other.known_;
  }
  for (const Own& own : other.own_) {
    if (own.agent == kNobody ||
        (known_->seen[own.agent] >= own.seen && known_->seen_async[own.agent] >= own.seen_async))
      continue;
    if (known_.use_count() > 1) known_ = std::make_shared<Knowledge>(*known_);
    known_->seen[own.agent] = std::max(known_->seen[own.agent], own.seen);
    known_->seen_async[own.agent] = std::max(known_->seen_async[own.agent], own.seen_async);
  }
}

void Clock::fence() {
  for (Own& own : own_) own.seen_async = std::max(own.seen_async, own.seen);
  change(nullptr, {kNobody, 0}, [](Knowledge& known) { raise(known.seen_async, known.seen); });
}

}  // namespace memeff::emulator
