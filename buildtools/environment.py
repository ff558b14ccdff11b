"""Finds the torch of the environment that pip installs into, from inside its build isolation too.

Isolation runs the build in the environment's own interpreter but hides that environment's packages
(PYTHONPATH points to the build requirements and to a sitecustomize that removes the rest). The same
interpreter, started again without those variables, sees the packages as the user does.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)

# Asks without importing torch, which takes seconds.
_PROBE = """
import importlib.util, json, sys
spec = importlib.util.find_spec("torch")
print(json.dumps({"origin": spec.origin if spec else None, "path": [p for p in sys.path if p]}))
"""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder, and the search path that finds its dependencies too."""

    folder: Path
    search_path: tuple[str, ...]

    @property
    def version(self) -> str:
        """The version string, for example "2.13.0+cpu", read without importing torch."""
        match = re.search(r"__version__ = '([^']+)'", (self.folder / "version.py").read_text())
        if match is None:
            raise SystemExit(
                f"memeff: no version in {self.folder / 'version.py'}: torch is broken, reinstall it"
            )
        return match.group(1)


def find_torch() -> Torch | None:
    """The torch that this interpreter imports when a user starts it, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:  # no isolation
        return Torch(Path(spec.origin).parent, ())
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    # Started in a neutral folder: the current one is on the path and could hold one named torch.
    answer = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env=environment,
        cwd=os.sep,
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(answer.stdout)
    if found["origin"] is None:
        return None
    folder = Path(found["origin"]).parent
    # The parent folder is not on the path where torch itself is an editable installation.
    return Torch(folder, (*found["path"], str(folder.parent)))


def require_torch() -> Torch:
    """The environment's torch, put on sys.path behind everything that is already there.

    Raises:
        SystemExit: there is none, or it is too old; the message says what to type.
    """
    torch = find_torch()
    if torch is None:
        raise SystemExit(missing_torch_message())
    major, minor = (int(part) for part in torch.version.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise SystemExit(
            f"\nmemeff needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, "
            f"{sys.executable} has torch {torch.version}."
            "\nType:  pip install --upgrade torch   and then the same command again.\n"
        )
    sys.path += [entry for entry in torch.search_path if entry not in sys.path]
    return torch


def missing_torch_message() -> str:
    """What to type when there is no torch to build against."""
    return (
        f"\nmemeff is compiled against the torch that is installed, and {sys.executable} has none."
        "\nType:  pip install torch   and then the same command again."
        "\nIf torch is installed and uv or python -m build made an environment without it, type:"
        "\n  pip install setuptools ninja && pip install --no-build-isolation .\n"
    )
