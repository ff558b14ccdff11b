"""Proximal policy optimisation, clipped: Schulman et al. 2017 (arXiv 1707.06347), eq. 7.

-mean over tokens of min(r A, clip(r, 1 - epsilon, 1 + epsilon) A),    r = pi(y) / pi_old(y)
"""

from __future__ import annotations

import torch
from torch import Tensor

from memeff.losses.masking import check_mask, kept, masked_mean

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
) -> Tensor:
    """The scalar policy loss.

    Args:
        logprobs, old_logprobs, advantages: [B, T]: under this policy, under the one that sampled,
            and the advantage of each token.
        mask: [B, T], the positions that count; None: all.
        cliprange: epsilon.
        entropy, entropy_coef: [B, T] and the coefficient of its mean, which is subtracted.
    """
    check_mask("logprobs", logprobs, mask)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy is None, expected a tensor: entropy_coef is {entropy_coef}")
    ratio = kept(logprobs - old_logprobs, mask).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = masked_mean(-torch.min(ratio * advantages, clipped * advantages), mask)
    if entropy_coef != 0 and entropy is not None:
        loss = loss - entropy_coef * masked_mean(entropy, mask)
    return loss
