"""TRL's fused head with its own function and with memeff under it: time and memory of one step.

    python benchmarks/trl_head.py                                       N,D,V = 1024,1024,32768
    python benchmarks/trl_head.py --shape 4096,2048,128256 --json results.json

A step is log-probability and entropy of N tokens in bfloat16, and the gradients of hidden states
and weight. Times are of interleaved rounds in one process, peaks over the inputs of processes of
their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import metadata
from pathlib import Path

import torch

from memeff.bench.environment import describe_environment, warn_if_busy
from memeff.bench.isolated import call_isolated
from memeff.bench.measure import WARM_UP
from memeff.bench.memory import PeakMemory
from memeff.bench.problem import Problem, make_problem
from memeff.bench.shapes import Shape, parse_shape
from memeff.bench.timing import time_interleaved
from memeff.integrations import trl as integration

MIB = 2**20
OUTPUTS = ("log_probs", "entropy")
WAYS = ("trl", "memeff")


def step(way: str, problem: Problem) -> None:
    import trl.trainer.utils as utils

    if way == "memeff":
        integration.patch()
    else:
        integration.unpatch()
    logprob, entropy, *_ = utils._ChunkedLogProbFunction.apply(
        problem.x, problem.w, None, problem.y, 1.0, 32768, None, 1.0, OUTPUTS
    )
    (logprob - 0.01 * entropy).sum().backward()


def peak_bytes(way: str, shape: list[int]) -> int:
    """Over the inputs, gradients included; call it in a process of its own."""
    step(way, make_problem(WARM_UP, torch.bfloat16))
    problem = make_problem(Shape(*shape), torch.bfloat16)
    with PeakMemory() as peak:
        step(way, problem)
    return peak.extra_bytes


def main(arguments: list[str] | None = None) -> int:
    import trl_head  # by its own name: processes cannot import it as __main__

    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1024,1024,32768", help="N,D,V (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH")
    options = parser.parse_args(arguments)
    shape = parse_shape(options.shape)

    warn_if_busy()
    problem = make_problem(shape, torch.bfloat16)
    calls = {way: (lambda way=way: step(way, problem), problem.clear_gradients) for way in WAYS}
    for call, reset in calls.values():
        call()
        reset()
    timings = time_interleaved(calls, options.rounds, torch.device("cpu"))
    sizes = [shape.tokens, shape.features, shape.vocab]
    gradients = problem.x.nbytes + problem.w.nbytes
    results = []
    print(f"{shape} bfloat16\n{'':10}{'s':>10}{'peak MiB':>10}{'over grads':>12}")
    for way in WAYS:
        peak = call_isolated(trl_head.peak_bytes, way=way, shape=sizes)
        timing = timings[way]
        results.append(
            {"way": way, "median_s": timing.median, "seconds": timing.seconds, "peak_bytes": peak}
        )
        print(f"{way:10}{timing.median:10.3f}{peak / MIB:10.1f}{(peak - gradients) / MIB:12.1f}")
    if options.json is not None:
        content = {
            **describe_environment(torch.get_num_threads(), "cpu"),
            "trl": metadata.version("trl"),
            "tokens": shape.tokens,
            "features": shape.features,
            "vocab": shape.vocab,
            "rounds": options.rounds,
            "gradient_bytes": gradients,
            "results": results,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
