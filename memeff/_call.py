"""One call of the op that computes the loss of N rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memeff import ops


class Settings(NamedTuple):
    """The scalar arguments of the op, checked and resolved."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    softcap: float  # 0: none
    logit_scale: float
    z_loss: float
    statistics: bool
    memory_budget: int  # bytes, -1: none given
    chunk_size: int  # tokens, 0: the planner's choice
    accum_dtype: torch.dtype | None
    skip_mass: float
    backend: str


class RowResults(NamedTuple):
    """What the op returns apart from the gradients, for N rows."""

    loss: Tensor  # [] or, without reduction, [N]
    lse: Tensor  # [N] fp64: exp(z - lse) would inherit the rounding of a large lse
    statistics: Tensor  # [4, N]: loss, target logit, entropy, max logit; or empty
    argmax: Tensor  # [N] or empty


def call_op(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    num_items: Tensor | None,
    settings: Settings,
) -> RowResults:
    """One call of the op: input [N, D], linear_weight [V, D], target [N] or [N, V]."""
    # The op computes gradients in its forward, so it must know which ones are wanted.
    grad = torch.is_grad_enabled()
    results = ops.LIBRARIES[settings.backend].linear_cross_entropy_forward(
        input,
        linear_weight,
        target,
        linear_bias,
        weight,
        token_weight,
        num_items,
        input_grad=grad and input.requires_grad,
        weight_grad=grad and linear_weight.requires_grad,
        bias_grad=grad and linear_bias is not None and linear_bias.requires_grad,
        reduction=settings.reduction,
        ignore_index=settings.ignore_index,
        label_smoothing=settings.label_smoothing,
        softcap=settings.softcap,
        logit_scale=settings.logit_scale,
        z_loss=settings.z_loss,
        statistics=settings.statistics,
        memory_budget=settings.memory_budget,
        chunk_size=settings.chunk_size,
        accum_dtype=settings.accum_dtype,
        skip_mass=settings.skip_mass,
    )
    loss, *others = results[:4]
    # The op keeps its own loss for backward, so code that writes into the loss (loss += auxiliary,
    # as transformers does) gets another tensor.
    return RowResults(loss.clone() if loss.dim() == 0 else loss, *others)
