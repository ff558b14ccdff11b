"""A ``logit_scale`` that is a tensor, and its gradient.

Logits are functions of s u, with u = x W^T + b, whatever follows (soft cap, temperature, loss L):

    s dL/ds = sum_nv u_nv dL/du_nv = sum_n x_n . dL/dx_n + sum_v b_v dL/db_v

So autograd has the gradient of s from those of x and b, and kernels take s as a number. Where these
are rounded to 16 bits, so is each term. An estimate, which takes the roundings for independent: an
error of an epsilon of that dtype over sqrt(N D), relative to the norm of the terms.

Of a vocabulary that ranks share a rank has some of the entries of b, and dL/dx may be its own
contribution (`reduce_input_grad=False`): what a rank sums over is then a part, and the parts add up
in the order of the ranks, so that all ranks have the same gradient of s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff._checks import DTYPES, check_tensor
from memeff._gradient_sums import row_slices
from memeff.vocab_parallel import VocabParallel, gather

__all__ = ["take_scale", "tie"]


def take_scale(given: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments with a number for ``logit_scale``, and the tensor in place of it, if there is
    one."""
    scale = given["logit_scale"]
    if not isinstance(scale, Tensor):
        return given, None
    check_tensor("logit_scale", scale)
    if scale.dim() != 0 or scale.dtype not in DTYPES:
        raise RuntimeError(
            f"logit_scale has shape {tuple(scale.shape)} and dtype {scale.dtype}, expected a "
            "number or a tensor of floats of shape (); .reshape(()) makes one of a single element"
        )
    return {**given, "logit_scale": 1.0}, scale


def tie(
    input: Tensor, linear_bias: Tensor | None, scale: Tensor | None, shared: VocabParallel | None
) -> tuple[Tensor, Tensor | None]:
    """Hidden states and bias whose gradients, on their way back, make that of ``scale``."""
    if scale is None or not scale.requires_grad or not torch.is_grad_enabled():
        return input, linear_bias
    none = ("", 1)
    ranks = none if shared is None else (shared.group_name, shared.ranks)
    whole = shared is None or shared.reduce_input_grad
    tied: Tensor = _Tied.apply(input, scale, *(none if whole else ranks))
    return tied, None if linear_bias is None else _Tied.apply(linear_bias, scale, *ranks)


class _Tied(torch.autograd.Function):
    """The tensor; sends tensor . gradient / scale to the scale, summed over the ranks of a group
    where there is one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, scale: Tensor, group_name: str, ranks: int) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.group_name, ctx.ranks = inputs[2:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensor, scale = ctx.saved_tensors
        of_scale = None
        if ctx.needs_input_grad[1]:
            total = _dot(tensor, gradient)
            if ctx.group_name:
                total = gather(total, ctx.group_name, ctx.ranks).sum(0)
            of_scale = (total.to(scale.device) / scale).to(scale.dtype)
        return gradient if ctx.needs_input_grad[0] else None, of_scale, None, None


def _dot(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Their product in float64, row by row; what has no gradient may be nan or inf."""
    rows, gradients = (t.reshape(-1, max(t.shape[-1], 1)) for t in (tensor, gradient))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    slices = row_slices(rows.shape, rows.device)
    if torch.compiler.is_compiling():  # which fuses the steps
        slices = [(0, len(rows))]
    total = rows.new_zeros((), dtype=torch.float64)
    for begin, end in slices:
        g = gradients[begin:end].to(wide)
        counted = rows[begin:end].to(wide).masked_fill(g == 0, 0)
        total = total + (counted * g).sum(dtype=torch.float64)
    return total
