"""Losses of pairs of sequences against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import B, assert_same, batch, pairs
from torch import Tensor

from memeff import losses


def test_sequence_logprobs() -> None:
    data = batch()
    for average in (False, True):
        ours = losses.sequence_logprobs(data["logprobs"], data["mask"], average=average)
        for b in range(B):
            row = data["logprobs"][b][data["mask"][b]]
            torch.testing.assert_close(ours[b], row.sum() / (max(len(row), 1) if average else 1))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
def test_dpo(kind: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = pairs(4)
    chosen.requires_grad_()
    s = 0.1 if kind == "robust" else 0.0
    beta = 0.5
    ours = losses.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=beta, loss_type=kind, label_smoothing=s
    )
    m = (chosen - ref_chosen) - (rejected - ref_rejected)
    p = 1 / (1 + torch.exp(-beta * m))
    expected = {
        "sigmoid": -p.log(),
        "hinge": (1 - beta * m).clamp(min=0),
        "ipo": (m - 1 / (2 * beta)) ** 2,
        "robust": (-(1 - s) * p.log() + s * (1 - p).log()) / (1 - 2 * s),
    }[kind]
    assert_same(ours, expected.mean(), chosen)


def test_pairs_without_reference() -> None:
    chosen, rejected = pairs(2)
    chosen.requires_grad_()
    nll = torch.tensor(1.7, dtype=torch.float64)

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    simpo = -sigmoid(2.0 * (chosen - rejected) - 0.5).log().mean()
    assert_same(losses.simpo_loss(chosen, rejected, beta=2.0), simpo, chosen)
    smoothed = -0.9 * sigmoid(0.1 * (chosen - rejected)).log()
    smoothed = smoothed - 0.1 * sigmoid(0.1 * (rejected - chosen)).log()
    ours = losses.cpo_loss(chosen, rejected, nll, label_smoothing=0.1)
    assert_same(ours, smoothed.mean() + nll, chosen)
    p, q = chosen.exp(), rejected.exp()
    log_odds = (p / (1 - p)).log() - (q / (1 - q)).log()
    assert_same(
        losses.orpo_loss(chosen, rejected, nll), nll - 0.1 * sigmoid(log_odds).log().mean(), chosen
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_keeps_its_digits(certain: str, dtype: torch.dtype) -> None:
    """Of log(1 - p), from p nearly 1 to p nearly 0, on both sides of the switch between forms."""
    values = [-1e-7, -1e-5, -1e-3, -0.1, -0.69, -0.7, -2.0, -9.0, -30.0]
    one = torch.tensor(values, dtype=dtype, requires_grad=True)
    sides = (one, one.detach().flip(0)) if certain == "chosen" else (one.detach().flip(0), one)
    zero = torch.zeros((), dtype=dtype)
    loss = losses.orpo_loss(*sides, zero, beta=1.0)
    terms, slopes = [], []
    for chosen, rejected in zip(*(side.tolist() for side in sides), strict=True):
        odds = [p - math.log(-math.expm1(p)) for p in (chosen, rejected)]
        margin = odds[0] - odds[1]
        terms.append(math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0))
        p = chosen if certain == "chosen" else rejected
        sign = -1 if certain == "chosen" else 1
        slopes.append(sign / (1 + math.exp(margin)) / -math.expm1(p) / len(values))
    epsilon = torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=4 * epsilon)
    gradient = torch.autograd.grad(loss, one)[0].double()
    # The margin is a difference of rounded numbers of up to 30.
    torch.testing.assert_close(
        gradient, torch.tensor(slopes, dtype=torch.float64), rtol=64 * epsilon, atol=0
    )


def test_orpo_near_certainty() -> None:
    """log(1 - p) keeps its digits and its gradient where p is nearly 1, and nearly 0."""
    chosen = torch.tensor([-1e-12, -800.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1e-3, -1.0], dtype=torch.float64)
    loss = losses.orpo_loss(chosen, rejected, torch.zeros((), dtype=torch.float64))
    expected = [
        math.log(1e12) - (-1e-3 - math.log(-math.expm1(-1e-3))),
        -800 - math.log(1 / (math.e - 1)),
    ]
    by_hand = sum(0.1 * math.log1p(math.exp(-x)) if x > -30 else -0.1 * x for x in expected) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-9)
    assert torch.autograd.grad(loss, chosen)[0].isfinite().all()
