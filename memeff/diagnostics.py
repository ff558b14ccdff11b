"""What memeff found on this machine: ``python -m memeff.diagnostics``.

Prints the build, the versions of torch, the compilers, the processor and the devices; then what is
missing, each with the command that mends it. Exit status 0 when memeff can be used on every device
that torch can use, else 1.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    sys.exit("Missing\n  torch is not installed. Type:  pip install torch")

from memeff import _library, _tuned, planning

# Beyond what every x86-64 processor has; names as Linux prints them in /proc/cpuinfo.
_INSTRUCTION_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")

# The generic kernels' first architecture.
OLDEST_CAPABILITY = (7, 5)

Row = tuple[str, str]


def build_rows() -> list[Row]:
    """Version of memeff and what its extension says about itself."""
    try:
        version = metadata.version("memeff")
    except metadata.PackageNotFoundError:
        version = "not installed (running from the source folder)"
    rows = [("memeff", version), ("folder", str(Path(__file__).parent))]
    try:
        info = _library.load().build_info()
    except ImportError:
        file = _library.extension_file()
        state = f"{file.name} does not load" if file else "not built"
        return [
            *rows,
            ("extension", state),
            ("built with torch", _library.built_torch_version() or "-"),
        ]
    rows.append(("extension", str(_library.extension_file())))
    names = {
        "torch": "built with torch",
        "cpu_capability": "CPU kernels used",
        "cuda": "built with CUDA",
        "cuda_archs": "for GPUs",
        "cuda_measured": "choices measured on",
    }
    rows += [
        (names.get(name, name), "-" if value is None else value) for name, value in info.items()
    ]
    return [*rows, ("CUDA kernels", _cuda_state(info["cuda"]))]


def _cuda_state(built_with: str | None) -> str:
    """In a few words, whether the CUDA kernels can be used here, and why not."""
    if built_with is None:
        return "not built"
    if torch.version.cuda is None:
        return "built, not usable: this torch is a build without CUDA"
    if not torch.cuda.is_available():
        return "built, not usable: torch finds no GPU or no driver"
    return "built, but not for every GPU here" if gpu_problems() else "usable"


def python_rows() -> list[Row]:
    """Python and torch that are running."""
    return [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", f"{torch.__version__} ({Path(torch.__file__).parent})"),
        ("torch threads", str(torch.get_num_threads())),
        ("torch CPU kernels", torch.backends.cpu.get_cpu_capability()),
        ("torch CUDA", torch.version.cuda or "none, a build for CPUs"),
    ]


def tool_rows() -> list[Row]:
    """Compilers and build tools on PATH, with their versions."""
    tools = {"C++ compiler": os.environ.get("CXX", "c++"), "ninja": "ninja", "nvcc": _nvcc()}
    return [(name, _tool_version(command) or "not found") for name, command in tools.items()]


def _nvcc() -> str:
    """The nvcc that a build takes, as buildtools/cuda_toolkit.py looks for it."""
    home = os.environ.get("CUDA_HOME")
    candidates = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((nvcc for nvcc in candidates if shutil.which(nvcc)), "nvcc")


def machine_rows() -> list[Row]:
    """Processor, its vector instructions, memory and accelerators."""
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", "").split()
    rows = [
        ("system", platform.platform()),
        ("processor", cpuinfo.get("model name") or platform.machine()),
        ("processors usable", str(_usable_processors())),
        ("vector instructions", " ".join(s for s in _INSTRUCTION_SETS if s in flags) or "-"),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("CUDA devices", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gigabytes = device.total_memory / 2**30
        rows.append(
            (
                f"cuda:{index}",
                f"{device.name}, sm_{device.major}{device.minor}, {gigabytes:.0f} GiB",
            )
        )
    return rows


def kernel_rows() -> list[Row]:
    """The kernels that a large bfloat16 call gets on each GPU, and why; where there is no GPU, on
    those of two architectures."""
    if not _library.is_available():
        return []
    shape: tuple[int, int, int] = (8192, 4096, 128256)

    def row(where: str, capability: tuple[int, int] | None) -> Row:
        try:
            plan = planning.plan(*shape, "bfloat16", backend="cuda", compute_capability=capability)
        except ValueError as error:  # MEMEFF_CUDA_KERNELS means nothing
            return where, str(error)
        return where, f"{plan.kernels} ({plan.kernels_reason})"

    if not torch.cuda.is_available():
        return [row("sm_80, for example", (8, 0)), row("sm_90, for example", (9, 0))]
    rows = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            rows.append(row(f"cuda:{index}", None))
    return rows


def tuning_rows() -> list[Row]:
    """What memeff-tune has found on this machine: its file, and a row per GPU."""
    if not _library.is_available():
        return []
    file = _tuned.tune_file()
    try:
        results = _tuned.read(file)
    except ValueError as error:
        return [("file", str(error))]
    info, extension = _library.load().build_info(), _library.extension_file()
    here = (_tuned.driver(), _tuned.build(info, extension))
    rows = [("file", str(file) if results else f"{file}: none; memeff-tune writes it")]
    for result in results:
        states = ", ".join(f"{name} {state}" for name, state in result["families"].items())
        if (result["driver"], result["build"]) != here:
            states = "of another driver or build of memeff: run memeff-tune again"
        rows.append((result["gpu"], states))
    return rows


def problems() -> list[str]:
    """What keeps memeff from running or from being built, each with the command that mends it."""
    found = []
    try:
        _library.load()
    except ImportError as error:
        found.append(str(error))
        # Tools matter only to those who have to build.
        if _tool_version(os.environ.get("CXX", "c++")) is None:
            found.append("no C++ compiler. Type:  apt install g++   (or set CXX to one)")
        if sys.platform == "linux" and not _python_headers().exists():
            found.append(f"no {_python_headers()}. Type:  apt install python3-dev")
        return found
    return gpu_problems()


def gpu_problems() -> list[str]:
    """What keeps memeff from the GPUs that torch can use; nothing where there are none."""
    if not torch.cuda.is_available():
        return []
    info = _library.load().build_info()
    build = f"MEMEFF_CUDA=1 {_library.install_command()}"
    if info["cuda"] is None:
        found = []
        if _tool_version(_nvcc()) is None:
            found.append(
                f"no nvcc. Install CUDA toolkit {torch.version.cuda}, which this torch is built "
                "with, or set CUDA_HOME to one"
            )
        return [*found, f"memeff was built without its CUDA kernels. Type:  {build}"]
    archs = (info["cuda_archs"] or "").split()
    found = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(runs_on(arch, capability) for arch in archs):
            number = f"{capability[0]}{capability[1]}"
            found.append(
                f"no kernels for cuda:{index}, which is sm_{number}: memeff was built for "
                f"{' '.join(archs)}. Type:  MEMEFF_CUDA_ARCHS={number} {build}"
                if capability >= OLDEST_CAPABILITY
                else f"cuda:{index} is sm_{number}; memeff's kernels need sm_75 or newer"
            )
    return found


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for `arch`: "80", "90a" (that chip only), "100f" or "90+PTX"."""
    name, _, ptx = arch.partition("+")
    number = int(name.rstrip("af"))
    built = divmod(number, 10)
    if name.endswith("a"):
        return capability == built
    same_family = capability[0] == built[0] and capability[1] >= built[1]
    return same_family or (ptx == "PTX" and capability >= built)


def main() -> int:
    """Prints the report; returns the exit status."""
    sections = {
        "Build": build_rows(),
        "Python": python_rows(),
        "Tools": tool_rows(),
        "Machine": machine_rows(),
        "CUDA kernels for scores, products": kernel_rows(),
        "Found by memeff-tune": tuning_rows(),
    }
    for title, rows in sections.items():
        print(title if rows else f"{title}: -")
        for name, value in rows:
            print(f"  {name:<20} {value}")
    found = problems()
    print("Missing" if found else "Nothing is missing.")
    for problem in found:
        print(f"  {problem}")
    return 1 if found else 0


def _tool_version(command: str) -> str | None:
    """First line about a version that a tool prints, or None when it cannot be run."""
    words = shlex.split(command)
    if not words or shutil.which(words[0]) is None:
        return None
    answer = subprocess.run([*words, "--version"], capture_output=True, text=True, check=False)
    lines = answer.stdout.splitlines()
    # nvcc prints its name first and its release further down.
    line = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{line} ({shutil.which(words[0])})"


def _python_headers() -> Path:
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    block = file.read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
