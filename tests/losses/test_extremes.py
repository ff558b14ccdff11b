"""Ratios that overflow, certainties, empty sequences: finite where the formula has a limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import B, T, pairs
from torch import Tensor

from memeff import losses
from memeff.losses.preference import _log1mexp

FAR = [50.0, 88.0, 89.0, 300.0, 1e4]


def grpo_of(log_ratio: Tensor, advantage: float, **options: Any) -> tuple[Tensor, Tensor]:
    """The per-token loss of tokens whose log-ratios are given, and its gradient."""
    x = torch.full_like(log_ratio, -1.0).requires_grad_()
    loss = losses.grpo_loss(
        x, torch.full_like(log_ratio, advantage), torch.ones_like(log_ratio),
        old_logprobs=x.detach() - log_ratio, reduction="none", **options,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("advantage", [1.5, 0.0])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_clipped_ratio_that_overflows(far: float, advantage: float, loss_type: str) -> None:
    """exp(far) is inf in float32 from 88.8 on; the clipped branch is 1.2 whatever it is."""
    loss, gradient = grpo_of(torch.tensor([far]), advantage, loss_type=loss_type, epsilon_high=0.2)
    if loss_type == "dapo":
        torch.testing.assert_close(loss, torch.tensor([-1.2 * advantage]))
        assert gradient.item() == 0
    else:
        torch.testing.assert_close(loss, torch.tensor([0.2 * advantage]))
        torch.testing.assert_close(gradient, torch.tensor([-0.2 * advantage]))
    x = torch.tensor([-1.0], requires_grad=True)
    ppo = losses.ppo_loss(x, x.detach() - far, torch.tensor([advantage]))
    torch.testing.assert_close(ppo, torch.tensor(-1.2 * advantage))
    assert torch.autograd.grad(ppo, x)[0].item() == 0


@pytest.mark.parametrize("far", FAR)
def test_two_sided_clipping_of_a_loss(far: float) -> None:
    """A negative advantage: delta bounds the ratio, and the gradient ends there."""
    loss, gradient = grpo_of(torch.tensor([far, -far]), -2.0, delta=3.0)
    torch.testing.assert_close(loss, torch.tensor([6.0, 1.6]))
    assert not gradient.any()


def test_what_is_not_clipped_is_not_hidden() -> None:
    """Without delta a negative advantage takes the ratio as it is: inf where it overflows."""
    loss, gradient = grpo_of(torch.tensor([3.0, 89.0]), -1.0)
    torch.testing.assert_close(loss, torch.tensor([math.exp(3), math.inf]))
    torch.testing.assert_close(gradient, loss)


@pytest.mark.parametrize("delta", [None, 0.5, 1.1, 5.0])
@pytest.mark.parametrize(("epsilon", "high"), [(0.2, 0.28), (0.0, 0.0), (1.0, 4.0), (1.5, 0.1)])
def test_clipping_equals_minimum_of_both_branches(
    delta: float | None, epsilon: float, high: float
) -> None:
    log_ratio = torch.linspace(-3, 3, 241, dtype=torch.float64) + 1e-3
    for advantage in (1.3, -0.7, 0.0):
        ours, gradient = grpo_of(
            log_ratio, advantage, epsilon=epsilon, epsilon_high=high, delta=delta
        )
        leaf = log_ratio.clone().requires_grad_()
        r = leaf.exp()
        first = (r if delta is None else r.clamp(max=delta)) * advantage
        expected = -torch.min(first, r.clamp(1 - epsilon, 1 + high) * advantage)
        torch.testing.assert_close(ours, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


@pytest.mark.parametrize("bias_correction", [True, False])
def test_kl_estimate_of_extremes(bias_correction: bool) -> None:
    """Against float64 (whose exponentials end at 709): large and small differences to the
    reference, with ratios that are tiny where the other factor is huge."""
    d = torch.tensor([0.0, 1e-6, -1e-6, 1e-3, 0.9, 1.1, 5.0, 80.0, 300.0, -300.0])
    logprobs = torch.tensor(-1.0) - d.clamp(min=0)  # of a policy that gives tokens up
    old = torch.full_like(d, -1.5)
    ref = logprobs + d

    def kl(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = logprobs.to(dtype).requires_grad_()
        loss = losses.grpo_loss(
            x, torch.zeros_like(x), torch.ones_like(x), old_logprobs=old.to(dtype),
            ref_logprobs=ref.to(dtype), beta=1.0, reduction="none",
            use_bias_correction_kl=bias_correction,
        )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    x64 = logprobs.double().requires_grad_()
    difference = ref.double() - x64
    exact = difference.exp() - difference - 1
    if bias_correction:
        exact = exact * (x64 - old.double()).exp()
    (gradient,) = torch.autograd.grad(exact.sum(), x64)
    for dtype in (torch.float64, torch.float32):
        value, slope = kl(dtype)
        fits = exact.abs() < 1e37 if dtype == torch.float32 else torch.ones_like(exact) > 0
        assert fits.sum() == (10 if bias_correction or dtype == torch.float64 else 9)
        torch.testing.assert_close(
            value[fits].double(), exact[fits].detach(), rtol=1e-4, atol=3e-13
        )
        torch.testing.assert_close(slope[fits].double(), gradient[fits], rtol=1e-4, atol=3e-7)
        assert not slope.isnan().any()


def test_kl_of_equal_policies_far_from_the_sampler() -> None:
    """Ratios that overflow times an estimate of 0."""
    x = torch.tensor([-1.0], requires_grad=True)
    loss = losses.grpo_loss(
        x, torch.tensor([1.0]), torch.ones(1), old_logprobs=torch.tensor([-101.0]),
        ref_logprobs=torch.tensor([-1.0]), beta=0.1, reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(loss, torch.tensor([-1.2]))
    assert torch.autograd.grad(loss.sum(), x)[0].item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """exp(12) overflows in float16, and a ratio of 1 + 2^-9 is 1 in bfloat16."""
    x = torch.tensor([[-1.0, -2.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-13.0, -2.002]], dtype=torch.float32)
    loss = losses.grpo_loss(x, torch.tensor([-1.0]), torch.ones(1, 2), old_logprobs=old)
    assert loss.dtype == torch.float32
    expected = (math.exp(12) + math.exp(-2 - old[0, 1].item())) / 2
    torch.testing.assert_close(loss.item(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss / 1000, x)
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("average", [0.0, 1e-8, -1e-9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["chosen", "rejected", "both"])
def test_orpo_with_a_certain_or_empty_sequence(
    average: float, dtype: torch.dtype, which: str
) -> None:
    """An empty sequence averages 0, rounding may give more: odds of the largest number below 1."""
    values = {name: torch.tensor([-0.5, -1.0], dtype=dtype) for name in ("chosen", "rejected")}
    for name in values:
        if which in (name, "both"):
            values[name][1] = average
        values[name].requires_grad_()
    loss = losses.orpo_loss(values["chosen"], values["rejected"], torch.zeros((), dtype=dtype))
    assert loss.isfinite() and loss <= 0.1 * 40
    for gradient in torch.autograd.grad(loss, list(values.values())):
        assert gradient.isfinite().all()
        assert gradient[0] != 0  # the other pair trains on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log1mexp(dtype: torch.dtype) -> None:
    """Digits and gradients from nearly 0 to far below: neither form would do alone."""
    from_zero = -torch.logspace(-6, 1.9, 200, dtype=torch.float64).to(dtype)
    x = from_zero.clone().requires_grad_()
    ours = _log1mexp(x)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    for value, y, slope in zip(from_zero.tolist(), ours.tolist(), gradient.tolist(), strict=True):
        exact = math.log(-math.expm1(value)) if value > -0.7 else math.log1p(-math.exp(value))
        tolerance = 8 * torch.finfo(dtype).eps
        assert y == pytest.approx(exact, rel=tolerance, abs=tolerance * 1e-30)
        assert slope == pytest.approx(1 / -math.expm1(-value), rel=tolerance)


@pytest.mark.parametrize("sign", [1, -1])
def test_kto_divergence_is_at_least_zero(sign: int) -> None:
    """KL estimates of both signs; a negative one counts as 0."""
    logprobs, ref = pairs(2)
    wanted = torch.arange(B) % 2 == 0
    kl = torch.rand(3, dtype=torch.float64) + 0.5

    def loss(z: float) -> Tensor:
        gain = torch.where(wanted, logprobs - ref - z, z - logprobs + ref)
        return (1 / (1 + torch.exp(0.1 * gain))).mean()

    ours = losses.kto_loss(
        logprobs, ref, wanted, kl_logprobs=sign * kl, ref_kl_logprobs=torch.zeros_like(kl)
    )
    torch.testing.assert_close(ours, loss(kl.mean().item() if sign > 0 else 0.0))
    assert abs(loss(0.0) - loss(-kl.mean().item())) > 1e-3
    none = losses.kto_loss(logprobs, ref, wanted, kl_logprobs=kl[:0], ref_kl_logprobs=kl[:0])
    torch.testing.assert_close(none, loss(0.0))


def test_kto_keeps_digits_of_certain_sequences() -> None:
    """1 - sigmoid(40) has none in float32."""
    x = torch.tensor([400.0], requires_grad=True)
    loss = losses.kto_loss(x, torch.zeros(1), torch.tensor([True]))
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-5)
    assert torch.autograd.grad(loss, x)[0].item() == pytest.approx(-0.1 * math.exp(-40), rel=1e-5)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_any_default_dtype(default: torch.dtype) -> None:
    """torch.set_default_dtype changes nothing: the same bits."""
    x, old, ref, a = (-torch.rand(B, T) - 0.1 for _ in range(4))
    mask = torch.rand(B, T) < 0.7
    mask[1] = False
    hidden, weight, teacher = torch.randn(B, T, 8), torch.randn(20, 8), torch.randn(20, 8)
    wanted = torch.arange(B) % 2 == 0

    def everything() -> list[Tensor]:
        y = x.clone().requires_grad_()
        h = hidden.clone().requires_grad_()
        s, r = (losses.sequence_logprobs(values, mask) for values in (y, ref))
        average = losses.sequence_logprobs(y, mask, average=True)
        results = [
            losses.grpo_loss(
                y, a, mask, old_logprobs=old, ref_logprobs=ref, beta=0.04, loss_type=kind,
                importance_sampling_level=level, importance_weights=-old, entropy=-ref,
                entropy_coef=0.013, num_items=0.3, delta=1.3,
            )
            for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
            for level in ("token", "sequence")
        ]  # fmt: skip
        results += [
            losses.ppo_loss(y, old, a, mask, entropy=-ref, entropy_coef=0.013),
            losses.dpo_loss(s, s.flip(0).detach(), r, r.flip(0), beta=0.3),
            losses.dpo_loss(s, -s, r, r, loss_type="robust", label_smoothing=0.13),
            losses.dpo_loss(s, -s, r, r, loss_type="ipo", beta=0.3),
            losses.dpo_loss(s, -s, r, r, loss_type="hinge", beta=0.3),
            losses.orpo_loss(average, average.flip(0), -average.mean(), beta=0.3),
            losses.simpo_loss(average, average.flip(0).detach(), beta=1.3, gamma=0.3),
            losses.cpo_loss(s, s.flip(0).detach(), -s.mean(), label_smoothing=0.13),
            losses.kto_loss(
                s, r, wanted, kl_logprobs=-s, ref_kl_logprobs=r, desirable_weight=1.333,
                undesirable_weight=0.777,
            ),
            losses.focal_loss(y, alpha=0.3, gamma=1.3, mask=mask).sum(),
            losses.label_smoothed_cross_entropy(y, old, ref, label_smoothing=0.13).sum(),
            losses.z_loss(y, coefficient=0.0013).sum(),
            losses.mean_logit(h, weight, logit_scale=0.3).sum(),
            losses.top_k_distillation_loss(y, ref, mask.any(1)),
            *(
                losses.linear_distillation_loss(
                    h, weight, teacher[:, :].new_zeros(B, T, 8) + 0.3, teacher, mask, beta=beta,
                    student_softcap=1.3, temperature=1.7, num_items=0.3,
                )
                for beta in (0.0, 0.3, 1.0)
            ),
        ]  # fmt: skip
        gradients = torch.autograd.grad([loss * 1.7 for loss in results], [y, h])
        return [*(loss.detach() for loss in results), *gradients]

    expected = everything()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(before)
    for position, (ours, without) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == torch.float32, position
        assert torch.equal(ours, without), position
