"""MemoryEfficientLinear: the calling convention, and every mistake of its forerunners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_as_plain
from torch import Tensor

from memeff import MemoryEfficientLinear


def upcast(logits: Tensor) -> Tensor:
    """.float(), except where the test itself is in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    logits = upcast(linear(hidden))
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def normalised_sum(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    """Works on the hidden states before it projects, and looks at the weight."""
    logits = upcast(linear(F.layer_norm(hidden, hidden.shape[-1:])))
    assert linear.weight.shape == (linear.out_features, linear.in_features)
    return (logits.logsumexp(-1) * labels.view(-1)).sum()


def mean_squared(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
    return F.mse_loss(upcast(linear(hidden)).view(labels.shape), labels)


def problem(bias: bool, labels: str = "classes") -> tuple[Tensor, torch.nn.Linear, Tensor]:
    linear = torch.nn.Linear(6, 13, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(13, (3, 7))
    y[torch.rand(3, 7) < 0.4] = -100
    return x, linear, y if labels == "classes" else torch.randn(3, 7, 13).double()


def assert_same(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected)
    for scale in (3.0, -0.5):  # no gradient of 1, and a second backward
        for a, b in zip(
            torch.autograd.grad(ours * scale, leaves, retain_graph=True),
            torch.autograd.grad(expected * scale, leaves, retain_graph=True),
            strict=True,
        ):
            assert a.abs().max() > 0  # the head trains
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 11, 21, 100, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("function", "reduction"),
    [(cross_entropy, "mean"), (normalised_sum, "sum"), (mean_squared, "mean")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_loss_and_gradients(
    function: Callable[..., Tensor], reduction: str, bias: bool, chunk_size: int | None
) -> None:
    x, linear, y = problem(bias, "floating" if function is mean_squared else "classes")
    ours = MemoryEfficientLinear.apply(
        x, linear.weight, y, function, linear.bias, reduction, chunk_size
    )
    assert_same(ours, function(x.flatten(0, 1), linear, y), [x, *linear.parameters()])


def test_each_operand_alone() -> None:
    x, linear, y = problem(True)
    for wanted in (x, linear.weight, linear.bias):
        for tensor in (x, linear.weight, linear.bias):
            tensor.requires_grad_(tensor is wanted)
        ours = MemoryEfficientLinear.apply(
            x, linear.weight, y, cross_entropy, linear.bias, "mean", 4
        )
        assert_same(ours, cross_entropy(x, linear, y), [wanted])


def test_all_labels_ignored() -> None:
    x, linear, y = problem(True)
    y.fill_(-100)
    loss = MemoryEfficientLinear.apply(x, linear.weight, y, cross_entropy, linear.bias, "mean", 4)
    assert loss.isnan()
    loss.backward()  # as a step of distributed training has to
    assert x.grad is not None and not x.grad.any() and not linear.weight.grad.any()


def test_another_ignore_index() -> None:
    x, linear, y = problem(False)
    y = y.clamp(min=0)

    def function(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            upcast(linear(hidden)).flatten(0, -2), labels.flatten(), ignore_index=0
        )

    ours = MemoryEfficientLinear.apply(x, linear.weight, y, function, None, "mean", 4, 0)
    assert_same(ours, function(x, linear, y), [x, linear.weight])


def test_bfloat16_is_not_worse_than_the_standard_way() -> None:
    x = torch.randn(256, 64).bfloat16().requires_grad_()
    w = (torch.randn(512, 64) * 0.4).bfloat16().requires_grad_()
    y = torch.randint(512, (256,))

    def standard(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        z = F.linear(x, w)
        loss = F.cross_entropy(z if z.dtype == torch.float64 else z.float(), y)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    loss = MemoryEfficientLinear.apply(x, w, y, cross_entropy, None, "mean", 100)
    assert loss.dtype == torch.float32
    ours = (loss.detach(), *torch.autograd.grad(loss, (x, w)))
    exact = standard(*(t.detach().double().requires_grad_() for t in (x, w)))
    for name, *three in zip(("loss", "dx", "dw"), ours, standard(x, w), exact, strict=True):
        assert_close_as_plain(name, *three, gradient=name != "loss")


@pytest.mark.parametrize("chunk_size", [3, 64, 1000])
def test_bfloat16_gradients_are_rounded_once(chunk_size: int) -> None:
    """However many chunks there are, and after the upstream gradient."""
    x = torch.randn(200, 64).bfloat16().requires_grad_()
    linear = torch.nn.Linear(64, 512).bfloat16()
    y = torch.randint(512, (200,))
    leaves = [x, *linear.parameters()]
    loss = MemoryEfficientLinear.apply(
        x, linear.weight, y, cross_entropy, linear.bias, "mean", chunk_size
    )
    ours = torch.autograd.grad(loss * 1.7, leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*doubles), y) * 1.7, doubles)
    for name, a, e in zip(("dx", "dw", "db"), ours, exact, strict=True):
        error, rounding = ((t.double() - e).norm() for t in (a, e.bfloat16()))
        assert error <= 1.05 * rounding, (name, error / rounding)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_parameters_that_the_function_closes_over(chunk_size: int) -> None:
    """And hidden states that do not pass through the projection only."""
    x, linear, y = problem(True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(hidden: Tensor, linear: Any, labels: Tensor) -> Tensor:
        return (linear(hidden) * scale).square().sum() + hidden.sin().sum()

    ours = MemoryEfficientLinear.apply(
        x, linear.weight, y, function, linear.bias, "sum", chunk_size
    )
    assert_same(ours, function(x, linear, y), [x, *linear.parameters(), scale])


def test_gradcheck() -> None:
    x, linear, y = problem(True)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return MemoryEfficientLinear.apply(x, w, y, cross_entropy, b, "mean", 4)

    assert torch.autograd.gradcheck(loss, [x, *linear.parameters()])


def test_autocast() -> None:
    x, linear, y = problem(True)
    x, linear = x.detach().float().requires_grad_(), linear.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = MemoryEfficientLinear.apply(
            x, linear.weight, y, cross_entropy, linear.bias, "mean", 5
        )
    assert ours.dtype == torch.float32
    gradients = torch.autograd.grad(ours, [x, *linear.parameters()])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(ours, cross_entropy(x, linear, y), rtol=0.01, atol=0.01)


def test_errors() -> None:
    x, linear, y = problem(False)
    w = linear.weight
    captured = torch.ones((), requires_grad=True) * 2
    for result in (lambda h, linear, _: linear(h), lambda h, linear, _: 3.0):
        with pytest.raises(RuntimeError, match=r"returned .*, expected a scalar"):
            MemoryEfficientLinear.apply(x, w, y, result)
    with pytest.raises(RuntimeError, match="fn closes over a result"):
        MemoryEfficientLinear.apply(
            x, w, y, lambda h, linear, _: (linear(h) * captured).sum(), None, "sum"
        )
    with pytest.raises(ValueError, match="reduction is 'none'"):
        MemoryEfficientLinear.apply(x, w, y, cross_entropy, None, "none")
    with pytest.raises(RuntimeError, match="labels has shape"):
        MemoryEfficientLinear.apply(x, w, y[:2], cross_entropy)
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor"):
        MemoryEfficientLinear.apply(x, w, y.tolist(), cross_entropy)
    with pytest.raises(RuntimeError, match=r"weight has dtype .*expected that of X"):
        MemoryEfficientLinear.apply(x, w.float(), y, cross_entropy)
    loss = MemoryEfficientLinear.apply(x, w, y, cross_entropy)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)
