"""A vocabulary that two processes share, on the CUDA kernels in the emulator: see
emulated_checks.py, and tests/emulated.py."""

from __future__ import annotations

import json
from pathlib import Path

import emulated
from emulated_checks import EMULATED
from processes import run_processes

pytestmark = emulated.needed
SECONDS = 240


def test_ranks(tmp_path: Path) -> None:
    emulated.load()  # built once, before the processes look for it
    (tmp_path / "names").write_text(json.dumps(list(EMULATED)))
    logs = run_processes(Path(__file__).with_name("worker.py"), 2, tmp_path, SECONDS)
    for rank, log in enumerate(logs):
        found = tmp_path / f"rank{rank}.json"
        assert found.exists(), f"rank {rank} has no result:\n{log[-4000:]}"
        results = json.loads(found.read_text())
        assert len(results) == len(EMULATED), log[-4000:]
        wrong = [f"{name}: {text}" for name, text in results.items() if text]
        assert not wrong, f"rank {rank}, {len(wrong)} checks failed, the first: {wrong[0]}"
