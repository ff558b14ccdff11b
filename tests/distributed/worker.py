"""One of the processes of a launch: runs every check of checks.py and writes what it has found."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # cases.py, tolerances.py

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=30)


def main(folder: Path, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=processes,
        timeout=TIMEOUT,
    )
    from checks import CHECKS, Ranks

    def groups(timeout: timedelta) -> dict[int, Any]:
        sizes = range(2, processes + 1)
        return {size: dist.new_group(list(range(size)), timeout=timeout) for size in sizes}

    patient, impatient = groups(TIMEOUT), groups(timedelta(seconds=2))
    results = {}
    for name, (size, check) in CHECKS.items():
        if rank >= size:
            continue
        start = time.perf_counter()
        try:
            check(Ranks(patient[size], impatient[size], rank, size))
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(f"{time.perf_counter() - start:6.2f} s  {name}", flush=True)
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # some checks leave groups behind that cannot be shut down


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
