"""Kahneman-Tversky optimisation: Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8.

    desirable     weight * (1 - sigmoid(beta (log pi/pi_ref - KL)))
    undesirable   weight * (1 - sigmoid(beta (KL - log pi/pi_ref)))

KL is the divergence of the policy from the reference, estimated from sequences that do not belong
to their prompts, at least 0 and not differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memeff import _checks
from memeff.losses import checks
from memeff.losses.masking import reduced, wide

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
    """The loss, [] or with reduction="none" [B]; float32 or float64.

    Args:
        logprobs, ref_logprobs: [B], sums over the tokens of each sequence, under policy and
            reference.
        desirable: [B] bool.
        kl_logprobs, ref_kl_logprobs: [M], the same for mismatched pairs of prompt and completion;
            None, or M = 0, takes KL = 0.
        beta: > 0; large values keep the policy near the reference.
        desirable_weight, undesirable_weight: >= 0.
    """
    checks.check_coefficient("beta", beta, checks.POSITIVE)
    checks.check_coefficient("desirable_weight", desirable_weight, checks.NOT_NEGATIVE)
    checks.check_coefficient("undesirable_weight", undesirable_weight, checks.NOT_NEGATIVE)
    _checks.check_floats("logprobs", logprobs)
    checks.check_like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.check_labels("desirable", desirable, "logprobs", logprobs)
    for name, given, other, missing in (
        ("kl_logprobs", kl_logprobs, "ref_kl_logprobs", ref_kl_logprobs),
        ("ref_kl_logprobs", ref_kl_logprobs, "kl_logprobs", kl_logprobs),
    ):
        if given is not None and missing is None:
            raise ValueError(f"{other} is None, expected a tensor, as {name} is one")
    log_ratio = wide(logprobs) - wide(ref_logprobs)
    kl = log_ratio.new_zeros(())
    if kl_logprobs is not None and ref_kl_logprobs is not None:
        _checks.check_floats("kl_logprobs", kl_logprobs)
        checks.check_like("ref_kl_logprobs", ref_kl_logprobs, "kl_logprobs", kl_logprobs)
        total = (wide(kl_logprobs) - wide(ref_kl_logprobs)).detach().sum()
        kl = (total / max(kl_logprobs.numel(), 1)).clamp(min=0)
    gain = torch.where(desirable, log_ratio - kl, kl - log_ratio)
    values = torch.sigmoid(-beta * gain)  # 1 - sigmoid(beta gain), with all its digits
    weighted = torch.where(desirable, desirable_weight * values, undesirable_weight * values)
    return reduced(weighted, reduction)
