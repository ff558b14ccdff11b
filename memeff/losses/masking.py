"""Sums and means over the positions that count, and the dtype of all arithmetic.

Masks are applied to the arguments, before anything is computed of them. Masking a result would not
do: the gradient of a masked result is 0, and what lies on its way back, 0 * inf, nan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memeff import _checks
from memeff._options import REDUCTIONS
from memeff.losses import checks


def wide(values: Tensor) -> Tensor:
    """In float32, or float64 if that is what they are: exp of 12 overflows in float16."""
    return values.to(wide_dtype(values))


def wide_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values`` with zeros where the mask is zero, whatever they hold there (nan, inf)."""
    return values if mask is None else torch.where(mask.bool(), values, 0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the positions that count; 0 if there are none."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return kept(values, mask).sum() / mask.bool().sum().clamp(min=1)


def reduced(values: Tensor, reduction: str) -> Tensor:
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.mean()


def sequence_logprobs(logprobs: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of each sequence, [B], from those of its tokens, [B, T].

    Args:
        logprobs: [B, T].
        mask: [B, T], the positions that count. A sequence without any has the log-probability 0.
        average: divide by their number: the average log-probability that ORPO, SimPO and IPO use.

    Returns:
        [B], float32 or float64.
    """
    _checks.check_floats("logprobs", logprobs)
    checks.check_real_like("mask", mask, "logprobs", logprobs)
    _checks.check_flag("average", average)
    total = kept(wide(logprobs), mask).sum(-1)
    return total / mask.bool().sum(-1).clamp(min=1) if average else total
