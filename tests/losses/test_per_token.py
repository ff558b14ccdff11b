"""Per-token forms: with their weights they add up to the whole, and linear_loss takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import B, T, assert_same, batch, heads
from torch import Tensor

import memeff
from memeff import losses

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
NORMALISERS = {"dr_grpo": {"max_completion_length": 14}, "dapo": {"num_items": 7.5}}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_times_tokens_is_the_loss(loss_type: str, level: str) -> None:
    data = batch()
    arguments = data["logprobs"], data["advantages"], data["mask"]
    options: dict[str, Any] = {
        "old_logprobs": data["old"], "ref_logprobs": data["ref"], "beta": 0.1,
        "loss_type": loss_type, "importance_sampling_level": level,
    }  # fmt: skip
    normaliser = NORMALISERS.get(loss_type, {})
    whole = losses.grpo_loss(*arguments, **options, **normaliser)
    tokens = losses.grpo_loss(*arguments, **options, reduction="none")
    weights = losses.grpo_token_weights(
        data["mask"], loss_type=loss_type, dtype=torch.float64, **normaliser
    )
    assert tokens.shape == weights.shape == (B, T)
    assert not tokens[~data["mask"]].any() and not weights[~data["mask"]].any()
    assert_same((tokens * weights).sum(), whole, data["logprobs"], data["mask"])


@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0), torch.tensor([0.0]), 1])
def test_no_items_count_as_one(num_items: Any) -> None:
    mask = torch.ones(2, 3)
    weights = losses.grpo_token_weights(mask, num_items=num_items)
    assert torch.equal(weights, mask)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_linear_loss_takes_grpo(loss_type: str, dtype: torch.dtype) -> None:
    """Gradients in the forward pass, three matrix products' work: the loss of the whole."""
    x, w, b = (t.detach().to(dtype).requires_grad_() for t in heads())
    ids, mask = torch.randint(17, (3, 4)), torch.rand(3, 4) < 0.7
    mask[0] = True
    labels = ids.masked_fill(~mask, -100)
    old, ref = (-3 - torch.rand(3, 4) for _ in range(2))
    advantages, importance = torch.randn(3), torch.rand(3, 4)
    normaliser = NORMALISERS.get(loss_type, {})
    options: dict[str, Any] = {
        "loss_type": loss_type, "beta": 0.1, "epsilon_high": 0.9, "delta": 2.5,
    }  # fmt: skip
    whole = losses.grpo_loss(
        memeff.linear_logprobs(x, w, labels, linear_bias=b), advantages, mask, old_logprobs=old,
        ref_logprobs=ref, importance_weights=importance, **options, **normaliser,
    )  # fmt: skip
    weights = losses.grpo_token_weights(mask, loss_type=loss_type, **normaliser)

    def of_token(
        s: memeff.LogitStatistics, a: Tensor, mask: Tensor, weight: Tensor, old: Tensor,
        ref: Tensor, importance: Tensor,
    ) -> Tensor:  # fmt: skip
        assert s.logprob is not None
        return weight * losses.grpo_loss(
            s.logprob, a, mask, old_logprobs=old, ref_logprobs=ref, importance_weights=importance,
            reduction="none", **options,
        )  # fmt: skip

    ours = memeff.linear_loss(
        of_token, x, w, labels, advantages[:, None].expand(3, 4), mask, weights, old, ref,
        importance, linear_bias=b, reduction="sum", chunk_size=5,
    )  # fmt: skip
    close = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
    for a, e in zip(
        torch.autograd.grad(ours, (x, w, b)), torch.autograd.grad(whole, (x, w, b)), strict=True
    ):
        torch.testing.assert_close(a, e, **close)


def test_linear_loss_takes_ppo_with_entropy() -> None:
    x, w, b = heads()
    mask = torch.rand(3, 4) < 0.7
    labels = torch.randint(17, (3, 4)).masked_fill(~mask, -100)
    old, advantages = -3 - torch.rand(3, 4).double(), torch.randn(3, 4).double()
    statistics = memeff.linear_token_statistics(x, w, labels, linear_bias=b)
    assert statistics.logprob is not None
    options: dict[str, Any] = {"entropy_coef": 0.1, "cliprange": 0.4}
    whole = losses.ppo_loss(
        statistics.logprob, old, advantages, mask, entropy=statistics.entropy, **options
    )

    def of_token(
        s: memeff.LogitStatistics, old: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        assert s.logprob is not None
        return losses.ppo_loss(
            s.logprob, old, advantages, mask, entropy=s.entropy, reduction="none", **options
        )

    ours = memeff.linear_loss(
        of_token, x, w, labels, old, advantages, mask, linear_bias=b, entropy=True, chunk_size=5
    )
    for leaf in (x, w, b):
        assert_same(ours, whole, leaf)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(loss_type: str, level: str) -> None:
    """A factor of each token's objective, and not of its KL term."""
    data = batch()
    weights = torch.rand(B, T, dtype=torch.float64) * 2
    weights[0, 0] = 0
    arguments = data["logprobs"], data["advantages"], data["mask"]
    options: dict[str, Any] = {
        "old_logprobs": data["old"], "ref_logprobs": data["ref"], "loss_type": loss_type,
        "importance_sampling_level": level, "reduction": "none",
    }  # fmt: skip
    ours = losses.grpo_loss(*arguments, beta=0.3, importance_weights=weights, **options)
    objective = losses.grpo_loss(*arguments, **options)
    kl = losses.grpo_loss(*arguments, beta=0.3, **options) - objective
    assert_same(ours.sum(), (objective * weights + kl).sum(), data["logprobs"], data["mask"])


def test_importance_weight_of_zero_switches_a_token_off() -> None:
    """Even one whose ratio overflows."""
    x = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss = losses.grpo_loss(
        x, torch.tensor([-1.0, -1.0]), torch.ones(2), old_logprobs=torch.tensor([-101.0, -1.0]),
        importance_weights=torch.tensor([0.0, 0.5]), reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.5]))
    assert torch.autograd.grad(loss.sum(), x)[0].tolist() == [0.0, 0.5]
