// Memory and numbers for tests.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace memeff::test {

/// Exactly `bytes` bytes, on a cache line, between two guard zones. Everything is filled with 0xff at
/// first, a NaN in every floating type: what is read too early or from beyond spoils the result, and
/// what is written beyond is found by intact().
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)), memory_(bytes_ + 3 * kGuard, kPoison) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    begin_ = kGuard + (kGuard - address % kGuard) % kGuard;
  }

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(memory_.data() + begin_);
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(memory_.data() + begin_);
  }

  void poison() { std::memset(memory_.data(), kPoison, memory_.size()); }

  bool intact() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      const bool inside = i >= begin_ && i < begin_ + bytes_;
      if (!inside && memory_[i] != kPoison) return false;
    }
    return true;
  }

  bool operator==(const GuardedBuffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(as<char>(), other.as<char>(), bytes_) == 0;
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kPoison = 0xff;

  size_t bytes_;
  size_t begin_;
  std::vector<unsigned char> memory_;
};

/// Reproducible numbers on every platform (a linear congruential generator, upper bits).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) { bits(); }

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  double uniform(double low, double high) { return low + (high - low) * bits() / 4294967296.0; }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

}  // namespace memeff::test
