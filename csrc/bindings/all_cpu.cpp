// What the extension has in addition to the operators, as one source (see all_operators.cpp).
#include "bindings/cpu_device.cpp"
#include "bindings/module.cpp"
#include "bindings/schema.cpp"
#include "cpu/threads_and_gemm_torch.cpp"
