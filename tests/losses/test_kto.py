"""KTO against its formula, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from loss_cases import B, assert_same, pairs

from memeff import losses


@pytest.mark.parametrize("divergence", [-2.0, 2.0])
def test_kto(divergence: float) -> None:
    """With an estimate of KL below 0, which counts as 0, and one above."""
    logprobs, ref, kl, ref_kl = pairs(4)
    logprobs.requires_grad_()
    kl = (ref_kl + divergence + 0.1 * (kl - ref_kl).tanh()).requires_grad_()
    desirable = torch.tensor([True, False, True, True, False])
    ours = losses.kto_loss(
        logprobs, ref, desirable, kl_logprobs=kl, ref_kl_logprobs=ref_kl, desirable_weight=1.3,
        undesirable_weight=0.7, reduction="none",
    )  # fmt: skip
    z = max(0.0, (kl - ref_kl).mean().item())
    expected = []
    for b in range(B):
        gain = logprobs[b] - ref[b] - z if desirable[b] else z - (logprobs[b] - ref[b])
        expected.append((1.3 if desirable[b] else 0.7) * (1 - 1 / (1 + torch.exp(-0.1 * gain))))
    assert_same(ours.sum(), torch.stack(expected).sum(), logprobs)
    assert torch.autograd.grad(ours.sum(), kl, allow_unused=True)[0] is None
