"""PPO's clipped objective, written out token by token in float64."""

from __future__ import annotations

import torch
from loss_cases import B, T, assert_same, batch

from memeff import losses


def test_ppo() -> None:
    data = batch()
    advantages = torch.randn(B, T, dtype=torch.float64)
    ours = losses.ppo_loss(data["logprobs"], data["old"], advantages, data["mask"])
    terms = [
        -torch.minimum(r * advantages[i], r.clamp(0.8, 1.2) * advantages[i])
        for i in zip(*data["mask"].nonzero(as_tuple=True), strict=True)
        for r in [torch.exp(data["logprobs"][i] - data["old"][i])]
    ]
    assert_same(ours, sum(terms) / len(terms), data["logprobs"], data["mask"])
