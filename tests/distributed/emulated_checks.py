"""Ranks that share a vocabulary, on the CUDA kernels: see test_emulated_ranks.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import emulated
import torch
from cases import OPTIONS, Case
from checks import (
    SHARDS,
    Ranks,
    bounds,
    check_budget,
    check_collectives,
    check_compile,
    check_dtensor,
    check_loss,
    check_missing_rank,
    check_reduce_dtype,
    check_top_of_all,
    check_twice,
    fault,
)
from statistics_checks import (
    check_linear_loss,
    check_losses,
    check_positions,
    check_returned_statistics,
    check_scale,
    check_token_statistics,
)
from test_skip_mass import TILE, rows

import memeff

VARIANTS = [
    ("generic,generic", torch.float32),
    ("sm90,sm90", torch.bfloat16),
    ("sm80,sm80", torch.float16),
    ("generic,generic", torch.float64),
    ("generic,generic", torch.bfloat16),
    ("sm90,generic", torch.float16),
]
# Classes of each rank, 60 in all: shards with tiles of their own, within a tile, without classes.
SIZES = ((37, 23), (7, 0, 53), (1, 30, 0, 29), (0, 60), (20, 20, 20), (15, 15, 15, 15), (60, 0))
EMULATED: dict[str, tuple[int, Callable[[Ranks], None]]] = {}  # as checks.CHECKS


def add(
    name: str, size: int, kernels: str, check: Callable[..., None], *arguments: Any, **named: Any
) -> None:
    def run(ranks: Ranks) -> None:
        os.environ["MEMEFF_CUDA_KERNELS"] = kernels
        with emulated.checked(emulated.load_built()):
            check(ranks, *arguments, backend="emulated", **named)

    name = f"emulated-{name}"
    assert name not in EMULATED, name
    EMULATED[name] = (size, run)


_PLANS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none", "class_weights": True, "ignored": 0.3},
    "none-probabilities": {"reduction": "none", "probabilities": True, "class_weights": True},
    "sum": {"reduction": "sum", "bias": True},
    "num-items": {"num_items": 91, "ignored": 0.2},
    "shift": {"lead": (2, 6), "shift": 2, "token_weight": True},
    "chunks": {"chunk_size": 4},
    "only-dx": {"differentiate": ("dx",), "bias": True},
    "only-dw": {"differentiate": ("dw",)},
    "only-db": {"differentiate": ("db",), "bias": True},
    "all-ignored": {"ignored": 2.0, "reduction": "sum"},
}
_turn = count()
for _name, _fields in {**OPTIONS, **_PLANS}.items():
    _i = next(_turn)
    _kernels, _dtype = VARIANTS[_i % len(VARIANTS)]
    _sizes = SIZES[_i % len(SIZES)]
    _case = replace(Case((9,), 16, 60, dtype=_dtype, seed=_i), **_fields)
    add(f"{_name}-{_dtype}", len(_sizes), _kernels, check_loss, _case, _sizes)
for _kernels, _dtype in VARIANTS:
    _name = f"{_kernels}-{_dtype}"
    for _reduction in ("mean", "none"):
        _case = Case((140,), 16, 60, dtype=_dtype, reduction=_reduction, ignored=0.1)
        add(f"budget-{_reduction}-{_name}", 2, _kernels, check_budget, _case, SIZES[0])
add("twice", 3, "sm90,sm90", check_twice, Case((9,), 16, 60, torch.bfloat16), SIZES[1])
add("reduce", 4, "sm90,sm90", check_reduce_dtype, torch.bfloat16, tokens=9)
add("reduce-float32", 2, "generic,generic", check_reduce_dtype, torch.float32, tokens=9)
for _size, _dtype in ((2, torch.float32), (3, torch.bfloat16)):
    _sizes = SHARDS[_size][_dtype == torch.bfloat16]
    add(f"returned-{_dtype}", _size, "sm90,sm90", check_returned_statistics, _dtype, _sizes)
    add(
        f"statistics-{_dtype}", _size, "sm90,sm90", check_token_statistics, _dtype, _sizes, 2,
        logit_sum=True, top_k=3,
    )  # fmt: skip
    add(f"linear_loss-{_dtype}", _size, "sm90,sm90", check_linear_loss, _dtype, _sizes, "mean")
    add(f"dtensor-{_dtype}", _size, "sm90,sm90", check_dtensor, _dtype, _size == 3)
add(
    "returned-probabilities", 2, "generic,generic", check_returned_statistics, torch.float32,
    SHARDS[2][0], probabilities=True,
)  # fmt: skip
add("positions", 2, "sm90,sm90", check_positions, torch.float32, SHARDS[2][0])
add("losses", 2, "generic,generic", check_losses, SHARDS[2][0])
add("scale", 3, "generic,generic", check_scale, torch.float32, True)
add("compile", 2, "generic,generic", check_compile)
add("top-of-all", 4, "generic,generic", check_top_of_all)
for _kernels, _dtype, _options in (
    ("generic,generic", torch.bfloat16, {}),
    ("sm90,sm90", torch.float16, {}),
    ("generic,generic", torch.float32, {"chunk_size": 64}),
):
    add(f"collectives-{_dtype}", 2, _kernels, check_collectives, _dtype, **_options)


def check_skip_mass(ranks: Ranks, sizes: tuple[int, ...], backend: str) -> None:
    """All mass and all targets are in the first tile of the first rank: nothing else is computed,
    by no rank, and what all of them leave out stays within the bound."""
    torch.manual_seed(5)
    x, w, y = rows("peaked")
    start, stop = bounds(sizes, ranks.rank)

    def gradients(skip_mass: float) -> tuple[torch.Tensor, ...]:
        leaf, own = x.requires_grad_(), w[start:stop].clone().requires_grad_()
        loss = memeff.linear_cross_entropy(
            leaf, own, y, reduction="sum", skip_mass=skip_mass, backend=backend,
            vocab_parallel=memeff.VocabParallel(ranks.group),
        )  # fmt: skip
        dx, dw = torch.autograd.grad(loss, (leaf, own))
        return loss.detach(), dx.double(), torch.cat(ranks.gather(dw)).double()

    (loss, dx, dw), (same, skipped_dx, skipped_dw) = gradients(0.0), gradients(1e-3)
    assert torch.equal(loss, same)
    assert (dw[TILE:] != 0).any() and (skipped_dw[TILE:] == 0).all()
    assert torch.equal(skipped_dw[:TILE], dw[:TILE])
    rounding = 2 * torch.finfo(x.dtype).eps * dx.norm(dim=1)
    largest = w.detach().double().norm(dim=1).max()
    assert ((skipped_dx - dx).norm(dim=1) <= 1e-3 * largest + rounding).all()


add("skip-mass-2", 2, "sm80,sm80", check_skip_mass, (300, 700))
add("skip-mass-3", 3, "sm90,sm90", check_skip_mass, (300, 0, 700))

# ---- faults ----

_SHAPES = (
    "input is a Float tensor with sizes {} on rank 0 and a Float tensor with sizes {} on rank 1"
)
_OTHER = {"input": torch.randn(6, 8, requires_grad=True), "target": torch.arange(6)}
for _name, _first, _second, _different in (
    ("shape", _SHAPES.format([7, 8], [6, 8]), None, _OTHER),
    ("option", "label_smoothing is 0 on rank 0 and 0.5 on rank 1", None, {"label_smoothing": 0.5}),
    (
        "own-error", "rank 1 of process group ... raised an error ...ValueError: softcap is -1",
        "ValueError: softcap is -1", {"softcap": -1.0},
    ),
    ("budget", "ValueError: memory_budget=1 bytes", None, {"memory_budget": 1}),
):  # fmt: skip
    _expected = (_first, _second or _first)
    add(f"fault-{_name}", 2, "generic,generic", fault, _expected, **_different)  # type: ignore[arg-type]


def check_target_range(ranks: Ranks, backend: str) -> None:
    """Nobody looks at targets on a GPU: NaN for this token, on every rank, and no other."""
    x, w = torch.randn(7, 8, generator=torch.Generator().manual_seed(1)), torch.randn(20, 8)
    losses = memeff.linear_cross_entropy(
        x, w, torch.tensor([1, 2, 40 * ranks.size, 3, 4, -7, 6]), reduction="none",
        vocab_parallel=memeff.VocabParallel(ranks.group), backend=backend,
    )  # fmt: skip
    assert losses.isnan().tolist() == [False, False, True, False, False, True, False]


add("fault-target-range", 2, "generic,generic", check_target_range)
add("fault-missing-rank", 2, "generic,generic", check_missing_rank)

# All processes, then three, then two: none of them waits long for others.
EMULATED = dict(sorted(EMULATED.items(), key=lambda item: -item[1][0]))
