#include "bindings/schema.h"

TORCH_LIBRARY(memeff, m) { memeff::define_operators(m); }
