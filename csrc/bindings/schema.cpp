#include "bindings/schema.h"

#include "bindings/autograd.h"

TORCH_LIBRARY(memeff, m) { memeff::define_operators(m); }
TORCH_LIBRARY_IMPL(memeff, Autograd, m) { memeff::implement_autograd(m); }
