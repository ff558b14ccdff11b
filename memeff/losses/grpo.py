"""Group relative policy optimisation and its relatives.

With r = pi(y) / pi_old(y), the ratio of a token or (GSPO) the geometric mean over its sequence, and
advantage A, the loss of a token is

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)                grpo, bnpo, dr_grpo, dapo
    -min(r, epsilon_high) A log pi(y), the factor before log constant  cispo

    + beta r (pi_ref/pi - log(pi_ref/pi) - 1)      estimate of the KL divergence to a reference

where the factor r, which GRPO's paper does not have, makes the gradient of the estimate unbiased
(DeepSeek 2025, arXiv 2512.02556; TRL's default). The loss types differ in how tokens are averaged:

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

import torch
from torch import Tensor

from memeff import _checks
from memeff.losses.masking import check_mask, kept, masked_mean

__all__ = ["grpo_loss"]

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
LEVELS = ("token", "sequence")


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
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
) -> Tensor:
    """The scalar loss; formulas at the top of this module.

    Args:
        logprobs: [B, T] of the tokens that were sampled, differentiable.
        advantages: [B] or [B, T].
        mask: [B, T], the positions that count.
        old_logprobs: [B, T] under the policy that sampled; None: this policy (ratios of 1).
        ref_logprobs: [B, T] under the reference, for ``beta`` other than 0; for example
            ``memeff.linear_logprobs(ref_hidden, ref_weight, tokens)`` under ``torch.no_grad()``.
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
    """
    _checks.check_choice("loss_type", loss_type, LOSS_TYPES)
    _checks.check_choice("importance_sampling_level", importance_sampling_level, LEVELS)
    check_mask("logprobs", logprobs, mask)
    if advantages.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise RuntimeError(
            f"advantages has shape {tuple(advantages.shape)}, expected {tuple(logprobs.shape[:1])} "
            f"or {tuple(logprobs.shape)}"
        )
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is None, expected a tensor: beta is {beta}")
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy is None, expected a tensor: entropy_coef is {entropy_coef}")
    counted = mask.bool()
    advantages = advantages if advantages.dim() == logprobs.dim() else advantages.unsqueeze(-1)
    high = epsilon if epsilon_high is None else epsilon_high

    # Masked positions count as ratio 1, so that no overflow there can become a nan.
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = kept(logprobs - old, counted)
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        per_token = -ratio.clamp(max=high).detach() * advantages * kept(logprobs, counted)
    else:
        clipped = ratio.clamp(1 - epsilon, 1 + high) * advantages
        unclipped = (ratio if delta is None else ratio.clamp(max=delta)) * advantages
        per_token = -torch.min(unclipped, clipped)
    if beta != 0 and ref_logprobs is not None:
        log_ref_ratio = kept(ref_logprobs - logprobs, counted)
        kl = log_ref_ratio.exp() - log_ref_ratio - 1
        per_token = per_token + beta * (kl * ratio if use_bias_correction_kl else kl)

    per_token = kept(per_token.expand(logprobs.shape), counted)
    if loss_type == "grpo":
        loss = (per_token.sum(-1) / counted.sum(-1).clamp(min=1)).mean()
    elif loss_type == "bnpo":
        loss = per_token.sum() / counted.sum().clamp(min=1)
    elif loss_type == "dr_grpo":
        length = logprobs.shape[1] if max_completion_length is None else max_completion_length
        loss = per_token.sum() / (logprobs.shape[0] * length)
    else:
        items = counted.sum().clamp(min=1) if num_items is None else num_items
        loss = per_token.sum() / items
    if entropy_coef != 0 and entropy is not None:
        loss = loss - entropy_coef * masked_mean(entropy, counted)
    return loss
