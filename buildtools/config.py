"""Build switches: environment variables in, compiler flags out.

MEMEFF_DEBUG=1    no optimisation, debug information, assertions
MEMEFF_WERROR=1   warnings are errors (CI); so are registers that a CUDA kernel spills
MAX_JOBS=n        parallel compilations; default: processors, at most one per 2 GiB of free memory
CXX               compiler

MEMEFF_CUDA=auto|0|1     CUDA kernels; auto (default): if torch has CUDA and there is an nvcc
MEMEFF_CUDA_ARCHS=...    GPUs to compile for, such as "90a" or "80;90", or "native" for those of
                         this machine; default: what sources.json says
MEMEFF_LINEINFO=1        source lines in the kernels, for profilers and compute-sanitizer
MEMEFF_NVCC_THREADS=n    architectures that one nvcc compiles at the same time; default 1
CUDA_HOME                toolkit; default: that of the nvcc on PATH, then /usr/local/cuda
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from buildtools.cuda_archs import Arch, parse_archs
from buildtools.cuda_toolkit import native_archs
from buildtools.sources import warning_flags

# A translation unit that includes torch headers takes up to this much in g++ -O3.
_BYTES_PER_JOB = 2 << 30


@dataclass(frozen=True)
class BuildConfig:
    """The switches of one build."""

    debug: bool
    werror: bool
    jobs: int
    cuda: bool | None  # None: auto
    cuda_archs: tuple[Arch, ...]  # empty: those of the table
    lineinfo: bool
    nvcc_threads: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "BuildConfig":
        """Reads the variables listed at the top of this file.

        Raises:
            SystemExit: a variable has a value that means nothing.
        """
        cuda = environment.get("MEMEFF_CUDA", "auto")
        if cuda not in ("", "auto", "0", "1"):
            raise SystemExit(f"memeff: MEMEFF_CUDA={cuda!r}, expected auto, 0 or 1")
        archs = environment.get("MEMEFF_CUDA_ARCHS", "")
        try:
            cuda_archs = parse_archs(native_archs() if archs == "native" else archs)
        except ValueError as error:
            raise SystemExit(f"memeff: MEMEFF_CUDA_ARCHS={archs!r}: {error}") from None
        return cls(
            debug=_switch(environment, "MEMEFF_DEBUG"),
            werror=_switch(environment, "MEMEFF_WERROR"),
            jobs=_number(environment, "MAX_JOBS") or _default_jobs(),
            cuda=cuda == "1" if cuda in ("0", "1") else None,
            cuda_archs=tuple(cuda_archs),
            lineinfo=_switch(environment, "MEMEFF_LINEINFO"),
            nvcc_threads=_number(environment, "MEMEFF_NVCC_THREADS") or 1,
        )

    @property
    def cxx_flags(self) -> list[str]:
        """Flags of every C++ file, with and without torch headers. -std is not among them."""
        # Flags of Python's own build come first (-g, -O2, -DNDEBUG): the last one of a kind counts.
        mode = ["-O0", "-g", "-UNDEBUG"] if self.debug else ["-O3", "-g0", "-DNDEBUG"]
        warnings = [*warning_flags(), *(["-Werror"] if self.werror else [])]
        return [*mode, *warnings, "-fvisibility=hidden"]

    def nvcc_command(self, nvcc: Path) -> list[str]:
        """nvcc under supervision (run_nvcc.sh), with the flags of every CUDA source."""
        supervisor = Path(__file__).with_name("run_nvcc.sh")
        mode = "error" if self.werror else "warn"
        return ["sh", str(supervisor), mode, str(nvcc), *self.nvcc_flags]

    @property
    def nvcc_flags(self) -> list[str]:
        """Flags of every CUDA source; the architectures are the source's own."""
        # The device code of a debug build stays optimised: -G would make other kernels of it.
        mode = ["-O3", "-UNDEBUG" if self.debug else "-DNDEBUG"]
        host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        return [
            "-std=c++17",
            *mode,
            *(["-lineinfo"] if self.lineinfo else []),
            f"--threads={self.nvcc_threads}",
            "-Xptxas=--warn-on-spills",
            *(["-Werror=all-warnings"] if self.werror else []),
            "-Xcompiler=" + ",".join([*host, *(["-Werror"] if self.werror else [])]),
        ]


def _switch(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"memeff: {name}={value!r}, expected 0 or 1")
    return value == "1"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    if value and not (value.isdigit() and int(value) > 0):
        raise SystemExit(f"memeff: {name}={value!r}, expected a positive number")
    return int(value) if value else None


def _default_jobs() -> int:
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    by_memory = _available_memory() // _BYTES_PER_JOB
    return max(1, min(processors or 1, by_memory))


def _available_memory() -> int:
    """Bytes that can be had without swapping; where Linux does not say, more than enough."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 40
