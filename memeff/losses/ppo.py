"""Proximal policy optimisation, clipped: Schulman et al. 2017 (arXiv 1707.06347), eq. 7.

-mean over tokens of min(r A, clip(r, 1 - epsilon, 1 + epsilon) A),    r = pi(y) / pi_old(y)
"""

from __future__ import annotations

from torch import Tensor

from memeff import _checks
from memeff.losses import checks
from memeff.losses.clipping import clipped_objective
from memeff.losses.masking import kept, masked_mean, wide, wide_dtype

__all__ = ["ppo_loss"]


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cliprange: float = 0.2,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The policy loss.

    Args:
        logprobs, old_logprobs, advantages: [B, T], or any other shape: under this policy, under the
            one that sampled, and the advantage of each token.
        mask: in the same shape, the positions that count; None: all. What the others hold has no
            effect on the loss or on any gradient.
        cliprange: epsilon.
        entropy, entropy_coef: in the same shape, and the coefficient of its mean, which is
            subtracted.
        reduction: "mean" over the positions that count, or "none": per token, 0 where masked; for
            `memeff.linear_loss`.

    Returns:
        The loss, float32 or float64.
    """
    _checks.check_choice("reduction", reduction, ("mean", "none"))
    checks.check_coefficient("cliprange", cliprange, checks.NOT_NEGATIVE)
    checks.check_coefficient("entropy_coef", entropy_coef, checks.FINITE)
    checks.check_given("entropy", entropy, "entropy_coef", entropy_coef)
    _checks.check_floats("logprobs", logprobs)
    checks.check_mask(mask, "logprobs", logprobs)
    checks.check_like("old_logprobs", old_logprobs, "logprobs", logprobs)
    checks.check_real_like("advantages", advantages, "logprobs", logprobs)
    if entropy is not None:
        checks.check_like("entropy", entropy, "logprobs", logprobs)
    dtype = wide_dtype(logprobs)
    log_ratio = kept(wide(logprobs), mask) - kept(old_logprobs.to(dtype), mask)
    advantages = kept(advantages.to(dtype), mask)
    per_token = -clipped_objective(log_ratio, advantages, cliprange, cliprange, None)
    if entropy_coef != 0 and entropy is not None:
        per_token = per_token - entropy_coef * kept(entropy.to(dtype), mask)
    return masked_mean(per_token, mask) if reduction == "mean" else per_token
