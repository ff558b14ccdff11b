// Cases that end their process or fail, in place of the real ones: conformance_main.cpp must go on
// with the next and tell of each.
#include <cstdlib>

#include "emulator/conformance.h"

namespace memeff::conformance {

namespace {

Status passes(const Case&, const uint32_t*, uint32_t*) { return {}; }
Status fails(const Case&, const uint32_t*, uint32_t*) { return {"as planted"}; }
Status crashes(const Case&, const uint32_t*, uint32_t*) { std::abort(); }

Case planted(const char* name, Status (*run)(const Case&, const uint32_t*, uint32_t*)) {
  return {name, Input::kWords, Compare::kBits, 1, 0, nullptr, nullptr, run};
}

}  // namespace

std::vector<Case> emulated_cases_sm80() {
  return {planted("one", passes), planted("two", crashes), planted("three", fails)};
}
std::vector<Case> emulated_cases_sm90() { return {planted("four", crashes)}; }

}  // namespace memeff::conformance
