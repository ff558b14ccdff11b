"""Group relative policy optimisation and its relatives.

With r = pi(y) / pi_old(y), the ratio of a token or (GSPO) the geometric mean over its sequence, and
advantage A, the loss of a token is

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)                grpo, bnpo, dr_grpo, dapo
    -min(r, epsilon_high) A log pi(y), the factor before log constant  cispo

both times an importance weight, if there are any, and

    + beta r (pi_ref/pi - log(pi_ref/pi) - 1)      estimate of the KL divergence to a reference

where the factor r, which GRPO's paper does not have, makes the gradient of the estimate unbiased
(DeepSeek 2025, arXiv 2512.02556; TRL's default). The loss types differ in how tokens are averaged,
that is in the weight of each token in the sum (grpo_token_weights):

    grpo      mean over the tokens of each sequence, then over sequences
    bnpo      mean over the tokens of the batch
    dr_grpo   sum over tokens / (sequences * max_completion_length)
    dapo      sum over tokens / num_items, the tokens of the whole step (default: of this batch)
    cispo     as dapo

GRPO: Shao et al. 2024 (arXiv 2402.03300). Dr. GRPO: Liu et al. 2025 (2503.20783). DAPO: Yu et al.
2025 (2503.14476). GSPO: Zheng et al. 2025 (2507.18071): grpo with sequence level ratios. CISPO:
MiniMax 2025 (2506.13585). KL estimate: Schulman 2020, "Approximating KL divergence", k3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memeff import _checks
from memeff._operands import check_device
from memeff.losses import checks
from memeff.losses.clipping import clipped_objective
from memeff.losses.masking import kept, masked_mean, wide, wide_dtype

__all__ = ["grpo_loss", "grpo_token_weights"]

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
LEVELS = ("token", "sequence")


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    num_items: int | float | Tensor | None = None,
    max_completion_length: int | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss; formulas at the top of this module.

    What masked positions hold, in any argument, has no effect on the loss or on any gradient.

    Args:
        logprobs: [B, T] of the tokens that were sampled, differentiable. Per token (see
            ``reduction``) they may have any shape.
        advantages: [B], or in the shape of ``logprobs``.
        mask: [B, T], the positions that count.
        old_logprobs: [B, T] under the policy that sampled; None: this policy (ratios of 1).
        ref_logprobs: [B, T] under the reference, for ``beta`` other than 0; for example
            ``memeff.linear_logprobs(ref_hidden, ref_weight, tokens)`` under ``torch.no_grad()``.
        importance_weights: [B, T] factors >= 0 of the objective (not of the KL and entropy terms),
            for example the truncated ratio of the trainer's to the generator's probabilities.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo" or "cispo".
        importance_sampling_level: "token", or "sequence" for GSPO.
        epsilon, epsilon_high: ratios are clipped to [1 - epsilon, 1 + epsilon_high]; None:
            epsilon_high = epsilon. DAPO recommends 0.28. In cispo epsilon_high is the bound itself.
        delta: upper bound of the unclipped ratio too (two-sided clipping), or None.
        beta: coefficient of the KL term.
        use_bias_correction_kl: whether the KL term has the factor r.
        num_items: what "dapo" and "cispo" divide by; None: the positions that count here.
        max_completion_length: what "dr_grpo" divides each sequence by; None: T.
        entropy, entropy_coef: [B, T] and the coefficient of its mean, which is subtracted.
        reduction: "mean" (each loss type has its own), or "none": per token, 0 where masked, for
            ``loss = (per_token * grpo_token_weights(mask, ...)).sum()``. This is the form for
            `memeff.linear_loss`; there it is called with tokens [c] instead of [B, T], which
            "sequence" cannot do.

    Returns:
        The loss, float32 or float64.
    """
    _checks.check_choice("loss_type", loss_type, LOSS_TYPES)
    _checks.check_choice("importance_sampling_level", importance_sampling_level, LEVELS)
    _checks.check_choice("reduction", reduction, ("mean", "none"))
    high = epsilon if epsilon_high is None else epsilon_high
    checks.check_coefficient("epsilon", epsilon, checks.NOT_NEGATIVE)
    checks.check_coefficient(
        "epsilon_high", high, checks.POSITIVE if loss_type == "cispo" else checks.NOT_NEGATIVE
    )
    if delta is not None:
        checks.check_coefficient("delta", delta, checks.POSITIVE)
    checks.check_coefficient("beta", beta, checks.NOT_NEGATIVE)
    checks.check_coefficient("entropy_coef", entropy_coef, checks.FINITE)
    checks.check_given("ref_logprobs", ref_logprobs, "beta", beta)
    checks.check_given("entropy", entropy, "entropy_coef", entropy_coef)
    _check_shapes(logprobs, advantages, reduction, importance_sampling_level)
    checks.check_real_like("mask", mask, "logprobs", logprobs)
    for name, values in (
        ("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs),
        ("importance_weights", importance_weights), ("entropy", entropy),
    ):  # fmt: skip
        if values is not None:
            checks.check_like(name, values, "logprobs", logprobs)
    _checks.check_flag("use_bias_correction_kl", use_bias_correction_kl)
    if entropy_coef != 0 and reduction == "none":
        raise ValueError(
            f'entropy_coef is {entropy_coef} with reduction="none", expected 0: the mean of the '
            "entropy has another divisor than the loss; subtract it from the sum"
        )

    dtype = wide_dtype(logprobs)
    logprobs = kept(wide(logprobs), mask)
    old = logprobs.detach() if old_logprobs is None else kept(old_logprobs.to(dtype), mask)
    if advantages.dim() < logprobs.dim():
        advantages = advantages.unsqueeze(-1)
    advantages = kept(advantages.to(dtype), mask)
    if importance_weights is not None:
        advantages = advantages * kept(importance_weights.to(dtype), mask)

    log_ratio = logprobs - old
    if importance_sampling_level == "sequence":
        tokens = mask.bool().sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(-1, keepdim=True) / tokens).expand_as(logprobs)
    if loss_type == "cispo":
        per_token = -log_ratio.exp().clamp(max=high).detach() * advantages * logprobs
    else:
        per_token = -clipped_objective(log_ratio, advantages, epsilon, high, delta)
    if beta != 0 and ref_logprobs is not None:
        log_ref_ratio = kept(ref_logprobs.to(dtype), mask) - logprobs
        factor = log_ratio if use_bias_correction_kl else torch.zeros_like(log_ratio)
        per_token = per_token + beta * _kl_estimate(factor, log_ref_ratio)
    if reduction == "none":
        return per_token

    weights = grpo_token_weights(
        mask,
        loss_type=loss_type,
        num_items=num_items,
        max_completion_length=max_completion_length,
        dtype=dtype,
    )
    loss = (per_token * weights).sum()
    if entropy_coef != 0 and entropy is not None:
        loss = loss - entropy_coef * masked_mean(entropy.to(dtype), mask)
    return loss


