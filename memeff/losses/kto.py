"""Kahneman-Tversky optimisation: Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8.

    desirable     weight * (1 - sigmoid(beta (log pi/pi_ref - KL)))
    undesirable   weight * (1 - sigmoid(beta (KL - log pi/pi_ref)))

KL is the divergence of the policy from the reference, estimated from sequences that do not belong
to their prompts, at least 0 and not differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memeff.losses.masking import reduced

__all__ = ["kto_loss"]


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl_logprobs: Tensor | None = None,
    ref_kl_logprobs: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss, [] or with reduction="none" [B].

    Args:
        logprobs, ref_logprobs: [B], sums over the tokens of each sequence, under policy and
            reference.
        desirable: [B] bool.
        kl_logprobs, ref_kl_logprobs: [M], the same for mismatched pairs of prompt and completion;
            None takes KL = 0.
    """
    if (kl_logprobs is None) != (ref_kl_logprobs is None):
        raise ValueError("kl_logprobs and ref_kl_logprobs: expected both or none of them")
    log_ratio = logprobs - ref_logprobs
    kl = log_ratio.new_zeros(())
    if kl_logprobs is not None and ref_kl_logprobs is not None:
        kl = (kl_logprobs - ref_kl_logprobs).detach().mean().clamp(min=0)
    wanted = desirable.bool()
    gain = torch.where(wanted, log_ratio - kl, kl - log_ratio)
    weight = torch.where(wanted, desirable_weight, undesirable_weight).to(gain.dtype)
    return reduced(weight * (1 - (beta * gain).sigmoid()), reduction)
