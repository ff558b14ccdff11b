"""Vocabularies that several processes share: see checks.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECKS = _load("checks").CHECKS
launch = _load("launch").launch
PROCESSES = 4
SECONDS = 240


def test_every_check_on_every_rank(tmp_path: Path) -> None:
    """One test: workers of pytest-xdist that share the checks would launch once each."""
    results: list[dict[str, str]] = launch(PROCESSES, tmp_path, SECONDS)
    wrong = [
        f"{name}, rank {rank} of {size}: {found}"
        for name, (size, _) in CHECKS.items()
        for rank in range(size)
        if (found := results[rank].get(name, "not run: the process ended before"))
    ]
    assert not wrong, f"{len(wrong)} checks failed, the first:\n{wrong[0]}"