def grpo_token_weights(
    mask: Tensor,
    *,
    loss_type: str = "dapo",
    num_items: int | float | Tensor | None = None,
    max_completion_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What the loss of each token counts in the sum that a loss type is, [B, T]; 0 where masked.

    ``(grpo_loss(..., reduction="none") * grpo_token_weights(mask, ...)).sum()`` is
    ``grpo_loss(...)``. Arguments as there.
    """
    _checks.check_choice("loss_type", loss_type, LOSS_TYPES)
    checks.check_real("mask", mask)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}, expected a floating torch.dtype")
    if mask.dim() != 2:
        raise RuntimeError(
            f"mask has shape {tuple(mask.shape)}, expected [B, T]: the weight of a token in "
            "the mean depends on its sequence"
        )
    counted = mask.bool()
    sequences, length = mask.shape
    divisor: float | Tensor
    if loss_type == "grpo":
        divisor = counted.sum(-1, keepdim=True).clamp(min=1) * max(sequences, 1)
    elif loss_type == "dr_grpo":
        tokens: float = max(length, 1)
        if max_completion_length is not None:
            expected = "a number of tokens >= 1, or None"
            tokens = float(
                _checks.check_int("max_completion_length", max_completion_length, expected, 1)
            )
        divisor = max(sequences, 1) * tokens
    else:
        items = num_items if loss_type in ("dapo", "cispo") else None
        divisor = checks.divisor_of(items, counted)
    return counted.to(dtype) / divisor


def _check_shapes(logprobs: Tensor, advantages: Tensor, reduction: str, level: str) -> None:
    _checks.check_floats("logprobs", logprobs)
    if logprobs.dim() != 2 and (reduction != "none" or level == "sequence"):
        raise RuntimeError(
            f"logprobs has shape {tuple(logprobs.shape)}, expected [B, T], sequences by positions; "
            'other shapes take reduction="none" and importance_sampling_level="token"'
        )
    checks.check_real("advantages", advantages)
    if advantages.shape not in (logprobs.shape, logprobs.shape[:-1]):
        raise RuntimeError(
            f"advantages has shape {tuple(advantages.shape)}, expected "
            f"{tuple(logprobs.shape[:-1])}, one per sequence, or {tuple(logprobs.shape)}"
        )
    check_device("advantages", advantages, logprobs, "logprobs")


def _kl_estimate(log_factor: Tensor, log_ref_ratio: Tensor) -> Tensor:
    """exp(log_factor) (exp(d) - 1 - d) for d = log_ref_ratio, k3 of Schulman with a factor.

    A policy that has all but given up a token has a large d and a small factor, whose product is
    exp(log_factor + d): neither overflows nor vanishes in between. The factor is limited to what
    the dtype holds, as infinity times an estimate of 0 is nan.
    """
    largest = math.log(torch.finfo(log_factor.dtype).max) - 1
    factor = log_factor.clamp(max=largest).exp()
    far = log_ref_ratio > 1
    near_d, far_d = log_ref_ratio.masked_fill(far, 0), log_ref_ratio.masked_fill(~far, 0)
    return torch.where(
        far,
        (log_factor + far_d).clamp(max=largest).exp() - factor * (1 + far_d),
        factor * (torch.expm1(near_d) - near_d),
    )
