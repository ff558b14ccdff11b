"""Rows for the losses: cross_entropy of logits, nll_loss of log-probabilities.

Both are memeff.linear_cross_entropy, in the dtype that torch's function returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff.functional import linear_cross_entropy
from memeff.lazy.source import is_autocast_enabled
from memeff.lazy.state import LOG_SOFTMAX, LOGITS, State
from memeff.lazy.table import row


@row("cross_entropy")
def cross_entropy(
    state: State,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if state.kind != LOGITS or size_average is not None or reduce is not None:
        return NotImplemented
    probabilities = target.shape == state.shape
    if probabilities:
        if not target.is_floating_point() or ignore_index >= 0:
            return NotImplemented
        target = target.movedim(_class_axis(state), -1)
    if not 0.0 <= label_smoothing <= 1.0 or not _fits(state, target, weight, reduction):
        return NotImplemented
    return _loss(
        state,
        torch.nn.functional.cross_entropy,
        target,
        weight=weight,
        ignore_index=None if probabilities else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@row("nll_loss")
def nll_loss(
    state: State,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    if state.kind != LOG_SOFTMAX or size_average is not None or reduce is not None:
        return NotImplemented
    if target.shape == state.shape or not _fits(state, target, weight, reduction):
        return NotImplemented
    loss = _loss(
        state,
        torch.nn.functional.nll_loss,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss * state.factor


def _class_axis(state: State) -> int:
    """Where torch's losses expect the classes: [V], [N, V], [N, V, d1, ...]."""
    return min(1, state.ndim - 1)


def _fits(state: State, target: Tensor, weight: Tensor | None, reduction: str) -> bool:
    """Whether torch and memeff take these; torch explains what is wrong with others."""
    device = state.hidden.device
    if state.source.sharded and (weight is not None or target.is_floating_point()):
        return False  # of which each rank would need its part
    if state.class_axis != _class_axis(state) or reduction not in ("mean", "sum", "none"):
        return False
    if target.device != device or (weight is not None and weight.device != device):
        return False
    if weight is not None and (weight.dtype != state.dtype or weight.shape != (state.vocab,)):
        return False
    if target.is_floating_point():
        return target.dtype == state.dtype and target.shape == (*state.lead, state.vocab)
    return target.dtype == torch.int64 and target.shape == state.lead


def _loss(state: State, function: Any, target: Tensor, **options: Any) -> Tensor:
    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            linear_bias=bias,
            weight=options["weight"],
            ignore_index=options["ignore_index"],
            reduction=options["reduction"],
            label_smoothing=options.get("label_smoothing", 0.0),
            softcap=state.softcap,
            logit_scale=state.scale,
        )

    return state.run(compute).to(_loss_dtype(state, function))


def _loss_dtype(state: State, function: Any) -> torch.dtype:
    """The dtype of torch's loss of such logits, which autocast may upcast."""
    device = state.hidden.device
    if not is_autocast_enabled(device):
        return state.dtype
    one = state.hidden.new_zeros((1, 1), dtype=state.dtype)
    loss: Tensor = function(one, torch.zeros(1, dtype=torch.int64, device=device))
    return loss.dtype
