"""Reads sources.json: which source is compiled by what, with which flags, for which GPUs."""

import fnmatch
import json
import platform
from dataclasses import dataclass
from pathlib import Path

from buildtools.cuda_archs import Arch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "buildtools" / "sources.json"


@dataclass(frozen=True)
class Source:
    """One file to compile: its path relative to the repository, and flags of its own."""

    path: str
    toolchain: str
    flags: tuple[str, ...] = ()
    archs: tuple[Arch, ...] = ()  # of toolchain "cuda"
    needs_cuda: bool = False  # part of builds with CUDA only


def warning_flags() -> list[str]:
    """Warnings that every file is compiled with."""
    return list(json.loads(TABLE.read_text())["warnings"])


def find_sources(root: Path = ROOT, machine: str | None = None) -> list[Source]:
    """Every C++ and CUDA source under csrc/ with its row of the table; sorted, files without own
    flags first.

    The order matters to the linker: where two objects define the same inline function it keeps the
    first, and that one must run on every processor.

    Raises:
        SystemExit: a file matches no row of the table.
    """
    machine = machine or platform.machine()
    rows = json.loads(TABLE.read_text())["rows"]
    sources = []
    files = [file for suffix in ("cpp", "cu") for file in (root / "csrc").rglob(f"*.{suffix}")]
    for file in sorted(files):
        path = file.relative_to(root).as_posix()
        row = next((row for row in rows if _matches(path, row["pattern"])), None)
        if row is None:
            raise SystemExit(
                f"memeff: {path} matches no pattern of buildtools/sources.json: nothing compiles it"
            )
        sources.append(
            Source(
                path,
                row["toolchain"],
                flags=tuple(row.get("flags", {}).get(machine, ())),
                archs=tuple(Arch.parse(arch) for arch in row.get("archs", ())),
                needs_cuda=row["toolchain"] == "cuda" or row.get("requires") == "cuda",
            )
        )
    return sorted(sources, key=lambda source: bool(source.flags))


def _matches(path: str, pattern: str) -> bool:
    # fnmatch's "*" crosses "/", CMake's does not: compare folder and name apart so that both agree.
    folder, _, name = path.rpartition("/")
    pattern_folder, _, pattern_name = pattern.rpartition("/")
    return folder == pattern_folder and fnmatch.fnmatchcase(name, pattern_name)
