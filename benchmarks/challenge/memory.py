"""Peak memory: standard against memeff, RL losses, and the original table with its times.

Each peak is measured in a process of its own, over the inputs, gradients included.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import memeff
from challenge.functions import Problem, cross_entropy
from challenge.report import MIB, Row, row
from memeff import MemoryEfficientLinear
from memeff.bench.isolated import call_isolated
from memeff.bench.memory import PeakMemory
from memeff.bench.timing import time_interleaved


def peak_of(variant: str, shape: list[int], budget: int, device: str) -> dict[str, float]:
    """Peak bytes over the inputs and seconds of one step; a process of its own."""
    step(variant, Problem([32, shape[1], 512], device=device), budget)  # warm-up
    p = Problem(shape, device=device)
    with PeakMemory(device) as peak:
        step(variant, p, budget)
    floor = sum(t.numel() * t.element_size() for t in p.leaves)
    return {"peak": peak.extra_bytes, "floor": floor}


def step(variant: str, p: Problem, budget: int | None) -> None:
    w, b = p.linear.weight, p.linear.bias
    tokens = len(p.x)
    lead = (4, tokens // 4)
    if variant == "standard":
        cross_entropy(p.x, p.linear, p.labels).backward()
    elif variant == "MemoryEfficientLinear":
        MemoryEfficientLinear.apply(p.x, w, p.labels, cross_entropy, b).backward()
    elif variant == "linear_cross_entropy":
        options = {"linear_bias": b, "memory_budget": budget}
        memeff.linear_cross_entropy(p.x, w, p.labels, **options).backward()
    elif variant == "linear_loss":
        old = torch.full((tokens,), -9.0, device=w.device)
        advantages = torch.linspace(-1, 1, tokens, device=w.device)
        memeff.linear_loss(
            dapo_of_tokens, p.x, w, p.labels, old, advantages, linear_bias=b, memory_budget=budget
        ).backward()
    else:
        x, y = p.x.view(*lead, -1), p.labels.view(lead)
        logprobs = memeff.linear_logprobs(x, w, y, linear_bias=b, memory_budget=budget)
        rl_loss(variant, logprobs).backward()


def dapo_of_tokens(statistics: Any, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (statistics.logprob - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def rl_loss(name: str, logprobs: Tensor) -> Tensor:
    mask = torch.ones_like(logprobs)
    old = logprobs.detach() - 0.1
    chosen = memeff.losses.sequence_logprobs(logprobs, mask, average=True)
    a, b = chosen[:2], chosen[2:]
    if name in ("grpo", "dr_grpo", "dapo", "cispo"):
        advantages = torch.linspace(-1, 1, 4, device=logprobs.device)
        return memeff.losses.grpo_loss(
            logprobs, advantages, mask, old_logprobs=old, loss_type=name, beta=0.04,
            ref_logprobs=old,
        )  # fmt: skip
    return {
        "ppo": lambda: memeff.losses.ppo_loss(logprobs, old, torch.ones_like(old), mask),
        "dpo": lambda: memeff.losses.dpo_loss(a, b, a.detach() - 0.1, b.detach()),
        "simpo": lambda: memeff.losses.simpo_loss(a, b),
        "orpo": lambda: memeff.losses.orpo_loss(a, b, -a.mean()),
        "kto": lambda: memeff.losses.kto_loss(chosen, chosen.detach() - 0.1, chosen > -9),
    }[name]()


def memory(arguments: argparse.Namespace) -> list[Row]:
    shape, budget = arguments.shape, arguments.budget * MIB
    peaks = {
        name: call_isolated(
            peak_of, variant=name, shape=shape, budget=budget, device=arguments.device
        )
        for name in ("standard", "MemoryEfficientLinear", "linear_cross_entropy")
    }
    standard = peaks["standard"]["peak"]
    rows = []
    for name in ("MemoryEfficientLinear", "linear_cross_entropy"):
        peak, gradients = peaks[name]["peak"], peaks[name]["floor"]
        cut, over = 1 - peak / standard, 1 - (peak - gradients) / (standard - gradients)
        rows.append(
            row(
                f"memory cut by {name} >= 50 % (aim 95 %)",
                cut >= 0.5,
                f"{cut:.1%} of all that a step takes: {peak / MIB:.0f} of {standard / MIB:.0f} "
                f"MiB; {over:.1%} of what it takes over the gradients, {gradients / MIB:.0f} MiB",
                cut=cut,
                cut_over_gradients=over,
            )
        )
    return rows


def rl_memory(arguments: argparse.Namespace) -> list[Row]:
    shape, budget = arguments.shape, arguments.budget * MIB
    names = ["linear_cross_entropy", "grpo", "dr_grpo", "dapo", "cispo", "ppo", "dpo", "simpo",
             "orpo", "kto", "linear_loss"]  # fmt: skip
    peaks = {
        n: call_isolated(peak_of, variant=n, shape=shape, budget=budget, device=arguments.device)
        for n in names
    }
    base = peaks.pop("linear_cross_entropy")["peak"]
    worst = max(peaks, key=lambda name: peaks[name]["peak"])
    ratio = peaks[worst]["peak"] / base
    listed = ", ".join(f"{name} {peak['peak'] / MIB:.1f}" for name, peak in peaks.items())
    return [
        row(
            "peak memory of RL losses <= 1.05 x linear_cross_entropy's, same budget",
            ratio <= 1.05,
            f"at most {ratio:.3f} x ({worst}); {base / MIB:.1f} MiB; {listed}",
            ratio=ratio,
        )
    ]


def original_table(arguments: argparse.Namespace) -> list[Row]:
    """64 x 512 tokens, D 768, V 32000, bfloat16, bias. The standard way on a T4: 3.2 s, 8.0 GiB."""
    shape = [64 * 512, 768, 32000]
    results = {}
    for name in ("standard", "MemoryEfficientLinear", "linear_cross_entropy"):
        results[name] = call_isolated(
            timed_peak, variant=name, shape=shape, budget=128 * MIB, device=arguments.device
        )
    listed = "; ".join(
        f"{name} {r['seconds']:.2f} s, {r['peak'] / 2**30:.3f} GiB" for name, r in results.items()
    )
    cut = 1 - results["MemoryEfficientLinear"]["peak"] / results["standard"]["peak"]
    return [row("the original table's shape", cut >= 0.5, listed, **results)]


def timed_peak(variant: str, shape: list[int], budget: int, device: str) -> dict[str, float]:
    """Peak of one step, then the fastest of three more."""
    measured = peak_of(variant, shape, budget, device)
    p = Problem(shape, device=device)

    def call() -> None:
        for leaf in p.leaves:
            leaf.grad = None
        step(variant, p, budget)

    times = time_interleaved({variant: (call, lambda: None)}, 3, torch.device(device))
    return {**measured, "seconds": min(times[variant].seconds)}
