"""Several processes that run the same checks over torch.distributed (gloo), for tests to look at.

Importing torch costs more than most checks, so one launch runs all of them. No process outlives its
time limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


def launch(processes: int, folder: Path, seconds: float) -> list[dict[str, str]]:
    """What each process has found: for each check "" or what is wrong.

    Raises:
        AssertionError: a process has ended without a result, or not at all.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("MEMEFF_CPU_KERNELS", None)
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    running = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, str(WORKER), str(folder), str(rank), str(processes)]
            running.append(
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            )
    deadline = time.monotonic() + seconds
    try:
        for process in running:
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in running:
            process.kill()
            process.wait()
    results = []
    for rank, log in enumerate(logs):
        result = folder / f"rank{rank}.json"
        assert result.exists(), f"rank {rank} has no result:\n{log.read_text()[-4000:]}"
        results.append(json.loads(result.read_text()))
    return results
