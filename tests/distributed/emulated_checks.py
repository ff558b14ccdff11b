"""Ranks that share a vocabulary, on the CUDA kernels: see tests/test_emulated_ranks.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import emulated
import torch
from cases import Case
from checks import SHARDS, Ranks
from merged_checks import check_loss
from statistics_checks import check_token_statistics

KERNELS = {
    torch.float32: "generic,generic",
    torch.float64: "generic,generic",
    torch.bfloat16: "sm90,sm90",
    torch.float16: "sm80,sm80",
}


def on_emulator(dtype: torch.dtype, check: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
    def run(ranks: Ranks) -> None:
        os.environ["MEMEFF_CUDA_KERNELS"] = KERNELS[dtype]
        with emulated.checked():
            check(ranks)

    return run


def check_losses(dtype: torch.dtype) -> Callable[[Ranks], None]:
    """Uneven shards with most options, and one rank without any class."""

    def check(ranks: Ranks) -> None:
        case = Case(
            (9,), 16, 60, dtype=dtype, bias=True, ignored=0.2, label_smoothing=0.1, softcap=8.0,
            z_loss=1e-3, token_weight=True,
        )  # fmt: skip
        check_loss(ranks, case, (37, 23), "emulated")
        check_loss(ranks, Case((5,), 16, 40, dtype=dtype, reduction="none"), (0, 40), "emulated")

    return on_emulator(dtype, check)


def check_statistics(ranks: Ranks) -> None:
    check_token_statistics(
        ranks, torch.float32, SHARDS[2][0], 2, logit_sum=True, top_k=3, backend="emulated"
    )


# As checks.CHECKS.
EMULATED: dict[str, tuple[int, Callable[[Ranks], None]]] = {
    **{f"emulated-{str(dtype)[6:]}": (2, check_losses(dtype)) for dtype in KERNELS},
    "emulated-statistics": (2, on_emulator(torch.float32, check_statistics)),
}
