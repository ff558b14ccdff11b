#!/usr/bin/env python3
"""What the assembler made of each kernel: registers, shared memory, spills, occupancy.

    scripts/ptxas_report.py                      every kernel for every architecture, docs/ptxas.txt
    scripts/ptxas_report.py --archs "80;90a" -   some architectures, to stdout
    scripts/ptxas_report.py --check -            fail if a kernel spills registers

Needs nvcc, no GPU. Occupancy is calculated from the limits of each architecture. Where nvdisasm is
found (on PATH, next to nvcc, or pip's nvidia-cuda-nvdisasm), the machine code of every kernel must
contain the instructions that its family is named for, else the exit status is 1.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from buildtools.config import BuildConfig
from buildtools.cuda_archs import Arch, choose_archs, parse_archs
from buildtools.cuda_toolkit import Toolkit, find_toolkit
from buildtools.sources import Source, find_sources

OUTPUT = ROOT / "docs" / "ptxas.txt"

# Dynamic shared memory is a launch's own affair; these constants are what the launchers pass.
DYNAMIC_SHARED = {
    "generic": "0",
    "sm80": "memeff::cuda::sm80::kPipelineBytes",
    "sm90": "memeff::cuda::sm90::kSharedBytes",
}

# Without these a kernel is not what it claims to be: products on tensor cores from fragments that
# ldmatrix loads; products of warpgroups from what the tensor memory accelerator brings.
INSTRUCTIONS = {
    "generic": (),
    "sm80": ("HMMA", "LDSM"),
    "sm90": ("HGMMA", "UTMALDG"),
}


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has, from the CUDA programming guide's table of capabilities."""

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, per block, for the system
    registers: int = 65536


