"""What is ignored is never looked at: hidden states of ignored tokens change nothing.

Every function that knows ``ignore_index``, on the CPU's backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import memeff

N, D, V = 300, 40, 500


def cross_entropy(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_cross_entropy(x, w, y)


def smoothed_in_chunks(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_cross_entropy(
        x, w, y, chunk_size=40, label_smoothing=0.1, z_loss=1e-2, reduction="sum"
    )


def with_statistics(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_cross_entropy(x, w, y, return_statistics=True)[0]


def per_token(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_cross_entropy(x, w, y, reduction="none").square().sum()


def logprobs(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_logprobs(x, w, y).square().sum()


def own_loss(s: memeff.LogitStatistics) -> Tensor:
    assert s.logprob is not None and s.entropy is not None
    return s.logprob**2 + 0.1 * s.lse**2 + 0.2 * s.entropy + 3.0


def linear_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_loss(own_loss, x, w, y, entropy=True)


def linear_loss_in_chunks(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_loss(own_loss, x, w, y, entropy=True, chunk_size=33)


def linear_loss_per_token(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return memeff.linear_loss(own_loss, x, w, y, entropy=True, reduction="none").square().sum()


def linear_loss_two_targets(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    def loss(s: memeff.LogitStatistics) -> Tensor:
        assert s.logprob is not None
        return s.logprob[:, 0] * s.logprob[:, 1] + s.lse

    return memeff.linear_loss(loss, x, w, torch.stack([y, y.where(y < 0, 7)], 1))


def statistics_of_counted_tokens(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    two = torch.stack([y, torch.where(y % 3 == 0, -100, y)], 1)
    s = memeff.linear_token_statistics(
        x, w, two, skip_ignored=True, logit_sum=True, log_sum_sq_probs=True, top_k=2
    )
    for name, field in s._asdict().items():
        assert not field[y == -100].any(), name
    assert s.logprob is not None and s.entropy is not None and s.log_sum_sq_probs is not None
    squares = s.logprob.square().sum() + s.entropy.square().sum() + s.lse.square().sum()
    # Gradients of 0, but upstream ones other than 0 at tokens that are left out.
    return squares + s.lse.sum() + s.entropy.sum() + s.log_sum_sq_probs.sum()


FUNCTIONS = [
    statistics_of_counted_tokens,
    cross_entropy, smoothed_in_chunks, with_statistics, per_token, logprobs, linear_loss,
    linear_loss_in_chunks, linear_loss_per_token, linear_loss_two_targets,
]  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("kernels", ["blas", "bf16_portable"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_hidden_states_of_ignored_tokens(
    function: Callable[..., Tensor], kernels: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", kernels)
    dtype = torch.bfloat16 if kernels == "bf16_portable" else torch.float32
    y = torch.randint(V, (N,))
    ignored = torch.rand(N) < 0.8
    ignored[:50] = ignored[-50:] = True  # whole chunks
    y[ignored] = -100
    clean = torch.randn(N, D).to(dtype)
    spoilt = clean.clone()
    spoilt[ignored] = bad
    w = (torch.randn(V, D) / 5).to(dtype).requires_grad_()
    results = []
    for x in (clean, spoilt):
        leaf = x.requires_grad_()
        loss = function(leaf, w, y)
        results.append((loss, *torch.autograd.grad(loss, [leaf, w])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    loss, dx, _ = results[1]
    assert loss.isfinite() and (dx[ignored] == 0).all() and (dx[~ignored] != 0).any()
    # As if the ignored tokens were not there, but for the order of sums.
    alone = clean.detach()[~ignored].requires_grad_()
    loss_alone = function(alone, w, y[~ignored])
    dx_alone, dw_alone = torch.autograd.grad(loss_alone, [alone, w])
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(loss, loss_alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx[~ignored], dx_alone, **tolerance)
    torch.testing.assert_close(results[1][2], dw_alone, **tolerance)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_statistics_of_ignored_tokens_are_zero(backend: str) -> None:
    x, w = torch.randn(20, D), torch.randn(V, D)
    y = torch.randint(V, (20,))
    y[::3] = -100
    _, statistics = memeff.linear_cross_entropy(x, w, y, return_statistics=True, backend=backend)
    for name, field in statistics._asdict().items():
        assert (field[::3] == 0).all(), name
    assert (statistics.entropy[1::3] > 0).all() and (statistics.lse[1::3] != 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_all_tokens_ignored(function: Callable[..., Tensor]) -> None:
    x, w = torch.full((9, D), math.nan, requires_grad=True), torch.randn(V, D, requires_grad=True)
    loss = function(x, w, torch.full((9,), -100))
    dx, dw = torch.autograd.grad(loss, [x, w])
    assert (dx == 0).all() and (dw == 0).all()


def test_per_token_tensors_of_ignored_tokens() -> None:
    """Their gradients are 0, even where fn's derivative at the zeros that it gets is infinite."""
    x, w, a = torch.randn(30, D), torch.randn(V, D, requires_grad=True), torch.rand(30)
    x.requires_grad_(), a.requires_grad_()
    y = torch.randint(V, (30,))
    y[::4] = -100
    loss = memeff.linear_loss(lambda s, a: a * (-s.logprob).sqrt(), x, w, y, a)
    dx, dw, da = torch.autograd.grad(loss, [x, w, a])
    assert all(g.isfinite().all() for g in (dx, dw, da))
    assert (da[::4] == 0).all() and (da[1::4] != 0).all()
