"""Build switches: environment variables in, compiler flags out.

MEMEFF_DEBUG=1    no optimisation, debug information, assertions
MEMEFF_WERROR=1   warnings are errors (CI)
MAX_JOBS=n        parallel compilations; default: processors, at most one per 2 GiB of free memory
CXX               compiler
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from buildtools.sources import warning_flags

# A translation unit that includes torch headers takes up to this much in g++ -O3.
_BYTES_PER_JOB = 2 << 30


@dataclass(frozen=True)
class BuildConfig:
    """The switches of one build."""

    debug: bool
    werror: bool
    jobs: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "BuildConfig":
        """Reads the variables listed at the top of this file.

        Raises:
            SystemExit: a variable has a value that means nothing.
        """
        jobs = environment.get("MAX_JOBS", "")
        if jobs and not (jobs.isdigit() and int(jobs) > 0):
            raise SystemExit(f"memeff: MAX_JOBS={jobs!r}, expected a positive number")
        return cls(
            debug=_switch(environment, "MEMEFF_DEBUG"),
            werror=_switch(environment, "MEMEFF_WERROR"),
            jobs=int(jobs) if jobs else _default_jobs(),
        )

    @property
    def cxx_flags(self) -> list[str]:
        """Flags of every C++ file, with and without torch headers. -std is not among them."""
        # Flags of Python's own build come first (-g, -O2, -DNDEBUG): the last one of a kind counts.
        mode = ["-O0", "-g", "-UNDEBUG"] if self.debug else ["-O3", "-g0", "-DNDEBUG"]
        warnings = [*warning_flags(), *(["-Werror"] if self.werror else [])]
        return [*mode, *warnings, "-fvisibility=hidden"]


def _switch(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"memeff: {name}={value!r}, expected 0 or 1")
    return value == "1"


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
