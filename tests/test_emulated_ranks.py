"""A vocabulary that two processes share, on the CUDA kernels in the emulator; see
tests/distributed/merged_checks.py, and tests/emulated.py."""

from __future__ import annotations

import json
from pathlib import Path

import emulated
from processes import run_processes

pytestmark = emulated.needed
NAMES = ["float32", "float64", "bfloat16", "float16", "statistics"]


def test_ranks(tmp_path: Path) -> None:
    emulated.load()  # built once, before the processes look for it
    (tmp_path / "names").write_text(json.dumps([f"emulated-{name}" for name in NAMES]))
    worker = Path(__file__).parent / "distributed" / "worker.py"
    logs = run_processes(worker, 2, tmp_path, 200)
    for rank, log in enumerate(logs):
        found = tmp_path / f"rank{rank}.json"
        assert found.exists(), f"rank {rank} has no result:\n{log[-4000:]}"
        results = json.loads(found.read_text())
        assert len(results) == len(NAMES), log[-4000:]
        wrong = {name: text for name, text in results.items() if text}
        assert not wrong, f"rank {rank}: {wrong}"
