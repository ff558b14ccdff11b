"""Losses of single tokens other than the plain cross entropy. All return one value per token.

`memeff.linear_cross_entropy` has label smoothing, z-loss and class weights built in, with
gradients in the forward pass. These are for combinations that it does not know.

Each takes a ``mask``, in the shape of the tokens: whatever stands where it is zero has no effect,
and the loss there is 0. Results are float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from memeff import _checks
from memeff._operands import check_head
from memeff._options import parse_options
from memeff.losses import checks
from memeff.losses.masking import kept, wide

__all__ = ["focal_loss", "label_smoothed_cross_entropy", "mean_logit", "z_loss"]


def focal_loss(
    logprob: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """-alpha (1 - p)^gamma log p: Lin et al. 2017 (arXiv 1708.02002), eq. 4-5 for classes.

    Args:
        logprob: [...] log p of the target.
        gamma: >= 0; 0 gives the cross entropy.
        alpha: a factor >= 0, or a tensor [...] with one per token (of its class).
        mask: [...], the tokens that count; None: all.
    """
    _checks.check_floats("logprob", logprob)
    checks.check_coefficient("gamma", gamma, checks.NOT_NEGATIVE)
    checks.check_mask(mask, "logprob", logprob)
    if isinstance(alpha, Tensor):
        checks.check_like("alpha", alpha, "logprob", logprob)
        alpha = kept(wide(alpha), mask)
    else:
        checks.check_coefficient("alpha", alpha, checks.NOT_NEGATIVE)
    logprob = kept(wide(logprob), mask)
    # -expm1 keeps the digits of 1 - p near p = 1, and clamp the gradient of 0^gamma finite.
    miss = (-torch.expm1(logprob)).clamp(min=torch.finfo(logprob.dtype).tiny)
    return -alpha * miss**gamma * logprob


def label_smoothed_cross_entropy(
    logprob: Tensor,
    lse: Tensor,
    mean: Tensor,
    *,
    label_smoothing: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """(1 - eps) (-log p_y) + eps mean_v (-log p_v): Szegedy et al. 2016 (arXiv 1512.00567), sec. 7.

    Args:
        logprob, lse: [...] of the target, and log sum exp of the logits.
        mean: [...] the mean of the logits, from `mean_logit`.
        label_smoothing: eps, in [0, 1].
        mask: [...], the tokens that count; None: all.
    """
    _checks.check_floats("logprob", logprob)
    checks.check_coefficient("label_smoothing", label_smoothing, checks.FRACTION)
    checks.check_mask(mask, "logprob", logprob)
    for name, values in (("lse", lse), ("mean", mean)):
        checks.check_like(name, values, "logprob", logprob)
    logprob, lse, mean = (kept(wide(values), mask) for values in (logprob, lse, mean))
    return -(1 - label_smoothing) * logprob + label_smoothing * (lse - mean)


def mean_logit(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
) -> Tensor:
    """mean_v z_v [...] of input [..., D]: as it is linear, one product with the mean of W's rows.

    There is none with a soft cap, which is not linear.
    """
    # The logits of the other functions, which round their operands under autocast.
    input, linear_weight, linear_bias = check_head(input, linear_weight, linear_bias)
    logit_scale = parse_options(logit_scale=logit_scale).logit_scale
    dtype = torch.promote_types(input.dtype, torch.float32)
    with torch.autocast(input.device.type, enabled=False):
        row = linear_weight.mean(0, dtype=dtype)
        bias = None if linear_bias is None else linear_bias.mean(dtype=dtype).reshape(1)
        return linear(input.to(dtype), row[None], bias).squeeze(-1) * logit_scale


def z_loss(lse: Tensor, *, coefficient: float = 1e-4, mask: Tensor | None = None) -> Tensor:
    """coefficient * lse^2: keeps logits near 0. Chowdhery et al. 2022 (PaLM, arXiv 2204.02311).

    Args:
        lse: [...], log sum exp of the logits.
        coefficient: >= 0.
        mask: [...], the tokens that count; None: all.
    """
    _checks.check_floats("lse", lse)
    checks.check_coefficient("coefficient", coefficient, checks.NOT_NEGATIVE)
    checks.check_mask(mask, "lse", lse)
    return coefficient * kept(wide(lse), mask).square()
