"""torch.autocast on the CPU: like casting input, linear_weight and linear_bias by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import memeff


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(21, 8, dtype=dtype, requires_grad=True)
    return x, w, torch.randn(21, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("positions", [False, True], ids=["K=0", "K=1"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equals_explicit_casts(
    dtype: torch.dtype, reduction: str, positions: bool, backend: str
) -> None:
    """Same loss bits and same gradients, which are float32 for float32 leaves."""
    leaves = problem()
    x, w, b = leaves
    target = torch.randint(21, (3, 5))
    if positions:
        x, w, b = x[0], w[:, None].expand(21, 2, 8), b[:, None].expand(21, 2)
        target = torch.randint(21, (5, 2))
    keywords: dict[str, Any] = {
        "weight": torch.rand(21), "reduction": reduction, "z_loss": 0.01, "backend": backend,
    }  # fmt: skip
    with torch.autocast("cpu", dtype):
        ours = memeff.linear_cross_entropy(x, w, target, linear_bias=b, **keywords)
    expected = memeff.linear_cross_entropy(
        x.to(dtype), w.to(dtype), target, linear_bias=b.to(dtype), **keywords
    )
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, leaves, upstream)
    for a, b in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_bfloat16_activations_meet_float32_weights() -> None:
    """The usual case: the layer below has run under autocast."""
    layer, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 21)
    x, target = torch.randn(4, 8), torch.randint(21, (4,))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x)
        assert hidden.dtype == torch.bfloat16
        loss = memeff.linear_cross_entropy(hidden, head.weight, target, linear_bias=head.bias)
    loss.backward()
    for parameter in (*layer.parameters(), *head.parameters()):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="linear_weight has dtype"):
        memeff.linear_cross_entropy(hidden, head.weight, target)


def test_backward_inside_of_autocast() -> None:
    leaves = problem()
    x, w, b = leaves
    target = torch.randint(21, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        loss = memeff.linear_cross_entropy(x, w, target, linear_bias=b)
        inside = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(inside, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


def test_float64_is_left_alone() -> None:
    x, w, _ = problem(torch.float64)
    target = torch.randint(21, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        ours = memeff.linear_cross_entropy(x, w, target)
    assert ours.dtype == torch.float64
    assert torch.equal(ours, memeff.linear_cross_entropy(x, w, target))


def test_disabled_autocast_casts_nothing() -> None:
    x, w, _ = problem()
    target = torch.randint(21, (3, 5))
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        ours = memeff.linear_cross_entropy(x, w, target)
    assert torch.equal(ours, memeff.linear_cross_entropy(x, w, target))


def test_class_and_token_weights_are_not_cast() -> None:
    """1 + 2^-10 is 1 in bfloat16."""
    x, w, _ = problem()
    target = torch.randint(21, (3, 5))
    fine = 1 + 2.0**-10
    with torch.autocast("cpu", torch.bfloat16):
        plain = memeff.linear_cross_entropy(x, w, target, reduction="sum")
        for weights in (
            {"weight": torch.full((21,), fine)},
            {"token_weight": torch.full((3, 5), fine)},
        ):
            weighted = memeff.linear_cross_entropy(x, w, target, reduction="sum", **weights)
            torch.testing.assert_close(weighted, plain * fine, rtol=1e-5, atol=0)


def _sum_of_losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear_cross_entropy": lambda x, w, b, y: memeff.linear_cross_entropy(
        x, w, y, linear_bias=b, return_statistics=True
    )[0],
    "LinearCrossEntropyLoss": lambda x, w, b, y: memeff.LinearCrossEntropyLoss(
        linear_weight=w, linear_bias=b
    )(x, y),
    "linear_token_statistics": lambda x, w, b, y: (
        memeff.linear_token_statistics(x, w, y, linear_bias=b, logit_sum=True).entropy
    ),
    "reference": lambda x, w, b, y: (
        memeff.linear_token_statistics(x, w, y, linear_bias=b, backend="reference").entropy
    ),
    "linear_logprobs": lambda x, w, b, y: memeff.linear_logprobs(x, w, y, linear_bias=b),
    "linear_loss": lambda x, w, b, y: memeff.linear_loss(
        lambda s: s.lse - s.logprob, x, w, y, linear_bias=b
    ),
    "linear_loss, per token": lambda x, w, b, y: memeff.linear_loss(
        lambda s: s.lse - s.logprob, x, w, y, linear_bias=b, reduction="none"
    ),
    "chunked_linear_apply": lambda x, w, b, y: memeff.chunked_linear_apply(
        _sum_of_losses, x, w, y, linear_bias=b
    ),
    "chunked_linear_apply, recompute": lambda x, w, b, y: memeff.chunked_linear_apply(
        _sum_of_losses, x, w, y, linear_bias=b, recompute=True
    ),
    "MemoryEfficientLinear": lambda x, w, b, y: memeff.MemoryEfficientLinear.apply(
        x, w, y, lambda x, linear, y: _sum_of_losses(linear(x), y), b, "sum"
    ),
    "linear_distillation_loss": lambda x, w, b, y: memeff.losses.linear_distillation_loss(
        x, w, x.detach().flip(0), w.detach().flip(0), student_bias=b, teacher_bias=b.detach()
    ),
    "mean_logit": lambda x, w, b, y: memeff.losses.mean_logit(x, w, b),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
def test_every_function_casts_as_a_linear_layer_does(name: str, hidden: torch.dtype) -> None:
    """float32 or bfloat16 hidden states, float32 weights: the same bits as of explicit casts."""
    function = FUNCTIONS[name]
    x = torch.randn(15, 8, dtype=hidden, requires_grad=True)
    leaves = (x, *problem()[1:])
    target = torch.randint(21, (15,))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(*leaves).dtype == torch.bfloat16
        ours = function(*leaves, target)
    expected = function(*(leaf.bfloat16() for leaf in leaves), target)
    assert torch.equal(ours, expected)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, leaves, upstream)
    for a, b, leaf in zip(
        found, torch.autograd.grad(expected, leaves, upstream), leaves, strict=True
    ):
        assert a.dtype == leaf.dtype and torch.equal(a, b)


def test_outside_of_the_region_nothing_is_cast() -> None:
    """Autocast is a state of the code that runs: a call outside of it is in its tensors' dtype."""
    x, w, b = problem()
    target = torch.randint(21, (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        inside = memeff.linear_cross_entropy(x, w, target, linear_bias=b)
    outside = memeff.linear_cross_entropy(x, w, target, linear_bias=b)
    assert not torch.equal(inside, outside)
    torch.testing.assert_close(
        outside, memeff.reference.linear_cross_entropy(x, w, target, linear_bias=b)
    )
