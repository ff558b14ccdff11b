"""What backward computes again must be what forward saw: tensors modified in between raise an
error, as torch's saved tensors do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memeff
from memeff.losses import linear_distillation_loss

N, D, V = 23, 5, 11
MESSAGE = "modified by an inplace operation|has been modified inplace"


def cross_entropy(x: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return memeff.linear_cross_entropy(x, w, y, linear_bias=b, reduction="none")


def statistics(x: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    fields = memeff.linear_token_statistics(x, w, y, linear_bias=b, logit_sum=True)
    return fields.logprob + fields.entropy * fields.logit_sum


def logprobs(x: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return memeff.linear_logprobs(x, w, y, linear_bias=b)


def linear_loss(x: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
    def loss(fields: memeff.LogitStatistics, s: Tensor) -> Tensor:
        return (fields.logprob * s).exp()

    return memeff.linear_loss(loss, x, w, y, s, linear_bias=b, reduction="none")


def chunked(recompute: bool | None, scalar: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor, y: Tensor, s: Tensor) -> Tensor:
        def loss(z: Tensor, y: Tensor, s: Tensor) -> Tensor:
            losses = F.cross_entropy(z * s[:, None], y, reduction="none")
            return losses.sum() if scalar else losses

        result = memeff.chunked_linear_apply(
            loss, x, w, y, s, linear_bias=b, recompute=recompute, chunk_size=8
        )
        assert isinstance(result, Tensor)
        return result

    return call


RECOMPUTES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "statistics": statistics,
    "logprobs": logprobs,
    "linear_loss": linear_loss,
    "chunked": chunked(True, True),
    "chunked per token": chunked(None, False),
}


def tensors() -> dict[str, Tensor]:
    return {
        "x": torch.randn(N, D, requires_grad=True),
        "w": torch.randn(V, D, requires_grad=True),
        "b": torch.randn(V, requires_grad=True),
        "y": torch.randint(V, (N,)),
        "s": torch.rand(N, requires_grad=True),
    }


def modify(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor[1:2] = 1  # through a view


@pytest.mark.parametrize("changed", ["x", "w", "b", "y", "s"])
@pytest.mark.parametrize("name", RECOMPUTES)
def test_modified_between_forward_and_backward(name: str, changed: str) -> None:
    if changed == "s" and name in ("cross_entropy", "statistics", "logprobs"):
        return  # not an argument
    given = tensors()
    result = RECOMPUTES[name](**given)
    modify(given[changed])
    with pytest.raises(RuntimeError, match=MESSAGE):
        result.sum().backward()


@pytest.mark.parametrize("name", ["chunked", "chunked per token"])
def test_modified_between_two_backwards(name: str) -> None:
    given = tensors()
    result = RECOMPUTES[name](**given).sum()
    result.backward(retain_graph=True)
    result.backward(retain_graph=True)
    modify(given["w"])
    with pytest.raises(RuntimeError, match=r"linear_weight of shape \(11, 5\).*expected version"):
        result.backward()


def test_modified_after_gradients_were_computed() -> None:
    """In forward: nothing is read again, so an optimizer may step."""
    given = tensors()
    leaves = [given["x"], given["w"], given["b"], given["s"]]
    call = chunked(None, True)
    expected = torch.autograd.grad(call(**given), leaves)
    result = call(**given)
    for leaf in leaves:
        modify(leaf)
    for a, b in zip(torch.autograd.grad(result, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_float16_distillation_computes_again() -> None:
    given = {
        name: t.detach().half() if t.is_floating_point() else t for name, t in tensors().items()
    }
    x, w = given["x"].requires_grad_(), given["w"].requires_grad_()
    teacher = torch.randn(N, D).half()
    for changed in (x, w, teacher):
        loss = linear_distillation_loss(x, w, teacher, w.detach() * 2)
        modify(changed)
        with pytest.raises(RuntimeError, match=MESSAGE):
            loss.backward()


def test_lazy_logits() -> None:
    head = torch.nn.Linear(D, V)
    memeff.patch(head)
    x, y = torch.randn(N, D), torch.randint(V, (N,))
    losses = F.cross_entropy(head(x), y, reduction="none")
    modify(head.weight)
    with pytest.raises(RuntimeError, match=MESSAGE):
        losses.sum().backward()
