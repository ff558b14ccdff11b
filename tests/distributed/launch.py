"""One launch of processes that run many checks: those of a test here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from processes import run_processes

PROCESSES = 4
SECONDS = 240


def run_checks(checks: Mapping[str, tuple[int, Callable[[Any], None]]], folder: Path) -> None:
    """Every check on its number of ranks; an AssertionError if one fails or does not run.

    One launch, and one test: workers of pytest-xdist that share the checks would launch once each.
    """
    (folder / "names").write_text(json.dumps(list(checks)))
    logs = run_processes(Path(__file__).with_name("worker.py"), PROCESSES, folder, SECONDS)
    results = []
    for rank, log in enumerate(logs):
        found = folder / f"rank{rank}.json"
        assert found.exists(), f"rank {rank} has no result:\n{log[-4000:]}"
        results.append(json.loads(found.read_text()))
    wrong = [
        f"{name}, rank {rank} of {size}: {found}"
        for name, (size, _) in checks.items()
        for rank in range(size)
        if (found := results[rank].get(name, "not run: the process ended before"))
    ]
    assert not wrong, f"{len(wrong)} checks failed, the first:\n{wrong[0]}"
