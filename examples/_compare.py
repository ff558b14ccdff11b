"""Runs an example twice, without memeff and with it, each time in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from memeff.bench.memory import PeakMemory


def compare(main: Callable[..., list[float]], launcher: Sequence[str] = ()) -> None:
    """Call main(patched, **sizes) for both; print the losses, the time and the peak memory of each.

    On the command line: sizes, as in `vocab=4096 steps=5`. `launcher` starts a script in place of
    Python, torchrun for example.
    """
    way, *sizes = sys.argv[1:] or [""]
    if way not in ("plain", "memeff"):
        for each in ("plain", "memeff"):
            command = [sys.executable, *launcher, sys.argv[0], each, *sys.argv[1:]]
            subprocess.run(command, check=True)
        return
    begin = time.perf_counter()
    with PeakMemory() as peak:
        losses = main(way == "memeff", **{k: int(v) for k, v in (s.split("=") for s in sizes)})
    seconds = time.perf_counter() - begin
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{way:>7}: loss {losses[0]:.5f} -> {losses[-1]:.5f}, {seconds:.1f} s, "
            f"peak memory {peak.extra_bytes / 2**20:.0f} MiB",
            flush=True,
        )
