"""Builds the CUDA kernels for the emulator as a Python extension of torch operators.

    python tests/kernels/torch_backend/build.py

Kernels and emulator come from tests/kernels/CMakeLists.txt; here the code above them (backend,
driver, operators) is compiled against torch and linked to them. tests/emulated.py loads the result.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "kernels-torch"  # of the extension
NAME = "_memeff_emulated"
SOURCES = (
    "tests/kernels/torch_backend/all_devices.cpp",
    "csrc/bindings/all_operators.cpp",
    "csrc/core/planning.cpp",
    "csrc/cuda/call_memory.cpp",
    "csrc/cuda/cuda_backend.cpp",
    "csrc/cuda/layout.cpp",
    "csrc/cuda/plan.cpp",
    "csrc/cuda/plan_cost.cpp",
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
    folder = ROOT / "build" / "kernels"
    configure = ["cmake", "-S", ROOT / "tests/kernels", "-B", folder]
    if "CXX" not in os.environ and not (folder / "CMakeCache.txt").exists():
        checks_most = shutil.which("clang++-19") or shutil.which("clang++")
        configure += [f"-DCMAKE_CXX_COMPILER={checks_most}"] if checks_most else []
    subprocess.run(configure, check=True)
    build = ["cmake", "--build", folder, "--parallel", "2", "--target"]
    subprocess.run([*build, "memeff_cuda_emulated", "memeff_emulator"], check=True)
    return folder


def load(verbose: bool = False) -> ModuleType:
    """Builds what is out of date, registers the operators and returns the module."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "one_process_at_a_time", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # torch's own lock outlives a build that was ended, and the next one would wait forever.
        (FOLDER / "lock").unlink(missing_ok=True)
        return _load(verbose)


def _load(verbose: bool) -> ModuleType:
    from torch.utils import cpp_extension

    kernels = compile_kernels()
    # The extension's own build does not know that it depends on the libraries.
    newest = max(library.stat().st_mtime for library in kernels.glob("*.a"))
    for extension in FOLDER.glob("*.so"):
        if extension.stat().st_mtime < newest:
            extension.unlink()
    module: ModuleType = cpp_extension.load(
        NAME,
        [str(ROOT / source) for source in SOURCES],
        extra_cflags=[
            "-O1",  # little runs in here but the emulated kernels
            "-fvisibility=hidden",
            "-DMEMEFF_GEMM_DEVICE=at::kCPU",
            f"-isystem{cuda_include()}",
        ],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests")],
        extra_ldflags=[f"-L{kernels}", "-lmemeff_cuda_emulated", "-lmemeff_emulator", "-ldl"],
        build_directory=str(FOLDER),
        verbose=verbose,
    )
    return module


if __name__ == "__main__":
    load(verbose=True)
