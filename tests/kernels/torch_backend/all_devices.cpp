// The devices of the emulated build as one source (see csrc/bindings/all_operators.cpp).
#include "cuda/gemm_torch.cpp"
#include "kernels/torch_backend/emulated_device.cpp"
#include "kernels/torch_backend/watched_device.cpp"
