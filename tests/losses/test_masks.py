"""Masked positions: whatever stands there has no effect on any loss or gradient, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memeff import losses

B, T = 4, 6
ODD = [torch.nan, torch.inf, -torch.inf, 1e30, -200.0]

# A loss and the tensors of one value per position that it takes, all differentiable.
Case = tuple[Callable[..., Tensor], tuple[str, ...]]
CASES: dict[str, Case] = {}


def case(*tensors: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES[function.__name__] = function, tensors
        return function

    return add


for _type, _level in itertools.product(
    ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"), ("token", "sequence")
):

    def grpo(
        mask: Tensor, x: Tensor, a: Tensor, old: Tensor, ref: Tensor, w: Tensor, h: Tensor,
        loss_type: str = _type, level: str = _level,
    ) -> Tensor:  # fmt: skip
        return losses.grpo_loss(
            x, a, mask, old_logprobs=old, ref_logprobs=ref, importance_weights=w, entropy=h,
            entropy_coef=0.1, beta=0.1, delta=1.4, loss_type=loss_type,
            importance_sampling_level=level,
        )  # fmt: skip

    CASES[f"grpo-{_type}-{_level}"] = grpo, ("x", "a", "old", "ref", "w", "h")

    def grpo_per_token(
        mask: Tensor, x: Tensor, a: Tensor, old: Tensor, ref: Tensor, w: Tensor,
        loss_type: str = _type, level: str = _level,
    ) -> Tensor:  # fmt: skip
        return losses.grpo_loss(
            x, a, mask, old_logprobs=old, ref_logprobs=ref, importance_weights=w, beta=0.1,
            use_bias_correction_kl=False, loss_type=loss_type, importance_sampling_level=level,
            reduction="none",
        )  # fmt: skip

    CASES[f"grpo-{_type}-{_level}-none"] = grpo_per_token, ("x", "a", "old", "ref", "w")


@case("x")
def grpo_on_policy(mask: Tensor, x: Tensor) -> Tensor:
    return losses.grpo_loss(x, torch.ones(B), mask)


@case("x", "old", "a", "h")
def ppo(mask: Tensor, x: Tensor, old: Tensor, a: Tensor, h: Tensor) -> Tensor:
    return losses.ppo_loss(x, old, a, mask, entropy=h, entropy_coef=0.3)


@case("x", "old", "a", "h")
def ppo_per_token(mask: Tensor, x: Tensor, old: Tensor, a: Tensor, h: Tensor) -> Tensor:
    options = {"entropy": h, "entropy_coef": 0.3, "reduction": "none"}
    return losses.ppo_loss(x, old, a, mask, **options)


@case("x", "ref")
def dpo(mask: Tensor, x: Tensor, ref: Tensor) -> Tensor:
    policy = losses.sequence_logprobs(x, mask).chunk(2)
    return losses.dpo_loss(*policy, *losses.sequence_logprobs(ref, mask).chunk(2), beta=0.3)


@case("x")
def simpo(mask: Tensor, x: Tensor) -> Tensor:
    return losses.simpo_loss(*losses.sequence_logprobs(x, mask, average=True).chunk(2))


@case("x")
def cpo(mask: Tensor, x: Tensor) -> Tensor:
    pair = losses.sequence_logprobs(x, mask).chunk(2)
    return losses.cpo_loss(*pair, -pair[0].mean(), label_smoothing=0.1)


@case("x")
def orpo(mask: Tensor, x: Tensor) -> Tensor:
    pair = losses.sequence_logprobs(x, mask, average=True).chunk(2)
    return losses.orpo_loss(*pair, -pair[0].mean())


@case("x", "ref")
def kto(mask: Tensor, x: Tensor, ref: Tensor) -> Tensor:
    policy, reference = losses.sequence_logprobs(x, mask), losses.sequence_logprobs(ref, mask)
    wanted = torch.tensor([True, False, False, True])
    return losses.kto_loss(
        policy, reference, wanted, kl_logprobs=policy.roll(1), ref_kl_logprobs=reference.roll(1)
    )


@case("x", "a")
def focal(mask: Tensor, x: Tensor, a: Tensor) -> Tensor:
    return losses.focal_loss(x, alpha=a, gamma=0.7, mask=mask)


@case("x", "old", "ref")
def smoothed(mask: Tensor, x: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    return losses.label_smoothed_cross_entropy(x, old, ref, mask=mask)


@case("x")
def z(mask: Tensor, x: Tensor) -> Tensor:
    return losses.z_loss(x, mask=mask)


@case("x", "ref")
def top_k(mask: Tensor, x: Tensor, ref: Tensor) -> Tensor:
    """Three classes per position."""
    weights = torch.tensor([0.5, 0.3, 0.1]).log()
    return losses.top_k_distillation_loss(
        x[..., None] + weights, ref[..., None] + weights.flip(0), mask
    )


def make(mask: Tensor, names: tuple[str, ...], odd: float | None) -> list[Tensor]:
    """Per-position tensors, with zeros or ``odd`` where the mask is zero."""
    torch.manual_seed(3)
    tensors = []
    for name in names:
        values = torch.rand(B, T) if name in ("w", "h") else -torch.rand(B, T) - 0.1
        if name == "a":
            values = torch.randn(B, T)
        values = values.masked_fill(~mask, 0.0 if odd is None else odd)
        tensors.append(values.requires_grad_())
    return tensors


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("odd", ODD)
def test_what_is_masked_has_no_effect(name: str, odd: float) -> None:
    function, tensors = CASES[name]
    mask = torch.rand(B, T) < 0.6
    mask[:, 0] = True
    mask[1] = False  # a whole sequence
    results = []
    for poison in (None, odd):
        leaves = make(mask, tensors, poison)
        loss = function(mask, *leaves)
        upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
        gradients = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
        results.append((loss.detach(), gradients))
    (clean, expected), (poisoned, found) = results
    assert clean.isfinite().all()
    assert torch.equal(poisoned, clean)
    assert any(g is not None and g.any() for g in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)
            assert not a[~mask].any()


@pytest.mark.parametrize("name", CASES)
def test_nothing_counts(name: str) -> None:
    """A batch that is masked as a whole: finite losses, no gradient, whatever it holds."""
    function, tensors = CASES[name]
    mask = torch.zeros(B, T, dtype=torch.bool)
    leaves = make(mask, tensors, torch.nan)
    loss = function(mask, *leaves)
    assert loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.sum(), leaves, allow_unused=True):
        assert gradient is None or not gradient.any()


def test_what_counts_is_seen() -> None:
    """The other way round: a nan at a position that counts is not hidden."""
    for name, (function, tensors) in CASES.items():
        for position in range(len(tensors)):
            mask = torch.ones(B, T, dtype=torch.bool)
            leaves = make(mask, tensors, None)
            leaves[position] = (
                leaves[position]
                .detach()
                .index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan))
            )
            assert function(mask, *leaves).isnan().any(), f"{name}: {tensors[position]}"


def test_advantage_of_a_masked_sequence() -> None:
    """One advantage per sequence: that of a sequence without any counted position may be nan."""
    mask = torch.rand(B, T) < 0.6
    mask[0] = True
    mask[1] = False
    for level in ("token", "sequence"):
        for advantage in (torch.nan, torch.inf, 0.0):
            advantages = torch.tensor([0.5, advantage, -1.0, 2.0], requires_grad=True)
            x = (-torch.rand(B, T)).requires_grad_()
            old = x.detach() - 0.1
            loss = losses.grpo_loss(
                x, advantages, mask, old_logprobs=old, importance_sampling_level=level,
                loss_type="grpo",
            )  # fmt: skip
            gradients = torch.autograd.grad(loss, [x, advantages])
            assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
            assert not gradients[1][1].any()
