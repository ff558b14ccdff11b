// Inputs of the sm_90a kernels, which TMA reads and writes, and what double precision makes of them;
// the families under test, without and with clusters.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "core/math.h"
#include "cuda/sm90/kernels.h"
#include "emulator/check.h"
#include "kernels/linear_case.h"

namespace memeff::cuda::sm90_test {

// Where rows of a Matrix end: with their last element, or, where TMA stores them, with its 16 bytes.
enum class RowEnd { kElement, kPiece };

// A registered matrix whose rows are `stride` apart; outputs start as NaN. Beyond the last row's end
// nothing may be touched, and padding between rows must keep its value.
template <class T>
struct Matrix {
  int64_t rows, columns, stride, end;  // of what may be written of a row
  T* data;
  static constexpr int kAlignment = 16;

  Matrix(int64_t rows, int64_t columns, int64_t padding = 0,
         BufferAccess access = BufferAccess::kReadWrite, RowEnd row_end = RowEnd::kElement)
      : rows(rows),
        columns(columns),
        stride(columns + padding),
        end(row_end == RowEnd::kElement ? columns : round_up(columns, 16 / int64_t{sizeof(T)})),
        storage_(bytes() + kAlignment) {
    const auto base = reinterpret_cast<uintptr_t>(storage_.data());
    data = reinterpret_cast<T*>((base + kAlignment - 1) / kAlignment * kAlignment);
    std::memset(static_cast<void*>(data), 0xff, bytes());
    guard_.reset(new GlobalBuffer(data, bytes(), "matrix", access, sizeof(T) == 1 ? 1 : 2));
  }
  T& at(int64_t row, int64_t column) { return data[row * stride + column]; }
  bool padding_is_intact() const {
    for (int64_t row = 0; row + 1 < rows; ++row)
      for (int64_t i = row * stride + end; i < (row + 1) * stride; ++i)
        for (size_t byte = 0; byte < sizeof(T); ++byte)
          if (reinterpret_cast<const unsigned char*>(data + i)[byte] != 0xff) return false;
    return true;
  }

 private:
  size_t bytes() const { return ((rows - 1) * stride + end) * sizeof(T); }
  std::vector<unsigned char> storage_;
  std::unique_ptr<GlobalBuffer> guard_;
};

inline constexpr auto kInput = BufferAccess::kReadOnly;

// The kernels under test: without and with clusters.
struct Family {
  const char* name;
  FusedKernels kernels;
};
inline const Family kFamilies[] = {{"sm90", sm90::fused_kernels(1)},
                                   {"sm90x2", sm90::fused_kernels(2)}};
inline Family family;  // under test

// ---- x W^T ----

struct Case {
  int64_t tokens, features, classes;
  int64_t padding = 0;  // between rows of everything 16-bit, in elements
  int64_t first_class = 0;
  bool options = false;  // bias, class weights, scale, cap
  bool full = false;     // all statistics
  bool store = false;
  bool infinities = false;  // -inf, NaN and the lowest float among the logits
};

template <class T>
struct Linear {
  Case c;
  Matrix<T> x, w;
  Matrix<float> bias, weight;
  Matrix<int64_t> target;
  std::vector<std::vector<double>> z;  // [tokens][classes]

  explicit Linear(const Case& of)
      : c(of),
        x(c.tokens, c.features, c.padding, kInput),
        w(c.classes, c.features, c.padding, kInput),
        bias(1, c.first_class + c.classes, 0, kInput),
        weight(1, c.first_class + c.classes, 0, kInput),
        target(1, c.tokens, 0, kInput) {
    std::mt19937 random(29);
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < c.tokens; ++n)
      for (int64_t k = 0; k < c.features; ++k) x.at(n, k) = T(normal(random));
    for (int64_t v = 0; v < c.classes; ++v)
      for (int64_t k = 0; k < c.features; ++k) w.at(v, k) = T(normal(random) * 0.3f);
    for (int64_t v = 0; v < bias.columns; ++v) bias.at(0, v) = normal(random);
    for (int64_t v = 0; v < bias.columns; ++v) weight.at(0, v) = std::abs(normal(random));
    for (int64_t n = 0; n < c.tokens; ++n)
      target.at(0, n) = c.first_class + static_cast<int64_t>(random() % c.classes);
    if (c.tokens > 4) {
      target.at(0, 3) = -100;
      target.at(0, 4) = c.first_class + c.classes;  // in the next block
      target.at(0, 2) = c.first_class - 1;          // in the previous one, or none
    }
    if (c.infinities) {
      bias.at(0, c.first_class + 1) = -INFINITY;
      for (int64_t v = 128; v < 256 && v < c.classes; ++v)
        bias.at(0, c.first_class + v) = -INFINITY;
      // Masked the other way, before classes that are not.
      for (int64_t v = 256; v < 384 && v < c.classes; ++v)
        bias.at(0, c.first_class + v) = -std::numeric_limits<float>::max();
      for (int64_t k = 0; k < c.features; ++k) x.at(c.tokens - 1, k) = T(NAN);
    }
    z.assign(c.tokens, std::vector<double>(c.classes));
    for (int64_t n = 0; n < c.tokens; ++n)
      for (int64_t v = 0; v < c.classes; ++v) {
        double u = 0;
        for (int64_t k = 0; k < c.features; ++k) u += to_double(x.at(n, k)) * to_double(w.at(v, k));
        if (c.options || c.infinities) u += bias.at(0, c.first_class + v);
        z[n][v] = c.options ? 9.0 * std::tanh(0.7 * u / 9.0) : u;
      }
  }
  Block block() const { return {c.first_class, c.classes, c.tokens}; }
  LinearOperands operands() {
    return {x.data, x.stride, w.data, w.stride, c.features, dtype_of<T>()};
  }
  LogitTerms terms() {
    LogitTerms terms;
    if (c.options || c.infinities) terms.bias = bias.data;
    if (!c.options) return terms;
    terms.class_weight = weight.data;
    terms.logit_scale = 0.7;
    terms.softcap = 9.0;
    return terms;
  }
  Targets targets() {
    Targets targets;
    targets.index = target.data;
    return targets;
  }
  // Counted from the block's first class; -1: outside.
  int64_t target_of(int64_t n) {
    const int64_t v = target.at(0, n) - c.first_class;
    return target.at(0, n) >= 0 && v >= 0 && v < c.classes ? v : -1;
  }
};

// Runs `body` under every delivery policy and schedule; `thorough` once for each policy.
inline void run_checked(const char* what, const std::function<void(bool thorough)>& body) {
  emulator::for_every_schedule([&](const char* variant) {
    body(emulator::config().schedule == emulator::Schedule::kInOrder);
    if (emulator::reports().empty()) return;
    ++emulator::failed_checks;
    std::printf("FAILED %s of %s: reports under %s\n", what, family.name, variant);
    emulator::print_reports();
  });
}

// Runs `tests` for each family.
inline void for_each_family(const std::function<void()>& tests) {
  emulator::config().printed_reports = 0;
  for (const Family& one : kFamilies) {
    family = one;
    tests();
    CHECK(emulator::reports().empty());
  }
}

}  // namespace memeff::cuda::sm90_test