LIMITS = {
    75: Limits(32, 16, 64 * 1024, 0),
    80: Limits(64, 32, 164 * 1024, 1024),
    86: Limits(48, 16, 100 * 1024, 1024),
    89: Limits(48, 24, 100 * 1024, 1024),
    90: Limits(64, 32, 228 * 1024, 1024),
    100: Limits(64, 32, 228 * 1024, 1024),
    120: Limits(48, 24, 100 * 1024, 1024),
}


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_multiprocessor(
    limits: Limits, *, threads: int, registers: int, shared_bytes: int
) -> int:
    """Thread blocks that fit one multiprocessor at the same time.

    A warp's registers come in units of 256 from one of four equal files; shared memory in units of
    128 bytes (256 before 8.0).
    """
    warps = -(-threads // 32)
    by_blocks = min(limits.blocks, limits.warps // warps)
    warps_per_file = limits.registers // 4 // round_up(max(registers, 1) * 32, 256)
    by_registers = 4 * warps_per_file // round_up(warps, 4)
    unit = 128 if limits.reserved_bytes else 256
    per_block = round_up(shared_bytes + limits.reserved_bytes, unit)
    by_shared = limits.shared_bytes // per_block if per_block else by_blocks
    return min(by_blocks, by_registers, by_shared)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    kernel: str  # family and demangled name without namespaces and parameters
    arch: Arch
    threads: int | None  # of its launch bounds
    registers: int
    static_shared: int
    dynamic_shared: int
    spilled_bytes: int
    missing: tuple[str, ...] = ()  # of INSTRUCTIONS

    @property
    def cell(self) -> str:
        """Registers, resident warps of those possible, spills."""
        spills = f" SPILLS {self.spilled_bytes}" if self.spilled_bytes else ""
        limits = LIMITS.get(self.arch.number)
        if limits is None or self.threads is None:
            return f"{self.registers}{spills}"
        blocks = blocks_per_multiprocessor(
            limits,
            threads=self.threads,
            registers=self.registers,
            shared_bytes=self.static_shared + self.dynamic_shared,
        )
        warps = blocks * -(-self.threads // 32)
        return f"{self.registers} {blocks}x{warps // blocks if blocks else 0}{spills}"


def short_name(demangled: str) -> str:
    """`statistics<float, true>` from a demangled signature."""
    spaces = "|".join(["memeff", "cuda", *DYNAMIC_SHARED])
    name = re.sub(rf"\(anonymous namespace\)::|\b(?:{spaces})::", "", demangled)
    name = name.removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):  # the parameters start at the first "(" outside of <>
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    replacements = [("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("(bool)1", "true"),
                    ("(bool)0", "false"), ("_kernel", "")]  # fmt: skip
    for old, new in replacements:
        name = name.replace(old, new)
    return re.sub(r"\(\w+\)(\d)", r"\1", name)


def demangle(names: Sequence[str]) -> list[str]:
    answer = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return answer.stdout.splitlines()


def parse_ptx(ptx: str) -> dict[str, tuple[int | None, int]]:
    """By kernel: threads per block, from its launch bounds, and dynamic shared memory."""
    value = re.search(r"memeff_dynamic_shared = (\d+)", ptx)
    dynamic_bytes = int(value[1]) if value else 0  # zero is not written out
    dynamic = re.search(r"\.extern \.shared [^;]*?(\w+)\[\];", ptx)
    found = {}
    for entry in ptx.split(".entry ")[1:]:
        name, head = entry.split("(", 1)[0].strip(), entry.split("{", 1)[0]
        bounds = re.search(r"\.maxntid\s+(\d+)", head)
        uses_dynamic = dynamic is not None and re.search(rf"\b{dynamic[1]}\b", entry) is not None
        found[name] = (int(bounds[1]) if bounds else None, dynamic_bytes if uses_dynamic else 0)
    return found


def parse_ptxas(log: str) -> dict[str, tuple[int, int, int]]:
    """Registers, static shared memory and spilled bytes by kernel, from ptxas -v."""
    found = {}
    for block in log.split("Compiling entry function '")[1:]:
        name = block.split("'", 1)[0]
        used = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        if used is None or spills is None:
            raise SystemExit(f"ptxas -v says nothing about {name}:\n{block}")
        spilled = int(spills[1]) + int(spills[2])
        found[name] = (int(used[1]), int(shared[1]) if shared else 0, spilled)
    return found


def find_nvdisasm(toolkit: Toolkit) -> Path | None:
    """The disassembler on PATH, next to nvcc, or in a package of this Python."""
    spec = importlib.util.find_spec("nvidia")  # a namespace of many packages
    packages = spec.submodule_search_locations if spec else None
    folders = [Path(f) for f in os.environ.get("PATH", "").split(os.pathsep) if f]
    folders.append(toolkit.root / "bin")
    folders += [folder for package in packages or () for folder in Path(package).glob("*/bin")]
    found = shutil.which("nvdisasm", path=os.pathsep.join(map(str, folders)))
    return Path(found) if found else None


def parse_sass(listing: str) -> dict[str, set[str]]:
    """Opcodes without their modifiers, by kernel, from nvdisasm's listing of a cubin."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^\s*//-+ \.text\.", listing, flags=re.MULTILINE)[1:]:
        name = section.split(None, 1)[0]
        # "/*0a10*/  @!P0 HMMA.16816.F32.BF16 R4, ... ;"
        instruction = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)"
        found[name] = set(re.findall(instruction, section, re.MULTILINE))
    return found


def compile_source(
    toolkit: Toolkit, source: Source, arch: Arch, nvdisasm: Path | None
) -> list[Compiled]:
    """All kernels of one source for one architecture; without nvdisasm nothing is missing."""
    family = Path(source.path).parent.name
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / "unit.cu"
        unit.write_text(
            f'#include "{ROOT / source.path}"\n'
            f'extern "C" __device__ int memeff_dynamic_shared = {DYNAMIC_SHARED[family]};\n'
        )
        ptx = Path(folder) / "unit.ptx"
        flags = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]
        _run([toolkit.nvcc, *flags, "-ptx", f"-arch=compute_{arch.name}", unit, "-o", ptx])
        ptxas = toolkit.root / "bin" / "ptxas"
        cubin = Path(folder) / "unit.cubin"
        log = _run([ptxas, "-v", f"-arch=sm_{arch.name}", ptx, "-o", cubin])
        opcodes = parse_sass(_run([nvdisasm, "-c", cubin])) if nvdisasm else {}
        launches = parse_ptx(ptx.read_text())
    compiled = []
    kernels = parse_ptxas(log)
    for (name, measured), full in zip(kernels.items(), demangle(list(kernels)), strict=True):
        threads, dynamic = launches[name]
        registers, static, spilled = measured
        kernel = f"{family} {short_name(full)}"
        there = opcodes.get(name, set()) if nvdisasm else set(INSTRUCTIONS[family])
        missing = tuple(opcode for opcode in INSTRUCTIONS[family] if opcode not in there)
        compiled.append(
            Compiled(kernel, arch, threads, registers, static, dynamic, spilled, missing)
        )
    return compiled


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


HEADER = """\
Kernels as CUDA {version}'s assembler made them (scripts/ptxas_report.py writes this file).

threads: of a block. shared: bytes of a block, static + dynamic. Below each architecture: registers
per thread, then how many blocks of how many warps fit one multiprocessor at the same time,
calculated from the architecture's limits; SPILLS and bytes where registers went to memory.
"""


def table(version: str, results: Sequence[Compiled]) -> str:
    """The report: a line per kernel, a column per architecture."""
    archs = sorted({r.arch for r in results}, key=lambda arch: (arch.number, arch.suffix))
    kernels = sorted({r.kernel for r in results}, key=lambda k: (k.partition(" ")[0], k))
    cells = {(r.kernel, r.arch): r for r in results}
    lines = [["kernel", "threads", "shared", *(f"sm_{arch.name}" for arch in archs)]]
    for kernel in kernels:
        row = {arch: cells[kernel, arch] for arch in archs if (kernel, arch) in cells}
        first = next(iter(row.values()))
        threads = "-" if first.threads is None else str(first.threads)
        shared = f"{first.static_shared}+{first.dynamic_shared}"
        columns = [row[arch].cell if arch in row else "-" for arch in archs]
        lines.append([kernel, threads, shared, *columns])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return HEADER.format(version=version) + "\n" + "\n".join(aligned) + "\n"


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", default=str(OUTPUT), help="file, or - for stdout")
    parser.add_argument("--archs", type=parse_archs, default=[], help='such as "80;90a"')
    parser.add_argument("--check", action="store_true", help="exit status 1 if anything spills")
    options = parser.parse_args()

    toolkit = find_toolkit()
    if toolkit is None:
        raise SystemExit("no nvcc: set CUDA_HOME to a CUDA toolkit")
    nvdisasm = find_nvdisasm(toolkit)
    work = [
        (source, arch)
        for source in find_sources()
        if source.toolchain == "cuda"
        for arch in choose_archs(source.archs, options.archs)
        if arch.sass and toolkit.supports(arch)
    ]
    with ThreadPoolExecutor(BuildConfig.from_environment().jobs) as pool:
        parts = pool.map(lambda item: compile_source(toolkit, item[0], item[1], nvdisasm), work)
        results = [kernel for part in parts for kernel in part]

    report = table(toolkit.version, results)
    if options.output == "-":
        sys.stdout.write(report)
    else:
        Path(options.output).write_text(report)
        print(f"wrote {options.output}: {len(results)} kernels")
    spilling = [r for r in results if r.spilled_bytes]
    for kernel in spilling:
        print(f"{kernel.kernel} spills {kernel.spilled_bytes} bytes on sm_{kernel.arch.name}")
    incomplete = [r for r in results if r.missing]
    for kernel in incomplete:
        print(f"{kernel.kernel} has no {' and no '.join(kernel.missing)} on sm_{kernel.arch.name}")
    if nvdisasm is None:
        print("SKIPPED: instructions were not checked, there is no nvdisasm (see --help)")
    return 1 if incomplete or (options.check and spilling) else 0


if __name__ == "__main__":
    sys.exit(main())
