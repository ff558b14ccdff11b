"""Losses of pairs of sequences, one chosen and one rejected: DPO, ORPO, SimPO, CPO.

All take log-probabilities per sequence, [B]; see :func:`memeff.losses.sequence_logprobs`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from memeff import _checks
from memeff.losses.masking import reduced

__all__ = ["cpo_loss", "dpo_loss", "orpo_loss", "simpo_loss"]

DPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Direct preference optimisation: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    With m = log (pi/pi_ref)(chosen) - log (pi/pi_ref)(rejected):

        sigmoid   -log sigmoid(beta m)
        hinge     max(0, 1 - beta m)                    SLiC, Zhao et al. 2023 (2305.10425)
        ipo       (m - 1 / (2 beta))^2                  Azar et al. 2023 (2310.12036), eq. 17
        robust    (-(1-s) log sigmoid(beta m) + s log sigmoid(-beta m)) / (1 - 2 s)
                                                        Chowdhury et al. 2024 (2403.00409)

    Args:
        chosen, rejected: [B] under the policy; for "ipo" averages over tokens.
        ref_chosen, ref_rejected: [B] under the reference.
        label_smoothing: s, only for "robust", in [0, 0.5).
    """
    _checks.check_choice("loss_type", loss_type, DPO_LOSS_TYPES)
    if label_smoothing != 0 and (loss_type != "robust" or not 0 < label_smoothing < 0.5):
        raise ValueError(
            f"label_smoothing is {label_smoothing} with loss_type={loss_type!r}, expected 0, or a "
            'value in [0, 0.5) with "robust"'
        )
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    if loss_type == "hinge":
        losses = torch.relu(1 - beta * margin)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        s = label_smoothing
        losses = -(1 - s) * logsigmoid(beta * margin) + s * logsigmoid(-beta * margin)
        losses = losses / (1 - 2 * s)
    return reduced(losses, reduction)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """SimPO: Meng et al. 2024 (arXiv 2405.14734), eq. 6; with TRL's defaults.

        -log sigmoid(beta (chosen - rejected) - gamma)

    Args:
        chosen, rejected: [B], averages over tokens (sequence_logprobs(..., average=True)).
        gamma: target margin.
        label_smoothing: share of pairs taken to be labelled the wrong way round.
    """
    return reduced(_smoothed(beta * (chosen - rejected) - gamma, label_smoothing), reduction)


def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_nll: Tensor,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Contrastive preference optimisation: Xu et al. 2024 (arXiv 2401.08417), eq. 3-5.

        mean of -log sigmoid(beta (chosen - rejected))  +  cpo_alpha * chosen_nll

    Args:
        chosen, rejected: [B], sums over tokens.
        chosen_nll: scalar, the mean cross entropy of the chosen sequences' tokens, for example
            ``memeff.linear_cross_entropy`` of them.
    """
    pairs = _smoothed(beta * (chosen - rejected), label_smoothing).mean()
    return pairs + cpo_alpha * chosen_nll


def orpo_loss(chosen: Tensor, rejected: Tensor, chosen_nll: Tensor, *, beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimisation: Hong et al. 2024 (arXiv 2403.07691), eq. 4-7.

        chosen_nll - beta * mean of log sigmoid(log odds(chosen) - log odds(rejected)),
        odds(p) = p / (1 - p)

    Args:
        chosen, rejected: [B], averages over tokens, so that exp gives probabilities below 1.
        chosen_nll: scalar, the mean cross entropy of the chosen sequences' tokens.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return chosen_nll - beta * logsigmoid(log_odds).mean()


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    losses = -(1 - label_smoothing) * logsigmoid(margin)
    return losses - label_smoothing * logsigmoid(-margin) if label_smoothing else losses


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0; each form where it keeps its digits (and finite gradients)."""
    near = x > -0.6931471805599453
    close = torch.where(near, x, -1.0)
    far = torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(close)).log(), torch.log1p(-far.exp()))
