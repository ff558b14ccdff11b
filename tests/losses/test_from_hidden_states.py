"""Losses of statistics, of chunks of logits, and of full logits: one value, one gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_cases import assert_same, heads
from torch import Tensor

import memeff
from memeff import losses


@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo"])
def test_from_hidden_states_to_gradients(kind: str) -> None:
    """The same loss by statistics, by rows of logits in chunks, and on full logits."""
    x, w, b = heads()
    ids = torch.randint(17, (3, 4))
    mask = torch.rand(3, 4) < 0.7
    advantages = torch.randn(3, dtype=torch.float64)
    old = -torch.rand(3, 4, dtype=torch.float64)

    def loss_of(logprobs: Tensor) -> Tensor:
        return losses.grpo_loss(
            logprobs, advantages, mask, old_logprobs=old, ref_logprobs=old, loss_type=kind,
            beta=0.1, epsilon_high=1.3 if kind == "cispo" else None,
        )  # fmt: skip

    def pick(z: Tensor, y: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)

    labels = ids.masked_fill(~mask, -100)
    by_statistics = loss_of(memeff.linear_logprobs(x, w, labels, linear_bias=b))
    by_rows = loss_of(memeff.chunked_linear_apply(pick, x, w, ids, linear_bias=b, chunk_size=5))
    full = loss_of(pick(F.linear(x, w, b), ids))
    for leaf in (x, w, b):
        assert_same(by_statistics, full, leaf)
        assert_same(by_rows, full, leaf)


@pytest.mark.parametrize("kind", ["focal", "smoothed", "dpo"])
def test_losses_through_statistics(kind: str) -> None:
    x, w, b = heads()
    ids = torch.randint(17, (3, 4))
    mask = torch.ones(3, 4)

    def loss_of(logprob: Tensor, lse: Tensor, mean: Tensor) -> Tensor:
        if kind == "focal":
            return losses.focal_loss(logprob).sum() + losses.z_loss(lse, coefficient=0.1).sum()
        if kind == "smoothed":
            return losses.label_smoothed_cross_entropy(logprob, lse, mean).sum()
        sequences = losses.sequence_logprobs(logprob, mask)
        return losses.dpo_loss(*sequences[:2], *sequences.detach()[1:], beta=0.3)

    statistics = memeff.linear_token_statistics(x, w, ids, linear_bias=b, softcap=None)
    assert statistics.logprob is not None
    ours = loss_of(statistics.logprob, statistics.lse, losses.mean_logit(x, w, b))
    z = F.linear(x, w, b)
    logprob = z.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    expected = loss_of(logprob, z.logsumexp(-1), z.mean(-1))
    for leaf in (x, w, b):
        assert_same(ours, expected, leaf)
