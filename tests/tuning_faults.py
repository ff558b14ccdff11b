"""What the processes of memeff-tune call first in its rehearsal (test_tune.py): emulated kernels
stand in for a GPU's, and families get the faults that REHEARSED_FAULTS names."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import emulated

from memeff.bench import tuning


def prepare() -> None:
    emulated.load_built()
    faults = json.loads(os.environ["REHEARSED_FAULTS"])
    check = tuning._check

    def faulty_check(*arguments: Any) -> str | None:
        kernels = os.environ["MEMEFF_CUDA_KERNELS"].split(",")
        fault = next((fault for name, fault in faults.items() if name in kernels), None)
        if fault == "hang":
            time.sleep(1000)
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "wrong number":
            exact = tuning.linear_cross_entropy
            tuning.linear_cross_entropy = lambda x, *rest, **options: exact(  # type: ignore
                1.05 * x, *rest, **options
            )
        return check(*arguments)

    tuning._check = faulty_check  # type: ignore
