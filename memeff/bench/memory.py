"""Peak extra memory of a piece of code, measured.

CPU: the kernel's own high-water mark of the process's resident memory (VmHWM in /proc/self/status),
which writing "5" to /proc/self/clear_refs resets to the present value (proc(5), Linux >= 4.0). It
sees every page that was touched, whoever allocated it: torch, oneDNN's packing buffers, thread
stacks, Python. CUDA: torch's allocator counts, torch.cuda.max_memory_allocated.
"""

import ctypes
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no line {field}; expected a Linux kernel with /proc mounted")


def _return_free_memory() -> None:
    """Have glibc give freed pages back, or the code under test could live on them unseen."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # musl has none, and keeps little
        libc.malloc_trim(0)


class PeakMemory:
    """Context manager: `extra_bytes` after the block = peak during the block - use at its start.

    Use it once per process on the CPU, after a warm-up at a tiny size: a second block could reuse
    pages that the first one left in malloc's arenas, and a cold first call pays for the libraries'
    own start-up.
    """

    def __init__(self, device: str = "cpu"):
        self._device = torch.device(device)
        self._baseline = 0
        self.extra_bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._baseline = torch.cuda.memory_allocated(self._device)
        else:
            _return_free_memory()
            try:
                _CLEAR_REFS.write_text(_RESET_PEAK)
            except OSError as error:
                raise RuntimeError(
                    f"cannot measure peak memory: {_CLEAR_REFS} is not writable ({error})"
                ) from error
            self._baseline = resident_bytes("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = resident_bytes("VmHWM")
        self.extra_bytes = max(0, peak - self._baseline)
