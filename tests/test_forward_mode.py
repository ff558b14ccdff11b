"""Forward-mode AD: right where plain PyTorch computes, an error elsewhere, never a lost tangent.
And batches of upstream gradients (is_grads_batched), which run backward under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import memeff
from memeff.losses import linear_distillation_loss

N, D, V = 7, 3, 5
Inputs = dict[str, Any]

# What a call is made of: x [N, D], w [V, D], b [V], y [N], s [N].
CALLS: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda x, w, b, y, s: memeff.linear_cross_entropy(
        x, w, y, linear_bias=b, token_weight=s
    ),
    "cross_entropy, per token": lambda x, w, b, y, s: memeff.linear_cross_entropy(
        x, w, y, linear_bias=b, token_weight=s, reduction="none"
    ),
    "num_items": lambda x, w, b, y, s: memeff.linear_cross_entropy(
        x, w, y, linear_bias=b, num_items=s[0]
    ),
    "statistics": lambda x, w, b, y, s: memeff.linear_token_statistics(x, w, y, linear_bias=b).lse,
    "logprobs": lambda x, w, b, y, s: memeff.linear_logprobs(x, w, y, linear_bias=b) * s,
    "linear_loss": lambda x, w, b, y, s: memeff.linear_loss(
        lambda f, s: -f.logprob * s, x, w, y, s, linear_bias=b
    ),
    "linear_loss, closure": lambda x, w, b, y, s: memeff.linear_loss(
        lambda f: -f.logprob * s.sum(), x, w, y, linear_bias=b
    ),
    "chunked": lambda x, w, b, y, s: memeff.chunked_linear_apply(
        lambda z, s: (z.logsumexp(-1) * s).sum(), x, w, s, linear_bias=b
    ),
    "chunked, per token": lambda x, w, b, y, s: memeff.chunked_linear_apply(
        lambda z, s: z.logsumexp(-1) * s, x, w, s, linear_bias=b
    ),
    "chunked, closure": lambda x, w, b, y, s: memeff.chunked_linear_apply(
        lambda z: z.logsumexp(-1).sum() * s.sum(), x, w, linear_bias=b
    ),
    "MemoryEfficientLinear": lambda x, w, b, y, s: memeff.MemoryEfficientLinear.apply(
        x, w, y, lambda x, linear, y: F.cross_entropy(linear(x), y) * s.sum(), b
    ),
    "distillation": lambda x, w, b, y, s: linear_distillation_loss(
        x, w, 2 * x, w, student_bias=b, teacher_bias=b
    ) * s.sum(),
}  # fmt: skip


def inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    return {
        "x": torch.randn(N, D, dtype=dtype),
        "w": torch.randn(V, D, dtype=dtype),
        "b": torch.randn(V, dtype=dtype),
        "y": torch.randint(V, (N,)),
        "s": torch.rand(N, dtype=dtype) + 1,
    }


def difference(call: Callable[..., Tensor], given: Inputs, name: str, tangent: Tensor) -> Tensor:
    """The derivative along the tangent, from values alone."""
    step = 1e-6
    both = [call(**given | {name: given[name] + sign * step * tangent}) for sign in (1, -1)]
    return (both[0] - both[1]) / (2 * step)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("leaves", [False, True], ids=["", "require_grad"])
@pytest.mark.parametrize("name", ["x", "w", "b", "s"])
@pytest.mark.parametrize("call", CALLS)
def test_no_tangent_is_lost(call: str, name: str, leaves: bool, grad: bool) -> None:
    given = inputs()
    tangent = torch.randn_like(given[name])
    expected = difference(CALLS[call], given, name, tangent)
    if leaves:
        for other in ("x", "w", "b"):
            given[other].requires_grad_()
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        given[name] = forward_ad.make_dual(given[name], tangent)
        try:
            ours = forward_ad.unpack_dual(CALLS[call](**given)).tangent
        except NotImplementedError:
            return
    if ours is None:  # no derivative
        assert not expected.abs().max() > 1e-6
    else:
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call", ["cross_entropy", "statistics", "linear_loss", "chunked"])
def test_the_error_names_the_tensor(call: str) -> None:
    given = inputs()
    with forward_ad.dual_level():
        given["w"] = forward_ad.make_dual(given["w"], given["w"])
        with pytest.raises(NotImplementedError, match="linear_weight has a tangent"):
            CALLS[call](**given)
    with pytest.raises(NotImplementedError, match="input has a tangent"):
        torch.func.jvp(
            lambda x: CALLS[call](**given | {"x": x}), (given["x"],), (given["x"],)
        )  # fmt: skip


SECOND_ORDER: dict[str, Callable[..., Any]] = {
    "hessian": lambda loss, x, p: torch.func.hessian(lambda x: loss(x, p))(x),
    "jvp of grad": lambda loss, x, p: torch.func.jvp(
        torch.func.grad(lambda x: loss(x, p)), (x,), (x,)
    ),
    "jvp of grad, in a factor": lambda loss, x, p: torch.func.jvp(
        lambda p: torch.func.grad(lambda x: loss(x, p))(x), (p,), (p,)
    ),
}


@pytest.mark.parametrize("how", SECOND_ORDER)
@pytest.mark.parametrize("call", ["cross_entropy", "cross_entropy, per token", "statistics"])
def test_tangents_of_gradients(call: str, how: str) -> None:
    """Second derivatives by forward mode over reverse mode are an error, too."""
    given = inputs()

    def loss(x: Tensor, p: Tensor) -> Tensor:
        return (p * CALLS[call](**given | {"x": x})).sum()

    with pytest.raises(NotImplementedError, match="has a tangent"):
        SECOND_ORDER[how](loss, given["x"], torch.tensor(2.0).double())


@pytest.mark.parametrize("call", ["cross_entropy", "cross_entropy, per token", "statistics"])
def test_a_tangent_of_the_upstream_gradient(call: str) -> None:
    given = inputs()
    x = given["x"].requires_grad_()
    result = CALLS[call](**given)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(result), torch.ones_like(result))
        with pytest.raises(NotImplementedError, match="has a tangent"):
            torch.autograd.grad(result, x, upstream)


def test_the_reference_has_tangents() -> None:
    given = inputs()

    def loss(x: Tensor) -> Tensor:
        return memeff.linear_cross_entropy(x, given["w"], given["y"], backend="reference")

    tangent = torch.randn(N, D).double()
    _, ours = torch.func.jvp(loss, (given["x"],), (tangent,))
    x = given["x"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(ours, (gradient * tangent).sum())


def test_a_patched_head_computes_its_logits() -> None:
    head = nn.Linear(D, V).double()
    memeff.patch(head)
    given = inputs()
    tangent = torch.randn(N, D).double()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(given["x"], tangent)
        ours = forward_ad.unpack_dual(F.cross_entropy(head(x), given["y"])).tangent
    x = given["x"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(head(x), given["y"]), x)
    torch.testing.assert_close(ours, (gradient * tangent).sum())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [name for name in CALLS if name != "chunked, per token"])
def test_batches_of_upstream_gradients(call: str, dtype: torch.dtype) -> None:
    """As one at a time."""
    given = inputs(dtype)
    leaves = [given[name].requires_grad_() for name in ("x", "w", "b")]
    result = CALLS[call](**given)
    upstream = torch.randn(3, *result.shape).to(result.dtype)
    if dtype == torch.float16 and call in ("chunked", "chunked, closure"):
        with pytest.raises(NotImplementedError, match="is_grads_batched"):
            torch.autograd.grad(result, leaves, upstream, is_grads_batched=True)
        return
    one_by_one = [torch.autograd.grad(result, leaves, u, retain_graph=True) for u in upstream]
    batched = torch.autograd.grad(result, leaves, upstream, is_grads_batched=True)
    for i, gradient in enumerate(batched):
        expected = torch.stack([gradients[i] for gradients in one_by_one])
        # A factor that multiplies a rounded gradient rounds it again.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, expected, rtol=2 * eps, atol=eps)


def test_batches_where_logits_are_computed_again() -> None:
    given = inputs()
    given["x"].requires_grad_()
    result = CALLS["chunked, per token"](**given)
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(result, given["x"], torch.randn(3, N).double(), is_grads_batched=True)
