"""Upcast, functions known and random, chunk sizes: errors against float64."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from challenge import functions
from challenge.functions import Problem
from challenge.report import Row, row
from memeff import MemoryEfficientLinear


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 1.5, leaves)]


def compare(
    function: Callable[..., Tensor], shape: list[int], chunk_size: int | None
) -> tuple[bool, str]:
    """Errors of loss, dX, dW, db against float64 (in float64, .float() keeps the upcast out).

    Passed by the rule of the tests: the standard's error plus one float32 epsilon for the loss,
    1.1 times it plus a quarter of a bfloat16 epsilon for gradients.
    """
    p = Problem(shape)
    w, b = p.linear.weight, p.linear.bias
    loss = MemoryEfficientLinear.apply(p.x, w, p.labels, function, b, "mean", chunk_size)
    ours = gradients(loss, p.leaves)
    standard = gradients(function(p.x, p.linear, p.labels), p.leaves)
    exact_leaves = [t.detach().double().requires_grad_() for t in p.leaves]

    class Exact(torch.Tensor):
        """float64 logits whose .float() is themselves."""

        def float(self) -> Tensor:  # type: ignore[override]
            return self.as_subclass(Tensor)

    def linear(hidden: Tensor) -> Tensor:
        return F.linear(hidden, *exact_leaves[1:]).as_subclass(Exact)

    exact = gradients(function(exact_leaves[0], linear, p.labels), exact_leaves)

    def errors(results: list[Tensor]) -> list[float]:
        return [
            ((a.double() - e).norm() / e.norm()).item() for a, e in zip(results, exact, strict=True)
        ]

    mine, theirs = errors(ours), errors(standard)
    allowed = [theirs[0] + 2**-23, *(1.1 * error + 2**-8 / 4 for error in theirs[1:])]
    passed = all(error <= limit for error, limit in zip(mine, allowed, strict=True))
    names = ("loss", "dX", "dW", "db")
    text = ", ".join(f"{n} {a:.1e} ({s:.1e})" for n, a, s in zip(names, mine, theirs, strict=True))
    return passed, f"errors (standard's): {text}"


def correctness(arguments: argparse.Namespace) -> list[Row]:
    shape = [300, 96, 2000]
    seen = []

    def spy(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
        logits = linear(hidden).float()
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    passed, text = compare(spy, shape, 64)
    kept = all(dtype in (torch.float32, torch.float64) for dtype in seen)
    rows = [row("float32 upcast kept", kept and passed, f"logits in float32; {text}")]
    tried = {
        "cross entropy": functions.cross_entropy,
        "focal": functions.focal,
        "MSE on logits": functions.squared_error,
        "label smoothing": functions.smoothed,
        "KL divergence": functions.divergence,
    }
    for name, function in tried.items():
        rows.append(row(f"{name} matches", *compare(function, shape, 64)))
    seeds = [random.randrange(10**6) for _ in range(5)]
    results = [compare(functions.random_function(seed), shape, 64) for seed in seeds]
    passed = all(good for good, _ in results)
    rows.append(row("gradients not hard-coded", passed, f"5 random functions, seeds {seeds}"))
    sizes = [1, 7, 97, 300, 1000]
    results = [compare(functions.cross_entropy, shape, size) for size in sizes]
    rows.append(
        row("chunk sizes are dynamic", all(good for good, _ in results), f"sizes {sizes} of 300")
    )
    return rows
