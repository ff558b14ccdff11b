"""Losses of single tokens against full logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from loss_cases import assert_same, heads

from memeff import losses


def test_classification() -> None:
    x, w, b = heads()
    y = torch.randint(17, (3, 4))
    z = 1.5 * F.linear(x, w, b)
    lse, logp = z.logsumexp(-1), z.log_softmax(-1)
    picked = logp.gather(-1, y[..., None]).squeeze(-1)
    mean = losses.mean_logit(x, w, b, logit_scale=1.5)
    torch.testing.assert_close(mean, z.mean(-1))
    ours = losses.label_smoothed_cross_entropy(picked, lse, mean, label_smoothing=0.2)
    expected = F.cross_entropy(
        z.flatten(0, 1), y.flatten(), label_smoothing=0.2, reduction="none"
    ).view(3, 4)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    for leaf in (x, w, b):
        assert_same((ours * upstream).sum(), (expected * upstream).sum(), leaf)
    p = picked.exp()
    assert_same(
        losses.focal_loss(picked, gamma=2.0, alpha=0.25).sum(),
        (-0.25 * (1 - p) ** 2 * p.log()).sum(),
        x,
    )
    torch.testing.assert_close(losses.z_loss(lse), 1e-4 * lse**2)
    certain = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # p = 1
    assert torch.autograd.grad(losses.focal_loss(certain, gamma=0.5).sum(), certain)[0].isfinite()


def test_mean_logit_inside_autocast() -> None:
    """Operands are rounded as those of the logits are; the product itself is not."""
    x, w, b = (leaf.detach().float() for leaf in heads())
    x16, w16 = x.bfloat16().double(), w.bfloat16().double()
    exact = F.linear(x16, w16, b.bfloat16().double()).mean(-1)
    with torch.autocast("cpu", torch.bfloat16):
        mean = losses.mean_logit(x, w, b)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-6)
