"""Compiles sources that need flags of their own, through a small ninja file.

torch's BuildExtension gives every file of an extension the same flags. The objects made here are
handed to it ready-made; ninja rebuilds them when the source, an included header or a flag changes.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from buildtools.sources import Source

_RULES = """\
ninja_required_version = 1.3

rule cxx
  command = {compiler} -MMD -MF $out.d {flags} $own_flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = {compiler_name} $own_flags $in
"""


def compile_objects(
    sources: Sequence[Source],
    *,
    root: Path,
    build_folder: Path,
    compiler: str,
    flags: Sequence[str],
    jobs: int,
) -> list[Path]:
    """Compiles `sources` (paths relative to `root`) and returns their objects in the same order.

    Raises:
        SystemExit: ninja is missing, or the compiler failed (its messages are on stdout).
    """
    ninja = shutil.which("ninja")
    if ninja is None:
        raise SystemExit("memeff: ninja was not found. Type:  pip install ninja")
    build_folder.mkdir(parents=True, exist_ok=True)
    objects = [build_folder / Path(source.path).with_suffix(".o") for source in sources]
    lines = [
        _RULES.format(
            compiler=_escape_command(shlex.split(compiler)),
            compiler_name=Path(compiler).name,
            flags=_escape_command(flags),
        )
    ]
    for source, target in zip(sources, objects, strict=True):
        lines.append(f"build {_escape_path(target)}: cxx {_escape_path(root / source.path)}")
        lines.append(f"  own_flags = {_escape_command(source.flags)}")
    ninja_file = build_folder / "objects.ninja"
    ninja_file.write_text("\n".join(lines) + "\n")
    command = [ninja, "-C", str(build_folder), "-f", ninja_file.name, "-j", str(jobs)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit("memeff: compilation failed, see the compiler's messages above")
    return objects


def _escape_command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
