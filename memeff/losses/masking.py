"""Sums and means over the positions that count."""

from __future__ import annotations

import torch
from torch import Tensor

from memeff import _checks

REDUCTIONS = _checks.REDUCTIONS


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values`` with zeros where the mask is zero, whatever they hold there (nan, inf)."""
    return values if mask is None else torch.where(mask.bool(), values, 0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the positions that count; 0 if there are none."""
    if mask is None:
        return values.mean()
    return kept(values, mask).sum() / mask.bool().sum().clamp(min=1)


def check_mask(name: str, values: Tensor, mask: Tensor | None) -> None:
    if mask is not None and mask.shape != values.shape:
        raise RuntimeError(
            f"mask has shape {tuple(mask.shape)}, expected that of {name}, {tuple(values.shape)}"
        )


def reduced(values: Tensor, reduction: str) -> Tensor:
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.mean()


def sequence_logprobs(logprobs: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of each sequence, [B], from those of its tokens, [B, T].

    Args:
        logprobs: [B, T].
        mask: [B, T], the positions that count.
        average: divide by their number: the average log-probability that ORPO, SimPO and IPO use.
    """
    check_mask("logprobs", logprobs, mask)
    total = kept(logprobs, mask).sum(-1)
    return total / mask.bool().sum(-1).clamp(min=1) if average else total
