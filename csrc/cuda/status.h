// The result of a host function that launches kernels. Nothing here throws or exits.
#pragma once

namespace memeff {

struct Status {
  const char* message = nullptr;  // static text; null when all is well
  bool ok() const { return message == nullptr; }
};

}  // namespace memeff
