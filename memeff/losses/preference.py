"""Losses of pairs of sequences, one chosen and one rejected: DPO, ORPO, SimPO, CPO.

All take log-probabilities per sequence, [B]; see `memeff.losses.sequence_logprobs`, which
leaves out what is masked. Results are float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from memeff import _checks
from memeff.losses import checks
from memeff.losses.masking import reduced, wide

__all__ = ["cpo_loss", "dpo_loss", "orpo_loss", "simpo_loss"]

DPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust")
# Shares of pairs that may be labelled the wrong way round.
_LESS_THAN_HALF = checks.Interval(0, 0.5, high_included=False)
_AT_MOST_HALF = checks.Interval(0, 0.5)


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
        beta: > 0; large values keep the policy near the reference.
        label_smoothing: s, only for "robust", in [0, 0.5).
    """
    _checks.check_choice("loss_type", loss_type, DPO_LOSS_TYPES)
    checks.check_coefficient("beta", beta, checks.POSITIVE)
    checks.check_coefficient("label_smoothing", label_smoothing, _LESS_THAN_HALF)
    if label_smoothing != 0 and loss_type != "robust":
        raise ValueError(
            f"label_smoothing is {label_smoothing} with loss_type={loss_type!r}, expected 0; "
            'loss_type="robust" takes it'
        )
    chosen, rejected = _pairs(chosen, rejected)
    ref_chosen, ref_rejected = _like(
        chosen, {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
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
        beta: > 0.
        gamma: target margin, >= 0.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5].
    """
    checks.check_coefficient("beta", beta, checks.POSITIVE)
    checks.check_coefficient("gamma", gamma, checks.NOT_NEGATIVE)
    checks.check_coefficient("label_smoothing", label_smoothing, _AT_MOST_HALF)
    chosen, rejected = _pairs(chosen, rejected)
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
        beta: > 0.
        cpo_alpha: >= 0.
        label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 0.5].
    """
    checks.check_coefficient("beta", beta, checks.POSITIVE)
    checks.check_coefficient("cpo_alpha", cpo_alpha, checks.NOT_NEGATIVE)
    checks.check_coefficient("label_smoothing", label_smoothing, _AT_MOST_HALF)
    _check_scalar("chosen_nll", chosen_nll)
    chosen, rejected = _pairs(chosen, rejected)
    pairs = _smoothed(beta * (chosen - rejected), label_smoothing).mean()
    return pairs + cpo_alpha * chosen_nll


def orpo_loss(chosen: Tensor, rejected: Tensor, chosen_nll: Tensor, *, beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimisation: Hong et al. 2024 (arXiv 2403.07691), eq. 4-7.

        chosen_nll - beta * mean of log sigmoid(log odds(chosen) - log odds(rejected)),
        odds(p) = p / (1 - p)

    Args:
        chosen, rejected: [B], averages over tokens, so that exp gives probabilities below 1. For
            one that is no less than 1 (an empty sequence, a rounding error) the largest number
            below 1 is taken, whose odds are finite.
        chosen_nll: scalar, the mean cross entropy of the chosen sequences' tokens.
        beta: >= 0.
    """
    checks.check_coefficient("beta", beta, checks.NOT_NEGATIVE)
    _check_scalar("chosen_nll", chosen_nll)
    chosen, rejected = _pairs(chosen, rejected)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return chosen_nll - beta * logsigmoid(log_odds).mean()


def _pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    _checks.check_floats("chosen", chosen)
    (other,) = _like(chosen, {"rejected": rejected})
    return wide(chosen), other


def _like(chosen: Tensor, others: dict[str, Tensor]) -> list[Tensor]:
    for name, values in others.items():
        checks.check_like(name, values, "chosen", chosen)
    return [wide(values) for values in others.values()]


def _check_scalar(name: str, value: Tensor) -> None:
    _checks.check_floats(name, value)
    if value.dim() != 0:
        raise RuntimeError(
            f"{name} has shape {tuple(value.shape)}, expected a scalar, (); .mean() gives one"
        )


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    losses = -(1 - label_smoothing) * logsigmoid(margin)
    return losses - label_smoothing * logsigmoid(-margin) if label_smoothing else losses


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0; each form where it keeps its digits (and finite gradients)."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps / 2)
    near = x > -0.6931471805599453
    close = torch.where(near, x, -1.0)
    far = torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(close)).log(), torch.log1p(-far.exp()))
