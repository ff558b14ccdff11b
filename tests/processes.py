"""Several processes over torch.distributed (gloo), which leave in a folder what they find.

Importing torch costs more than most checks, so one launch runs many of them. No process outlives
its time limit.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any


def run_processes(script: Path, processes: int, folder: Path, seconds: float) -> list[str]:
    """Runs ``python script folder rank processes`` for every rank; what each has printed."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # DeepSpeed asks for one; nobody listens
        environment = os.environ | {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port.getsockname()[1]),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("MEMEFF_CPU_KERNELS", None)
        running, logs = [], [folder / f"rank{rank}.log" for rank in range(processes)]
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                running.append(
                    subprocess.Popen(
                        [sys.executable, str(script), str(folder), str(rank), str(processes)],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
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
    return [log.read_text() for log in logs]


def join(seconds: float) -> tuple[Path, int, int]:
    """In one of the processes: joins the group of all, with that timeout; folder, rank, number."""
    import torch

    folder, rank, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    distributed: Any = torch.distributed
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=seconds),
    )
    return folder, rank, processes
