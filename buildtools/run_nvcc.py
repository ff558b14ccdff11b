"""Runs nvcc and does not let the assembler's complaints pass: `run_nvcc.py {warn,error} nvcc ...`

ptxas reports what ruins a kernel in ways that nvcc's own -Werror misses: registers spilled to
memory as a warning of its own, wgmma instructions run one after the other ("(C7510) Potential
Performance Loss") as mere information. Here every such line counts: with "error" the object is
removed and the compilation has failed; with "warn" a line at the end points to them.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Without -v ptxas is silent unless something is worth a look.
_COMPLAINT = re.compile(r"^ptxas (?:warning|info)\s*:", re.MULTILINE)


def complaints(output: str) -> list[str]:
    """The lines in which ptxas complains, each once."""
    lines = [line for line in output.splitlines() if _COMPLAINT.match(line)]
    return list(dict.fromkeys(lines))


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status of nvcc, or 1 for complaints that count as errors."""
    mode, *command = arguments
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    sys.stdout.write(done.stdout)
    found = complaints(done.stdout)
    if done.returncode != 0 or not found:
        return done.returncode
    print(f"memeff: {len(found)} complaints of ptxas, see above")
    if mode != "error":
        return 0
    Path(command[command.index("-o") + 1]).unlink()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
