"""The CPU's plans of one shape: predicted and measured time of each, relative to the fastest.

    python benchmarks/plans.py --shape 2048,1024,32768 --shape 4096,256,16384 --json results.json

Plans differ in the size of their chunks; "default" is what the planner takes without a budget. For
16-bit inputs "NMiB" are plans of a memory budget, whose sums of the weight gradient may be compact.
One step is forward and backward. The planner predicts relative times only: see
`memeff.Plan.predicted_flops`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import memeff
from memeff.bench.environment import describe_environment, warn_if_busy
from memeff.bench.problem import make_problem
from memeff.bench.progress import Progress
from memeff.bench.shapes import Shape, parse_shape
from memeff.bench.timing import gemm_floor_call, time_interleaved

MIB = 2**20
CHUNKS = (1024, 512, 256, 128)


def settings_of(dtype: torch.dtype, budgets: list[int]) -> dict[str, dict[str, int]]:
    """Name of a plan -> what asks for it."""
    settings: dict[str, dict[str, int]] = {"default": {}}
    settings.update({f"chunks of {size}": {"chunk_size": size} for size in CHUNKS})
    if dtype.itemsize == 2:
        settings.update({f"{size} MiB": {"memory_budget": size * MIB} for size in budgets})
    return settings


def measure(shape: Shape, dtype: torch.dtype, budgets: list[int], rounds: int) -> list[Any]:
    """A row for each plan: name, workspace, predicted and measured time."""
    problem = make_problem(shape, dtype)
    settings = settings_of(dtype, budgets)

    def step(options: dict[str, int]) -> None:
        memeff.linear_cross_entropy(problem.x, problem.w, problem.y, **options).backward()

    calls = {"products": gemm_floor_call(problem, backward=True)}
    for name, options in settings.items():
        calls[name] = lambda options=options: step(options)
    progress = Progress()
    for name, call in calls.items():
        progress.update(f"{shape}: warm-up, {name}")
        call()
    candidates = {name: (call, problem.clear_gradients) for name, call in calls.items()}
    timings = time_interleaved(candidates, rounds, torch.device("cpu"), progress.update)
    progress.clear()
    rows = []
    for name, options in settings.items():
        plan = memeff.plan(shape.tokens, shape.features, shape.vocab, dtype, **options)
        rows.append(
            {
                "plan": name,
                "steps": plan.steps,
                "accumulation": plan.accumulation,
                "bytes": plan.workspace_bytes + plan.library_bytes,
                "predicted": plan.predicted_flops,
                "median_s": timings[name].median,
                "spread_s": timings[name].spread,
                "floor_s": timings["products"].median,
            }
        )
    for key, relative in (("predicted", "x_predicted"), ("median_s", "x_measured")):
        fastest = min(row[key] for row in rows)
        for row in rows:
            row[relative] = row[key] / fastest if fastest > 0 else None
    return rows


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="N,D,V; may be given several times")
    parser.add_argument("--dtype", default="float32", help="default %(default)s")
    parser.add_argument("--budgets", default="24,32,48,64", help="MiB (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH")
    options = parser.parse_args()
    warn_if_busy()
    dtype = getattr(torch, options.dtype)
    budgets = [int(size) for size in options.budgets.split(",")]
    tables = []
    for text in options.shape or ["2048,512,16384"]:
        shape = parse_shape(text)
        rows = measure(shape, dtype, budgets, options.rounds)
        print(f"\n{shape} {options.dtype}\n{'plan':16}{'MiB':>7}{'predicted':>11}{'measured':>10}"
              f"{'x floor':>9}  steps")  # fmt: skip
        for row in rows:
            predicted = "-" if row["x_predicted"] is None else f"{row['x_predicted']:.3f}"
            print(f"{row['plan']:16}{row['bytes'] / MIB:7.0f}{predicted:>11}"
                  f"{row['x_measured']:10.3f}{row['median_s'] / row['floor_s']:9.2f}"
                  f"  {row['steps']}", flush=True)  # fmt: skip
        tables.append({"shape": text, "dtype": options.dtype, "plans": rows})
    if options.json is not None:
        content = {**describe_environment(torch.get_num_threads(), "cpu"), "tables": tables}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
