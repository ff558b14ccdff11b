"""Finds the CUDA toolkit and decides whether the CUDA kernels are part of the build.

Nothing here asks whether a GPU is present: build machines often have none.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from buildtools.cuda_archs import Arch

DEFAULT_ROOT = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit."""

    root: Path
    version: str  # "13.0"
    archs: frozenset[str]  # that nvcc knows, without suffixes: "75", "80", ...

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    @property
    def library_folder(self) -> Path:
        """Where libcudart_static.a is.

        Raises:
            SystemExit: it is in none of the usual places.
        """
        places = [self.root / "lib64", self.root / "lib", *self.root.glob("targets/*/lib")]
        for place in places:
            if (place / "libcudart_static.a").exists():
                return place
        raise SystemExit(
            f"memeff: no libcudart_static.a in {', '.join(map(str, places))}: the CUDA toolkit is "
            "incomplete. Install its cudart development package."
        )

    def supports(self, arch: Arch) -> bool:
        """Whether this nvcc can compile for `arch`; family code ("100f") came with CUDA 12.9."""
        has_families = tuple(map(int, self.version.split("."))) >= (12, 9)
        return str(arch.number) in self.archs and (arch.suffix != "f" or has_families)


def find_toolkit(environment: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The toolkit of CUDA_HOME, else of the nvcc on PATH, else /usr/local/cuda; None without any.

    nvcc on PATH may be a wrapper that lives elsewhere: nvcc itself says where its toolkit is.
    """
    home = environment.get("CUDA_HOME", "")
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    candidates = [
        *([Path(home) / "bin" / "nvcc"] if home else []),
        *([Path(on_path)] if on_path else []),
        DEFAULT_ROOT / "bin" / "nvcc",
    ]
    for nvcc in candidates:
        if nvcc.exists():
            return _toolkit_of(nvcc)
    return None


def _toolkit_of(nvcc: Path) -> Toolkit:
    top = re.search(r"^#\$ TOP=(.+)$", _run(nvcc, "--dryrun", "-x", "cu", "-c", "-"), re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", _run(nvcc, "--version"))
    if top is None or release is None:
        raise SystemExit(
            f"memeff: {nvcc} does not answer as nvcc does. Set CUDA_HOME to a toolkit."
        )
    archs = re.findall(r"compute_(\d+)", _run(nvcc, "--list-gpu-arch"))
    return Toolkit(Path(top[1]).resolve(), release[1], frozenset(archs))


def _run(nvcc: Path, *arguments: str) -> str:
    answer = subprocess.run(
        [nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return answer.stdout


def choose_toolkit(
    wanted: bool | None, torch_version: str, torch_cuda: str | None, toolkit: Toolkit | None
) -> Toolkit | None:
    """The toolkit to build the CUDA kernels with, or None to leave them out.

    wanted: MEMEFF_CUDA, None for "auto", which builds them for a torch that can use them.
    torch_cuda: the CUDA version of torch, None for a build without CUDA.

    Raises:
        SystemExit: they are wanted and cannot be built; the message says what to do.
    """
    if wanted is False or (wanted is None and torch_cuda is None):
        return None
    if toolkit is None:
        needs = torch_cuda.split(".")[0] if torch_cuda else "12 or 13"
        remedy = (
            f"no nvcc in CUDA_HOME, on PATH or in {DEFAULT_ROOT}. Install a CUDA {needs} toolkit "
            "or set CUDA_HOME to one"
        )
        if wanted:
            raise SystemExit(f"memeff: MEMEFF_CUDA=1, but {remedy}.")
        print(f"memeff: building without CUDA kernels, {remedy}, and build again.")
        return None
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) != toolkit.major:
        raise SystemExit(
            f"memeff: {toolkit.nvcc} is CUDA {toolkit.version}, but torch {torch_version} was "
            f"built with CUDA {torch_cuda}: the major versions must agree. Set CUDA_HOME to a CUDA "
            f"{torch_cuda.split('.')[0]} toolkit, or MEMEFF_CUDA=0 to build without CUDA kernels."
        )
    return toolkit


def native_archs() -> str:
    """The architectures of this machine's GPUs, as MEMEFF_CUDA_ARCHS has them: "80;90".

    Raises:
        SystemExit: the driver's nvidia-smi is missing or sees no GPU.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found: list[tuple[str, str]] = []
    if shutil.which(command[0]):
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found = re.findall(r"^(\d+)\.(\d)$", answer, re.MULTILINE)
    if not found:
        raise SystemExit(
            "memeff: MEMEFF_CUDA_ARCHS='native', but nvidia-smi shows no GPU; "
            "name its architecture, for example MEMEFF_CUDA_ARCHS=90a"
        )
    return ";".join(sorted({"".join(capability) for capability in found}))
