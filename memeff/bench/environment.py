"""What a result must say about where it came from."""

import datetime
import itertools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import memeff
from memeff import _library

# Distributions of the peers whose versions belong to a result.
PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")


def describe_environment(threads: int, device: str) -> dict[str, Any]:
    """Machine, software, commit, command and date, ready for JSON."""
    machine: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.startswith("cuda"):
        machine |= describe_gpu(torch.device(device))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "memeff": installed_version("memeff"),
        "commit": commit(),
        "peers": {name: version for name in PEERS if (version := installed_version(name))},
    }


def command_line(argv: Sequence[str]) -> str:
    """The command to repeat a measurement, without the path of the results (--json FILE,
    --json=FILE)."""
    kept = [Path(argv[0]).name]
    for before, argument in itertools.pairwise(argv):
        if "--json" not in (before, argument.partition("=")[0]):
            kept.append(argument)
    return shlex.join(kept)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name, size and driver of a CUDA device, and the CUDA of torch and of memeff's kernels."""
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        driver, _, power_limit = answer.splitlines()[index].partition(", ")
    except (OSError, IndexError):
        driver = power_limit = "unknown"
    build = _library.load().build_info()
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_bytes": properties.total_memory,
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_power_limit": power_limit,
        "driver": driver,
        "torch_cuda": torch.version.cuda,
        "memeff_cuda": build["cuda"],
        "memeff_cuda_archs": build["cuda_archs"],
    }


def warn_if_busy() -> None:
    """Print a warning where other processes already keep more than a tenth of the CPUs busy."""
    busy, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 0.1 * cpus:
        print(
            f"Warning: the machine is busy ({busy:.1f} processes ran on average in the "
            f"last minute, on {cpus} CPUs); times will not be comparable.",
            file=sys.stderr,
            flush=True,
        )


def cpu_model() -> str:
    """The processor's name; virtual machines often shorten it, hence family and model after it."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bf16 itself; where not, bf16 is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in (" avx512_bf16", " amx_bf16", " bf16"))


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with "+changes" when files differ from it; None outside a checkout."""
    root = Path(memeff.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    if not head:
        return None
    # Result files themselves do not make a measurement's code differ.
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head + ("+changes" if changes else "")
