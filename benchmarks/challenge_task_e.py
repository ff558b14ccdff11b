"""The challenge's marking scheme, one criterion after the other, with figures.

    python benchmarks/challenge_task_e.py                     sizes for a small machine
    python benchmarks/challenge_task_e.py --only grpo,llama   some of them
    python benchmarks/challenge_task_e.py --json results.json

The challenge: a loss over logits that come from a projection, as a torch.autograd.Function, without
the memory of the logits; the user's function maps (hidden chunk, linear, labels chunk) to a small
tensor and upcasts with .float(); nothing about its derivatives is hard-coded.

Peaks are measured in processes of their own. "error" is the relative error against float64, beside
that of the standard way in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from challenge import correctness, grpo, llama, memory
from challenge.report import Row

from memeff.bench.environment import describe_environment

SECTIONS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "memory": memory.memory,
    "correctness": correctness.correctness,
    "llama": llama.llama,
    "grpo": grpo.grpo,
    "rl_memory": memory.rl_memory,
    "grpo_time": grpo.grpo_time,
    "original_table": memory.original_table,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--shape", default="4096,512,32768", help="of the memory criteria: N,D,V")
    parser.add_argument("--budget", type=int, default=32, help="MiB of workspace (default 32)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument("--features", type=int, default=1024, help="D of grpo_time (default 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="of grpo_time (default 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    arguments.shape = [int(size) for size in arguments.shape.split(",")]
    chosen = list(SECTIONS) if arguments.only is None else arguments.only.split(",")
    for name in chosen:
        if name not in SECTIONS:
            parser.error(f"--only has {name!r}, expected some of {', '.join(SECTIONS)}")
    results = []
    for name in chosen:
        for result in SECTIONS[name](arguments):
            verdict = {True: "pass", False: "FAIL", None: "skip"}[result["passed"]]
            print(f"{verdict}  {result['criterion']}\n      {result['figures']}", flush=True)
            results.append(result)
    if arguments.json is not None:
        environment = describe_environment(torch.get_num_threads(), arguments.device)
        text = json.dumps({"environment": environment, "results": results}, indent=1)
        arguments.json.write_text(text + "\n")
    return int(any(result["passed"] is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
