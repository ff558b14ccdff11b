// The operators as one source: compilers take longer to read torch's headers than to compile a file of
// this folder. The emulated build (tests/kernels/torch_backend) has it, too.
#include "bindings/arguments.cpp"
#include "bindings/autograd.cpp"
#include "bindings/call.cpp"
#include "bindings/ops.cpp"
#include "bindings/statistics_call.cpp"
#include "bindings/vocab_parallel.cpp"
