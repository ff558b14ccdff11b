"""Arguments that the losses refuse: messages name argument, value, expectation and way out."""

from __future__ import annotations

import pytest
import torch
from loss_cases import T, batch, heads

import memeff
from memeff import losses


def test_argument_errors() -> None:
    data = batch()
    x = data["logprobs"]
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        losses.grpo_loss(x, data["advantages"], data["mask"], loss_type="ppo")
    with pytest.raises(ValueError, match=r"ref_logprobs is None.*beta is 0.1"):
        losses.grpo_loss(x, data["advantages"], data["mask"], beta=0.1)
    with pytest.raises(RuntimeError, match=r"advantages has shape \(9,\)"):
        losses.grpo_loss(x, torch.zeros(T), data["mask"])
    with pytest.raises(RuntimeError, match="mask has shape"):
        losses.ppo_loss(x, x, x, data["mask"][:2])
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5"):
        losses.dpo_loss(x, x, x, x, loss_type="robust", label_smoothing=0.5)
    with pytest.raises(ValueError, match="beta is 2"):
        losses.linear_distillation_loss(*heads()[:2], *heads()[:2], beta=2)
    with pytest.raises(RuntimeError, match="17 classes"):
        losses.linear_distillation_loss(*heads()[:2], heads()[0], torch.zeros(5, 6).double())
    assert memeff.losses is losses
