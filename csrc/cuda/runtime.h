// The few things that host code asks of the CUDA runtime, so that it needs no CUDA headers.
#pragma once

#include <cstdint>

#include "cuda/select.h"
#include "cuda/status.h"

namespace memeff::cuda {

/// The current device. A capability of 0: there is none, or it does not answer.
const Gpu& current_gpu();

Status fill_zeros(void* data, int64_t bytes, void* stream);

}  // namespace memeff::cuda
