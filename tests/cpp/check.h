// Checks that print where and with what values they fail, and are counted.
//
//   int main() { CHECK(x > 0); CHECK_EQ(f(1), 2); return memeff::test::result(); }
#pragma once

#include <cmath>
#include <iostream>
#include <sstream>
#include <string>

namespace memeff::test {

/// What ctest takes for "skipped" (SKIP_RETURN_CODE in CMakeLists.txt).
constexpr int kSkipped = 77;
constexpr int kMostPrinted = 20;

inline int& failure_count() {
  static int count = 0;
  return count;
}

/// What is being tested, printed with every failure.
inline std::string& context() {
  static std::string text;
  return text;
}

/// Joins anything printable: describe("N=", 3).
template <class... Parts>
std::string describe(const Parts&... parts) {
  std::ostringstream text;
  text.precision(17);
  (text << ... << parts);
  return text.str();
}

inline void fail(const char* file, int line, const std::string& message) {
  if (++failure_count() > kMostPrinted) return;
  std::cout << file << ":" << line << ": " << message;
  if (!context().empty()) std::cout << "   [" << context() << "]";
  std::cout << std::endl;
}

/// The exit status of the test program.
inline int result() {
  if (failure_count() > 0) std::cout << failure_count() << " checks failed" << std::endl;
  return failure_count() > 0 ? 1 : 0;
}

/// |actual - expected| <= tolerance; NaN only equals NaN.
inline bool near(double actual, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(actual);
  return actual == expected || std::abs(actual - expected) <= tolerance;
}

}  // namespace memeff::test

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) memeff::test::fail(__FILE__, __LINE__, "expected " #condition); \
  } while (false)

#define CHECK_EQ(actual, expected)                                                                 \
  do {                                                                                             \
    const auto actual_ = (actual);                                                                 \
    const decltype(actual_) expected_ = (expected);                                                \
    if (!(actual_ == expected_)) {                                                                 \
      memeff::test::fail(__FILE__, __LINE__,                                                       \
                         memeff::test::describe(#actual " is ", actual_, ", expected ", expected_, \
                                                " (" #expected ")"));                              \
    }                                                                                              \
  } while (false)

#define CHECK_NEAR(actual, expected, tolerance)                                                    \
  do {                                                                                             \
    const double actual_ = (actual), expected_ = (expected), tolerance_ = (tolerance);             \
    if (!memeff::test::near(actual_, expected_, tolerance_)) {                                     \
      memeff::test::fail(__FILE__, __LINE__,                                                       \
                         memeff::test::describe(#actual " is ", actual_, ", expected ", expected_, \
                                                " within ", tolerance_));                          \
    }                                                                                              \
  } while (false)
