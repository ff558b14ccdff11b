"""Builds the CUDA kernels for the emulator as a Python extension of torch operators.

    python tests/emulator/python/build.py

Kernels and emulator come from tests/emulator/CMakeLists.txt; here the code above them (backend,
driver, operators) is compiled against torch and linked to them. tests/conftest.py loads the result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "emulator-python"  # of the extension
NAME = "_memeff_emulated"
LIBRARIES = ("memeff_cuda_emulated", "memeff_emulator")
SOURCES = (
    "tests/emulator/python/emulated_device.cpp",
    "csrc/bindings/call.cpp",
    "csrc/bindings/statistics_call.cpp",
    "csrc/core/planner.cpp",
    "csrc/cuda/call_memory.cpp",
    "csrc/cuda/cuda_backend.cpp",
    "csrc/cuda/gemm_torch.cpp",
    "csrc/cuda/layout.cpp",
    "csrc/cuda/plan.cpp",
    "csrc/cuda/select.cpp",
    "csrc/driver/driver.cpp",
)


def cuda_include() -> Path | None:
    """The folder with the headers of a CUDA toolkit, which the kernels need."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


def missing() -> str | None:
    """What keeps the emulated kernels from being built here, or None."""
    if cuda_include() is None:
        return "no headers of a CUDA toolkit (set CUDA_HOME)"
    for tool in ("cmake", "make", "ninja"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    return None


def compile_kernels() -> Path:
    """The static libraries of kernels and emulator, shared with `make emulate`; their folder."""
    folder = ROOT / "build" / "emulator"
    configure = ["cmake", "-S", ROOT / "tests/emulator", "-B", folder]
    if "CXX" not in os.environ and not (folder / "CMakeCache.txt").exists():
        checks_most = shutil.which("clang++-19") or shutil.which("clang++")
        configure += [f"-DCMAKE_CXX_COMPILER={checks_most}"] if checks_most else []
    subprocess.run(configure, check=True)
    build = ["cmake", "--build", folder, "--parallel", "2", "--target"]
    subprocess.run([*build, *LIBRARIES], check=True)
    return folder


def forget_older_module(kernels: Path) -> None:
    """Removes the linked module where kernels have changed since: cpp_extension tells ninja about
    sources and flags, not about libraries, and would leave it as it is."""
    module = FOLDER / f"{NAME}.so"
    changed = max((kernels / f"lib{library}.a").stat().st_mtime_ns for library in LIBRARIES)
    if module.exists() and module.stat().st_mtime_ns < changed:
        module.unlink()


def load(verbose: bool = False) -> ModuleType:
    """Builds what is out of date, registers the operators and returns the module."""
    from torch.utils import cpp_extension

    kernels = compile_kernels()
    FOLDER.mkdir(parents=True, exist_ok=True)
    forget_older_module(kernels)
    module: ModuleType = cpp_extension.load(
        NAME,
        [str(ROOT / source) for source in SOURCES],
        extra_cflags=[
            "-O2",
            "-fvisibility=hidden",
            "-DMEMEFF_GEMM_DEVICE=at::kCPU",
            f"-isystem{cuda_include()}",
        ],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests")],
        extra_ldflags=[f"-L{kernels}", *(f"-l{library}" for library in LIBRARIES), "-ldl"],
        build_directory=str(FOLDER),
        verbose=verbose,
    )
    return module


if __name__ == "__main__":
    load(verbose=True)
