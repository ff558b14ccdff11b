// What autograd does with the operators, on any device.
//
// The loss's forward operator has its gradients already where the loss is a scalar (not in fp16): backward
// scales them. Everywhere else backward is the second operator, which computes the scores again. These are kernels
// of the dispatcher's Autograd key, as torch's own operators have them: torch.func, torch.compile and export see
// nothing else. Second derivatives and tangents are an error.
#pragma once

#include <torch/library.h>

namespace memeff {

/// Registers them for the Autograd key of a library with `define_operators`.
void implement_autograd(torch::Library& m);

}  // namespace memeff
