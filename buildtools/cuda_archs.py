"""GPU architectures: how they are written, which of them a source is compiled for, nvcc's flags.

"90" is the machine code of compute capability 9.0, which 9.x with x > 0 run too; "100f" may use
what all of the 10.x family has; "90a" what 9.0 alone has. "90+PTX" adds the portable assembly,
which drivers translate for every newer GPU.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Arch:
    """One architecture; `sass` (machine code), `ptx` (portable assembly) or both are kept."""

    number: int  # 10 * major + minor
    suffix: str = ""  # "a" or "f"
    sass: bool = True
    ptx: bool = False

    @classmethod
    def parse(cls, text: str) -> "Arch":
        """Reads "80", "90a", "100f", "90+PTX".

        Raises:
            ValueError: the text is none of these.
        """
        match = re.fullmatch(r"(\d{2,3})([af]?)(\+PTX)?", text)
        if match is None:
            raise ValueError(f"{text!r} is no GPU architecture; expected 80, 90a, 100f or 90+PTX")
        return cls(int(match[1]), match[2], ptx=match[3] is not None)

    @property
    def name(self) -> str:
        """The name as nvcc has it behind "sm_" or "compute_"."""
        return f"{self.number}{self.suffix}"

    @property
    def gencode(self) -> str:
        """The value of nvcc's -gencode."""
        kinds = [("sm", self.sass), ("compute", self.ptx)]
        code = ",".join(f"{kind}_{self.name}" for kind, wanted in kinds if wanted)
        return f"arch=compute_{self.name},code=[{code}]"

    @property
    def cmake(self) -> str:
        """The entry of CMake's CUDA_ARCHITECTURES."""
        if self.sass and self.ptx:
            return self.name
        return f"{self.name}-{'real' if self.sass else 'virtual'}"

    def __str__(self) -> str:
        return self.name + ("+PTX" if self.ptx else "")


def parse_archs(text: str) -> list[Arch]:
    """Reads a list such as "80;90a"."""
    return [Arch.parse(entry.strip()) for entry in text.split(";") if entry.strip()]


def choose_archs(row: Sequence[Arch], requested: Sequence[Arch]) -> list[Arch]:
    """What a source whose row of the table says `row` is compiled for.

    Nothing requested: the row. Else what the row has of the requested numbers (asked for 90, a
    source that is for 90a gets 90a), and requested ones newer than the row's first, unless the
    source is for single chips. A source for none of them is compiled to PTX of the row's first,
    which is quick: the extension needs its functions to link, and never calls them.
    """
    if not requested:
        return list(row)
    chosen = []
    for wanted in requested:
        listed = [arch for arch in row if arch.number == wanted.number]
        if listed:
            chosen.append(replace(listed[0], ptx=wanted.ptx))
        elif wanted.number > row[0].number and not any(arch.suffix == "a" for arch in row):
            chosen.append(wanted)
    return chosen or [replace(row[0], sass=False, ptx=True)]


def describe_archs(archs: Iterable[Arch]) -> str:
    """All architectures with machine code or PTX, sorted, each once: "80 90+PTX 90a"."""
    merged: dict[str, Arch] = {}
    for arch in archs:
        known = merged.get(arch.name, arch)
        merged[arch.name] = replace(known, ptx=known.ptx or arch.ptx)
    ordered = sorted(merged.values(), key=lambda arch: (arch.number, arch.suffix))
    return " ".join(str(arch) for arch in ordered)


if __name__ == "__main__":  # CMake: row and requested architectures in, CUDA_ARCHITECTURES out
    chosen = choose_archs(parse_archs(sys.argv[1]), parse_archs(sys.argv[2]))
    print(";".join(arch.cmake for arch in chosen))
