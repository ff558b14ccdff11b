// Assertions of the emulator's tests: values, and which defects a launch reported.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "emulator/emulator.h"

namespace memeff::emulator {

inline int failed_checks = 0;

inline void check(bool condition, const char* expression, const char* file, int line) {
  if (condition) return;
  ++failed_checks;
  std::printf("FAILED %s:%d: %s\n", file, line, expression);
}
#define CHECK(expression) \
  ::memeff::emulator::check(static_cast<bool>(expression), #expression, __FILE__, __LINE__)

inline void print_reports() {
  constexpr std::size_t kShown = 3;
  for (std::size_t i = 0; i < reports().size() && i < kShown; ++i) {
    const Report& report = reports()[i];
    std::printf("    %s: %s at %s:%d\n", name_of(report.defect), report.message.c_str(),
                report.file.c_str(), report.line);
  }
}

// Runs `body` under both delivery policies and six schedules, then restores the defaults.
inline void for_every_schedule(const std::function<void(const char*)>& body) {
  for (int variant = 0; variant < 12; ++variant) {
    const int schedule = variant / 2;
    config().late_delivery = variant % 2 == 0;
    config().schedule = schedule == 0   ? Schedule::kInOrder
                        : schedule == 1 ? Schedule::kReversed
                                        : Schedule::kRandom;
    config().seed = static_cast<std::uint64_t>(schedule);
    char name[64];
    std::snprintf(name, sizeof name, "schedule %d, %s delivery", schedule,
                  config().late_delivery ? "late" : "early");
    clear_reports();
    body(name);
    clear_reports();
  }
  config() = Config{};
  config().printed_reports = 0;
}

inline void expect_clean(const char* what, const std::function<void()>& run) {
  for_every_schedule([&](const char* variant) {
    run();
    if (reports().empty()) return;
    ++failed_checks;
    std::printf("FAILED %s: expected no report (%s)\n", what, variant);
    print_reports();
  });
}

// The line of `file` that ends in "// planted: <marker>", or 0.
inline int planted_line(const char* file, const char* marker) {
  const std::string wanted = std::string("// planted: ") + marker;
  std::FILE* source = std::fopen(file, "r");
  if (source == nullptr) return 0;
  char text[512];
  int line = 0, found = 0;
  while (found == 0 && std::fgets(text, sizeof text, source) != nullptr) {
    ++line;
    const std::string content(text);
    const std::size_t at = content.find(wanted);
    if (at != std::string::npos &&
        content.find_first_not_of(" \n", at + wanted.size()) == std::string::npos)
      found = line;
  }
  std::fclose(source);
  return found;
}

// `run` must report `defect` at the line of `file` marked with `marker` (anywhere when null),
// whatever the schedule. Other reports may accompany it: a value read too early is a race with its
// writer or not initialised, depending on who comes first.
inline void expect_defect_at(const char* what, Defect defect, const char* file, const char* marker,
                             const std::function<void()>& run) {
  const int line = marker == nullptr ? 0 : planted_line(file, marker);
  bool failed = marker != nullptr && line == 0;
  for_every_schedule([&](const char* variant) {
    run();
    for (const Report& report : reports())
      if (report.defect == defect &&
          (marker == nullptr || (report.line == line && report.file == file)))
        return;
    if (failed) return;  // one schedule's reports suffice to see why
    failed = true;
    std::printf("FAILED %s: expected '%s' at line %d (%s), got%s\n", what, name_of(defect), line,
                variant, reports().empty() ? " nothing" : "");
    print_reports();
  });
  failed_checks += failed ? 1 : 0;
}

// `run` must be reported somehow: which defect it shows as depends on the schedule.
inline void expect_reports(const char* what, const std::function<void()>& run) {
  for_every_schedule([&](const char* variant) {
    run();
    if (!reports().empty()) return;
    ++failed_checks;
    std::printf("FAILED %s: expected a report (%s)\n", what, variant);
  });
}

#define EXPECT_DEFECT(what, defect, marker, ...)                                                   \
  ::memeff::emulator::expect_defect_at(what, ::memeff::emulator::Defect::defect, __FILE__, marker, \
                                       __VA_ARGS__)

inline int finish(const char* test) {
  std::printf("%s: %s\n", test, failed_checks == 0 ? "passed" : "FAILED");
  return failed_checks == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace memeff::emulator
