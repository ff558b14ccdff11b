"""backend="reference" where plain PyTorch is not careful: -inf classes, tokens without a target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memeff

LEAVES = tuple[Tensor, Tensor, Tensor]


def leaves_of(*positions: int, impossible: bool = False) -> LEAVES:
    x = torch.randn(9, 5, dtype=torch.float64)
    w = torch.randn(7, *positions, 5, dtype=torch.float64)
    b = torch.randn(7, *positions, dtype=torch.float64)
    if impossible:
        b[2] = b[5] = -torch.inf
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradient_of_the_entropy_with_impossible_classes(softcap: float | None) -> None:
    """Those of the kernels, and of a vocabulary without these classes."""
    x, w, b = leaves = leaves_of(impossible=softcap is None)
    possible = [0, 1, 3, 4, 6] if softcap is None else list(range(7))
    upstream = torch.rand(9, dtype=torch.float64)

    def gradients(x: Tensor, w: Tensor, b: Tensor, backend: str) -> tuple[Tensor, ...]:
        statistics = memeff.linear_token_statistics(
            x, w, linear_bias=b, softcap=softcap, backend=backend
        )
        assert statistics.entropy is not None
        return torch.autograd.grad(statistics.entropy, leaves, upstream)

    ours = gradients(x, w, b, "reference")
    for a, kernel, without in zip(
        ours, gradients(x, w, b, "auto"), gradients(x, w[possible], b[possible], "reference"),
        strict=True,
    ):  # fmt: skip
        assert a.isfinite().all()
        torch.testing.assert_close(a, kernel)
        torch.testing.assert_close(a, without)


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.2, "softcap": 2.0},
        {"reduction": "none", "z_loss": 0.1, "return_statistics": True},
        {"weight": True, "token_weight": True, "z_loss": 0.1},
    ],
    ids=str,
)
def test_ignored_tokens_are_never_looked_at(
    positions: tuple[int, ...], odd: float, options: dict[str, Any]
) -> None:
    """Hidden states and token weights that are not finite: the values and gradients of finite ones,
    and of the kernels."""
    leaves = leaves_of(*positions)
    target = torch.randint(7, (9, *positions))
    ignored = torch.tensor([0, 4, 5])
    target[ignored] = -100
    if positions:
        target[1, 0] = -100  # a token that counts elsewhere
    keywords = dict(options)
    if options.get("weight"):
        keywords["weight"] = torch.rand(7, dtype=torch.float64) + 0.1
    if options.get("token_weight"):
        keywords["token_weight"] = torch.rand(9, *positions, dtype=torch.float64)

    def step(backend: str) -> tuple[Tensor, ...]:
        x, w, b = leaves
        result = memeff.linear_cross_entropy(
            x, w, target, linear_bias=b, backend=backend, **keywords
        )
        loss, statistics = result if isinstance(result, tuple) else (result, None)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        seen = () if statistics is None else (statistics.loss, statistics.logprob)
        return loss.detach(), *seen, *torch.autograd.grad(loss, leaves, upstream)

    expected = step("reference")
    for a, b in zip(expected, step("auto"), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        leaves[0][ignored] = odd
        if "token_weight" in keywords:
            keywords["token_weight"][ignored] = odd
    for a, b in zip(step("reference"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_denominator_of_positions_is_summed_in_float64(weights: torch.dtype) -> None:
    """float64 logits and class weights of another dtype: nothing is rounded to theirs."""
    x, _, _ = leaves_of()
    w = torch.randn(7, 40, 5, dtype=torch.float64)
    target = torch.randint(7, (9, 40))
    target[3] = -100
    class_weights = (torch.rand(7) + 0.1).to(weights)
    ours = memeff.linear_cross_entropy(x, w, target, weight=class_weights)
    exact = memeff.linear_cross_entropy(
        x, w, target, weight=class_weights.double(), backend="reference"
    )
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=0)


def test_unused_class_weight_of_positions() -> None:
    """The weight of class 0, which stands in for ignored targets, is not looked at for them."""
    x, w, _ = leaves_of(3)
    target = torch.randint(1, 7, (9, 3))
    target[2] = -100
    class_weights = torch.rand(7, dtype=torch.float64) + 0.1
    expected = memeff.linear_cross_entropy(x, w, target, weight=class_weights)
    class_weights[0] = torch.nan
    for backend in ("auto", "reference"):
        ours = memeff.linear_cross_entropy(x, w, target, weight=class_weights, backend=backend)
        torch.testing.assert_close(ours, expected)
