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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # cases.py, tolerances.py

import torch.distributed as dist
from processes import join

TIMEOUT = timedelta(seconds=60)


def main() -> None:
    folder, rank, processes = join(TIMEOUT.total_seconds())
    from checks import Ranks
    from emulated_checks import EMULATED
    from every_check import CHECKS

    def groups(timeout: timedelta) -> dict[int, Any]:
        sizes = range(2, processes + 1)
        return {size: dist.new_group(list(range(size)), timeout=timeout) for size in sizes}

    patient, impatient = groups(TIMEOUT), groups(timedelta(seconds=2))
    results = {}
    for name in json.loads((folder / "names").read_text()):
        size, check = (CHECKS | EMULATED)[name]
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
    main()
