"""Losses beyond cross entropy: peak memory and time of one step in bfloat16, against bare products.

    python benchmarks/losses.py                                    N,D,V = 4096,512,32768
    python benchmarks/losses.py --shape 2048,1024,131072 --json results.json

Each loss is a step from hidden states to both gradients, under the same memory budget. Peaks are
measured over the inputs, in processes of their own. "x floor" is the time over that of the loss's
own bare matrix products: three for linear_cross_entropy and linear_loss, which compute gradients in
their forward pass, four for what goes through linear_logprobs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memeff
from memeff.bench.environment import describe_environment, warn_if_busy
from memeff.bench.isolated import call_isolated
from memeff.bench.measure import WARM_UP
from memeff.bench.memory import PeakMemory
from memeff.bench.problem import Problem, make_problem
from memeff.bench.shapes import Shape, parse_shape
from memeff.bench.timing import gemm_floor_call, time_interleaved

MIB = 2**20
ONE_PASS = ("linear_cross_entropy", "linear_loss")
LOSSES = (*ONE_PASS, "grpo", "dr_grpo", "dapo", "cispo", "ppo", "dpo", "simpo", "orpo", "kto")
SEQUENCES = 4


def step(name: str, problem: Problem, budget: int) -> None:
    """One forward and backward pass of the loss called `name`."""
    x, w, y = problem.x, problem.w, problem.y
    if name == "linear_cross_entropy":
        loss = memeff.linear_cross_entropy(x, w, y, memory_budget=budget)
    elif name == "linear_loss":
        loss = memeff.linear_loss(
            clipped_surrogate, x, w, y, *rollout(y), reduction="sum", memory_budget=budget
        )
    else:
        shape = (SEQUENCES, len(y) // SEQUENCES)
        logprobs = memeff.linear_logprobs(
            x.view(*shape, -1), w, y.view(shape), memory_budget=budget
        )
        loss = loss_of_logprobs(name, logprobs)
    loss.backward()


def rollout(y: Tensor) -> tuple[Tensor, Tensor]:
    """Old log-probabilities and advantages [N], made up."""
    return torch.full(y.shape, -9.0, device=y.device), torch.linspace(-1, 1, len(y)).to(y.device)


def clipped_surrogate(statistics: Any, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (statistics.logprob - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def loss_of_logprobs(name: str, logprobs: Tensor) -> Tensor:
    """The loss of log-probabilities [SEQUENCES, T]; the first half of the sequences is chosen."""
    losses = memeff.losses
    mask, old = torch.ones_like(logprobs), logprobs.detach() - 0.1
    if name in ("grpo", "dr_grpo", "dapo", "cispo"):
        advantages = torch.linspace(-1, 1, SEQUENCES, device=logprobs.device)
        return losses.grpo_loss(
            logprobs,
            advantages,
            mask,
            old_logprobs=old,
            ref_logprobs=old,
            loss_type=name,
            beta=0.04,
        )
    if name == "ppo":
        return losses.ppo_loss(logprobs, old, torch.ones_like(old), mask)
    sequences = losses.sequence_logprobs(logprobs, mask, average=True)
    chosen, rejected = sequences.chunk(2)
    if name == "dpo":
        return losses.dpo_loss(chosen, rejected, chosen.detach() - 0.1, rejected.detach())
    if name == "simpo":
        return losses.simpo_loss(chosen, rejected)
    if name == "orpo":
        return losses.orpo_loss(chosen, rejected, -chosen.mean())
    return losses.kto_loss(sequences, sequences.detach() - 0.1, sequences > -9)


def peak_bytes(name: str, shape: list[int], budget: int, device: str) -> int:
    """Over the inputs, gradients included; call it in a process of its own."""
    step(name, make_problem(WARM_UP, torch.bfloat16, device=device), budget)
    problem = make_problem(Shape(*shape), torch.bfloat16, device=device)
    with PeakMemory(device) as peak:
        step(name, problem, budget)
    return peak.extra_bytes


def median_seconds(
    names: list[str], shape: Shape, budget: int, rounds: int, device: str
) -> dict[str, float]:
    """Times of one step of each loss, and of "3 products" and "4 products"."""
    problem = make_problem(shape, torch.bfloat16, device=device)
    three, one = (gemm_floor_call(problem, backward) for backward in (True, False))

    def four() -> None:
        three()
        one()

    calls = {"3 products": three, "4 products": four}
    for name in names:
        calls[name] = lambda name=name: step(name, problem, budget)
    for call in calls.values():
        call()
    candidates = {name: (call, problem.clear_gradients) for name, call in calls.items()}
    timings = time_interleaved(candidates, rounds, torch.device(device))
    return {name: timing.median for name, timing in timings.items()}


def main(arguments: list[str] | None = None) -> int:
    import losses  # by its own name: processes cannot import it as __main__

    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096,512,32768", help="N,D,V (default %(default)s)")
    parser.add_argument("--losses", default=",".join(LOSSES), help="default %(default)s")
    parser.add_argument("--budget", type=int, default=32, help="MiB (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH")
    options = parser.parse_args(arguments)
    shape, names, budget = parse_shape(options.shape), options.losses.split(","), options.budget
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        parser.error(f"--losses has {unknown[0]!r}; expected some of {', '.join(LOSSES)}")
    if shape.tokens % SEQUENCES:
        parser.error(f"--shape has {shape.tokens} tokens; expected a multiple of {SEQUENCES}")

    warn_if_busy()
    sizes = [shape.tokens, shape.features, shape.vocab]
    seconds = median_seconds(names, shape, budget * MIB, options.rounds, options.device)
    results = []
    print(f"{shape} bfloat16, memory_budget={budget} MiB\n{'loss':22}{'ms':>10}{'x floor':>9}"
          f"{'peak MiB':>10}")  # fmt: skip
    for name in names:
        floor = seconds["3 products" if name in ONE_PASS else "4 products"]
        peak = call_isolated(
            losses.peak_bytes, name=name, shape=sizes, budget=budget * MIB, device=options.device
        )
        result = {"loss": name, "median_s": seconds[name], "floor_s": floor, "peak_bytes": peak}
        results.append(result)
        print(f"{name:22}{seconds[name] * 1e3:10.1f}{seconds[name] / floor:9.2f}"
              f"{peak / MIB:10.1f}", flush=True)  # fmt: skip
    if options.json is not None:
        environment = describe_environment(torch.get_num_threads(), options.device)
        settings = {"tokens": shape.tokens, "features": shape.features, "vocab": shape.vocab,
                    "budget_bytes": budget * MIB, "rounds": options.rounds}  # fmt: skip
        content = {**environment, **settings, "losses": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
