"""Several processes that share a vocabulary or sequences: see checks.py and its neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from every_check import CHECKS
from processes import run_processes

PROCESSES = 4
SECONDS = 240


def test_every_check_on_every_rank(tmp_path: Path) -> None:
    """One test: workers of pytest-xdist that share the checks would launch once each."""
    (tmp_path / "names").write_text(json.dumps(list(CHECKS)))
    logs = run_processes(Path(__file__).with_name("worker.py"), PROCESSES, tmp_path, SECONDS)
    results = []
    for rank, log in enumerate(logs):
        found = tmp_path / f"rank{rank}.json"
        assert found.exists(), f"rank {rank} has no result:\n{log[-4000:]}"
        results.append(json.loads(found.read_text()))
    wrong = [
        f"{name}, rank {rank} of {size}: {found}"
        for name, (size, _) in CHECKS.items()
        for rank in range(size)
        if (found := results[rank].get(name, "not run: the process ended before"))
    ]
    assert not wrong, f"{len(wrong)} checks failed, the first:\n{wrong[0]}"


def test_the_tensor_parallel_plan_of_transformers_is_among_them() -> None:
    pytest.importorskip("transformers")
    assert "head-transformers" in CHECKS
