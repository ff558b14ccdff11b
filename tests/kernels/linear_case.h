// Inputs of the kernels for products of 16-bit matrices, and what double precision makes of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/fused_kernels.h"
#include "emulator/check.h"

namespace memeff::cuda {

using emulator::BufferAccess;
using emulator::GlobalBuffer;

inline double to_double(float x) { return x; }
inline double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double to_double(__half x) { return __half2float(x); }

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
}
// Half a unit in the last place, relative.
template <class T>
constexpr double rounding() {
  return std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
}
constexpr double kSmallestHalf = 0x1p-24;  // absolute rounding of small fp16 numbers

// A matrix of T that ends with its last row's last element: what lies beyond is out of bounds, what
// lies between rows is not a number. `offset` elements precede it (an odd number: unaligned).
template <class T>
class GuardedMatrix {
 public:
  GuardedMatrix(const char* name, int64_t rows, int64_t columns, int64_t padding, int64_t offset,
                BufferAccess access)
      : rows(rows),
        columns(columns),
        stride(columns + padding),
        offset_(offset),
        data_(static_cast<std::size_t>(offset + rows * stride), T(NAN)),
        guard_(data(), static_cast<std::size_t>(rows * stride - padding) * sizeof(T), name, access,
               static_cast<int>(sizeof(T))) {}
  T* data() { return data_.data() + offset_; }
  T& at(int64_t row, int64_t column) { return data()[row * stride + column]; }

  // Whether everything between rows is still what it was.
  bool padding_is_untouched() {
    for (int64_t row = 0; row + 1 < rows; ++row)
      for (int64_t column = columns; column < stride; ++column)
        if (!std::isnan(to_double(at(row, column)))) return false;
    return true;
  }

  const int64_t rows, columns, stride;

 private:
  int64_t offset_;
  std::vector<T> data_;
  GlobalBuffer guard_;
};

template <class T>
class GuardedArray {
 public:
  GuardedArray(const char* name, int64_t size, BufferAccess access = BufferAccess::kReadOnly)
      : data_(static_cast<std::size_t>(size)),
        guard_(data_.data(), data_.size() * sizeof(T), name, access,
               static_cast<int>(sizeof(T) < 8 ? sizeof(T) : 8)) {}
  T* data() { return data_.data(); }
  T& operator[](int64_t i) { return data_[static_cast<std::size_t>(i)]; }
  typename std::vector<T>::iterator begin() { return data_.begin(); }
  typename std::vector<T>::iterator end() { return data_.end(); }

 private:
  std::vector<T> data_;
  GlobalBuffer guard_;
};

struct LinearShape {
  int64_t tokens, features, classes;
  int64_t first_class = 0;
  int64_t padding = 0, offset = 0;  // of x and W, in elements
  bool bias = false, class_weight = false;
  double logit_scale = 1.0, softcap = 0.0;
};

// A block of logits z [tokens, classes] of random x and W.
template <class T>
struct LinearCase {
  explicit LinearCase(const LinearShape& shape, unsigned seed)
      : shape(shape),
        random(seed),
        x("x", shape.tokens, shape.features, shape.padding, shape.offset, BufferAccess::kReadOnly),
        w("w", shape.classes, shape.features, shape.padding, shape.offset, BufferAccess::kReadOnly),
        bias("bias", shape.first_class + shape.classes),
        weight("class weights", shape.first_class + shape.classes),
        target("target", shape.tokens) {
    for (int64_t n = 0; n < shape.tokens; ++n)
      for (int64_t k = 0; k < shape.features; ++k) x.at(n, k) = T(normal());
    for (int64_t v = 0; v < shape.classes; ++v)
      for (int64_t k = 0; k < shape.features; ++k) w.at(v, k) = T(0.3f * normal());
    for (float& value : bias) value = normal();
    for (float& value : weight) value = std::abs(normal());
    // Tokens without a target, with one elsewhere, and with one in the block.
    for (int64_t n = 0; n < shape.tokens; ++n)
      target[n] = n % 7 == 3   ? -1
                  : n % 7 == 5 ? shape.first_class - 1
                  : n % 7 == 6 ? shape.first_class + shape.classes
                               : shape.first_class + static_cast<int64_t>(random() % shape.classes);
    target[0] = shape.first_class + shape.classes - 1;
  }

  float normal() { return std::normal_distribution<float>()(random); }

  Block block() const { return {shape.first_class, shape.classes, shape.tokens}; }
  LinearOperands operands() {
    return {x.data(), x.stride, w.data(), w.stride, shape.features, dtype_of<T>()};
  }
  LogitTerms terms() {
    return {shape.bias ? bias.data() : nullptr, shape.class_weight ? weight.data() : nullptr,
            shape.logit_scale, shape.softcap};
  }
  Targets targets() {
    Targets result;
    result.index = target.data();
    return result;
  }

  void compute_logits() {
    z.resize(static_cast<std::size_t>(shape.tokens * shape.classes));
    for (int64_t n = 0; n < shape.tokens; ++n)
      for (int64_t v = 0; v < shape.classes; ++v) {
        double u = 0;
        for (int64_t k = 0; k < shape.features; ++k)
          u += to_double(x.at(n, k)) * to_double(w.at(v, k));
        if (shape.bias) u += bias[shape.first_class + v];
        u *= shape.logit_scale;
        z[static_cast<std::size_t>(n * shape.classes + v)] =
            shape.softcap == 0 ? u : shape.softcap * std::tanh(u / shape.softcap);
      }
  }
  double logit(int64_t token, int64_t c) const {
    return z[static_cast<std::size_t>(token * shape.classes + c)];
  }
  double class_weight(int64_t c) {
    return shape.class_weight ? weight[shape.first_class + c] : 1.0;
  }
  // In the block, or -1.
  int64_t target_of(int64_t token) {
    const int64_t c = target[token] - shape.first_class;
    return target[token] < 0 || c < 0 || c >= shape.classes ? -1 : c;
  }

  LinearShape shape;
  std::mt19937 random;
  GuardedMatrix<T> x, w;
  GuardedArray<float> bias, weight;
  GuardedArray<int64_t> target;
  std::vector<double> z;
};

// Runs `body` under late and early delivery and three schedules; any report is a failure.
inline void for_clean_schedules(const char* what, const std::function<void()>& body) {
  emulator::config().printed_reports = 0;
  for (int variant = 0; variant < 6; ++variant) {
    emulator::config().late_delivery = variant % 2 == 0;
    emulator::config().schedule = static_cast<emulator::Schedule>(variant / 2);
    emulator::config().seed = static_cast<std::uint64_t>(variant + 1);
    emulator::clear_reports();
    const int failed_before = emulator::failed_checks;
    body();
    if (!emulator::reports().empty()) {
      ++emulator::failed_checks;
      std::printf("FAILED %s: reports\n", what);
      emulator::print_reports();
    }
    if (emulator::failed_checks != failed_before)
      std::printf("  (%s, schedule %d, %s delivery)\n", what, variant / 2,
                  emulator::config().late_delivery ? "late" : "early");
  }
  emulator::config() = emulator::Config{};
  emulator::config().printed_reports = 0;
  emulator::clear_reports();
}

}  // namespace memeff::cuda
