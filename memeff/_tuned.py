"""What memeff-tune has found on this machine: one JSON file, read when the extension is loaded.

    {"version": 1, "results": [
        {"gpu": "NVIDIA H200", "capability": 90, "driver": "580.65.06", "build": "0.2.0 ...",
         "families": {"sm90": "verified", "sm90x2": "hang: ...", ...},
         "choices": [{"dtype": "bfloat16", "tokens": 8192, "features": 4096, "vocab": 128256,
                      "skips": false, "kernels": "sm90,sm90", "seconds": {"sm90,sm90": 0.035, ...}},
                     ...]},
        ...]}

A result serves the GPU of that name, under that driver and this build of the extension.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

_VERSION = 1
VERIFIED = "verified"

Result = dict[str, Any]


def tune_file() -> Path:
    """Where results lie: MEMEFF_TUNE_FILE, else memeff/tuned.json in the user's cache folder."""
    if named := os.environ.get("MEMEFF_TUNE_FILE"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "memeff" / "tuned.json"


def driver() -> str:
    """The version of the GPU's driver, "" where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else text.splitlines()[0]


def build(info: dict[str, str | None], extension: Path | None) -> str:
    """What tells one build of the extension from another."""
    size = extension.stat().st_size if extension else 0
    return f"torch {torch.__version__}, CUDA {info['cuda']} for {info['cuda_archs']}, {size} bytes"


def read(file: Path) -> list[Result]:
    """All results of the file; none where it is not there. ValueError: it is something else."""
    try:
        content = json.loads(file.read_text())
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}, expected {_VERSION}")
        results: list[Result] = content["results"]
        for result in results:
            _ = (_rows(result), result["driver"], result["build"], result["families"].items())
    except FileNotFoundError:
        return []
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file} has no results of memeff-tune ({type(error).__name__}: {error}); run "
            "memeff-tune to write it again"
        ) from None
    return results


def write(file: Path, result: Result) -> None:
    """Adds a result to the file, in place of those of the same GPU."""
    try:
        others = [other for other in read(file) if other["gpu"] != result["gpu"]]
    except ValueError:
        others = []
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(json.dumps({"version": _VERSION, "results": [*others, result]}, indent=1) + "\n")
    new.replace(file)


def known(
    file: Path, info: dict[str, str | None], extension: Path | None
) -> tuple[list[tuple[Any, ...]], list[tuple[str, str]]]:
    """What the extension takes (_C.add_tuned): rows of choices and banned kernels, of results that
    count here. A file that cannot be read is warned about, and left out."""
    try:
        results = read(file)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return [], []
    here = (driver(), build(info, extension))
    counted = [result for result in results if (result["driver"], result["build"]) == here]
    rows = [row for result in counted for row in _rows(result)]
    banned = [
        (result["gpu"], family)
        for result in counted
        for family, state in result["families"].items()
        if state != VERIFIED
    ]
    return rows, banned


def _rows(result: Result) -> list[tuple[Any, ...]]:
    fields = ("dtype", "tokens", "features", "vocab", "skips", "kernels")
    return [
        (str(result["gpu"]), int(result["capability"]), *(choice[name] for name in fields))
        for choice in result["choices"]
    ]
