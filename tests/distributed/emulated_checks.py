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
    check_budget,
    check_loss,
    check_reduce_dtype,
    check_twice,
    fault,
)
from statistics_checks import (
    check_linear_loss,
    check_losses,
    check_returned_statistics,
    check_token_statistics,
)

VARIANTS = [
    ("generic,generic", torch.float32),
    ("sm90,sm90", torch.bfloat16),
    ("sm80,sm80", torch.float16),
    ("generic,generic", torch.float64),
    ("generic,generic", torch.bfloat16),
    ("sm90,generic", torch.float16),
]
# 60 classes: a shard with tiles of its own, one within a tile, one without classes.
SIZES = ((37, 23), (0, 60), (60, 0))
EMULATED: dict[str, tuple[int, Callable[[Ranks], None]]] = {}  # as checks.CHECKS


def add(name: str, kernels: str, check: Callable[..., None], *arguments: Any, **named: Any) -> None:
    def run(ranks: Ranks) -> None:
        os.environ["MEMEFF_CUDA_KERNELS"] = kernels
        with emulated.checked():
            check(ranks, *arguments, backend="emulated", **named)

    EMULATED[f"emulated-{name}"] = (2, run)


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
    _case = replace(Case((9,), 16, 60, dtype=_dtype, seed=_i), **_fields)
    add(f"{_name}-{_dtype}", _kernels, check_loss, _case, SIZES[_i % len(SIZES)])
for _kernels, _dtype in VARIANTS:
    _name = f"{_kernels}-{_dtype}"
    for _reduction in ("mean", "none"):
        _case = Case((140,), 16, 60, dtype=_dtype, reduction=_reduction, ignored=0.1)
        add(f"budget-{_reduction}-{_name}", _kernels, check_budget, _case, SIZES[0])
add("twice", "sm90,sm90", check_twice, Case((9,), 16, 60, torch.bfloat16), SIZES[0])
add("reduce", "sm90,sm90", check_reduce_dtype, torch.bfloat16, tokens=9)
add("reduce-float32", "generic,generic", check_reduce_dtype, torch.float32, tokens=9)
for _dtype in (torch.float32, torch.bfloat16):
    _sizes = SHARDS[2][_dtype == torch.bfloat16]
    add(f"returned-{_dtype}", "sm90,sm90", check_returned_statistics, _dtype, _sizes)
    add(
        f"statistics-{_dtype}", "sm90,sm90", check_token_statistics, _dtype, _sizes, 2,
        logit_sum=True, top_k=3,
    )  # fmt: skip
    add(f"linear_loss-{_dtype}", "sm90,sm90", check_linear_loss, _dtype, _sizes, "mean")
add("losses", "generic,generic", check_losses, SHARDS[2][0])

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
    add(f"fault-{_name}", "generic,generic", fault, _expected, **_different)  # type: ignore[arg-type]
