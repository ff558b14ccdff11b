"""Compiles sources that need flags of their own, through a small ninja file.

torch's BuildExtension gives every file of an extension the same flags, and compiles CUDA only
where torch has it. The objects made here are handed to it ready-made; ninja rebuilds them when the
source, an included header or a flag changes.
"""

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from buildtools.sources import Source

# nvcc, too, writes the headers that a source includes the way GCC does.
_RULE = """
rule {name}
  command = {command} $own_flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = {name} $own_flags $in
"""


@dataclass(frozen=True)
class Compilation:
    """One source, the compiler that takes it, and its flags in addition to that compiler's own."""

    source: Source
    compiler: str
    flags: Sequence[str]


def object_path(build_folder: Path, source: Source) -> Path:
    """Where the object of `source` is put."""
    return build_folder / f"{source.path}.o"


def compile_objects(
    compilations: Sequence[Compilation],
    *,
    compilers: Mapping[str, Sequence[str]],
    root: Path,
    build_folder: Path,
    jobs: int,
) -> list[Path]:
    """Compiles sources (paths relative to `root`) and returns their objects in the same order.

    compilers: the command with the flags of all its sources, by the name that is shown.

    Raises:
        SystemExit: ninja is missing, or a compiler failed (its messages are on stdout).
    """
    ninja = shutil.which("ninja")
    if ninja is None:
        raise SystemExit("memeff: ninja was not found. Type:  pip install ninja")
    build_folder.mkdir(parents=True, exist_ok=True)
    lines = ["ninja_required_version = 1.3"]
    for name, command in compilers.items():
        lines.append(_RULE.format(name=name, command=_escape_command(command)))
    for item in compilations:
        target = _escape_path(object_path(build_folder, item.source))
        lines.append(f"build {target}: {item.compiler} {_escape_path(root / item.source.path)}")
        lines.append(f"  own_flags = {_escape_command(item.flags)}")
    ninja_file = build_folder / "objects.ninja"
    ninja_file.write_text("\n".join(lines) + "\n")
    command = [ninja, "-C", str(build_folder), "-f", ninja_file.name, "-j", str(jobs)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit("memeff: compilation failed, see the compiler's messages above")
    return [object_path(build_folder, item.source) for item in compilations]


def _escape_command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
