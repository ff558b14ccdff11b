"""Gradients as autograd sees them: gradcheck, repeated backwards, transforms, what is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPTIONS, op_options

import memeff

# Sums of several terms, whose gradients are not those of the parts.
GRADCHECKED = {
    name: OPTIONS[name]
    for name in (
        "plain", "smoothing_class_weights", "bias_softcap_scale", "z_loss_class_weights",
        "token_weight", "probabilities", "probabilities_all",
    )
} | {"everything": OPTIONS["everything"] | {"shift": 1}}  # fmt: skip


def problem(
    positions: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Leaves (input, linear_weight, linear_bias) and keyword arguments with the target. Options are
    fields of `cases.Case`; there is a bias and, of class indices, an ignored one in any case."""
    keywords = {name: value for name, value in options.items() if name not in ("bias", "ignored")}
    if keywords.pop("probabilities", False):
        target = torch.randn(2, 4, 5, *positions, dtype=dtype).softmax(2)
    else:
        target = torch.randint(5, (2, 4, *positions))
        target[0, 1] = keywords.get("ignore_index", -100)
    if keywords.pop("class_weights", False):
        keywords["weight"] = torch.rand(5, dtype=dtype) + 0.1
    if keywords.pop("token_weight", False):
        keywords["token_weight"] = torch.rand(2, 4, *positions, dtype=dtype) + 0.1
    leaves = (
        torch.randn(2, 4, 3, dtype=dtype, requires_grad=True),
        torch.randn(5, *positions, 3, dtype=dtype, requires_grad=True),
        torch.randn(5, *positions, dtype=dtype, requires_grad=True),
    )
    return leaves, {"target": target, **keywords}


def loss_of(
    leaves: tuple[torch.Tensor, ...], keywords: dict[str, Any], **more: Any
) -> torch.Tensor:
    x, w, b = leaves
    return memeff.linear_cross_entropy(input=x, linear_weight=w, linear_bias=b, **keywords, **more)


@pytest.mark.parametrize("options", GRADCHECKED.values(), ids=GRADCHECKED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("positions", [(), (2,)], ids=["K=0", "K=1"])
def test_gradcheck(options: dict[str, Any], reduction: str, positions: tuple[int, ...]) -> None:
    leaves, keywords = problem(positions, **options)
    assert torch.autograd.gradcheck(
        lambda *leaves: loss_of(leaves, keywords, reduction=reduction), leaves
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_second_backward_with_another_upstream_gradient(reduction: str, dtype: torch.dtype) -> None:
    leaves, keywords = problem(dtype=dtype)
    loss = loss_of(leaves, keywords, reduction=reduction)
    upstreams = [torch.randn_like(loss) for _ in range(3)]
    found = [
        torch.autograd.grad(loss, leaves, upstream, retain_graph=i < 2)
        for i, upstream in enumerate(upstreams)
    ]
    for upstream, gradients in zip(upstreams, found, strict=True):
        fresh = torch.autograd.grad(
            loss_of(leaves, keywords, reduction=reduction), leaves, upstream
        )
        for a, b in zip(gradients, fresh, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, upstreams[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_is_not_shared_between_backwards(reduction: str) -> None:
    """What the first backward stored in .grad is not changed by the second."""
    leaves, keywords = problem()
    loss = loss_of(leaves, keywords, reduction=reduction).sum()
    loss.backward(torch.tensor(2.0, dtype=loss.dtype), retain_graph=True)
    first = [leaf.grad for leaf in leaves]
    kept = [gradient.clone() for gradient in first if gradient is not None]
    for leaf in leaves:
        leaf.grad = None
    loss.backward(torch.tensor(-3.0, dtype=loss.dtype))
    for gradient, copy, leaf in zip(first, kept, leaves, strict=True):
        assert gradient is not None and leaf.grad is not None
        assert gradient.data_ptr() != leaf.grad.data_ptr()
        torch.testing.assert_close(gradient, copy, rtol=0, atol=0)
        torch.testing.assert_close(leaf.grad, -1.5 * copy)


def test_grad_accumulates_over_calls() -> None:
    leaves, keywords = problem()
    once = torch.autograd.grad(loss_of(leaves, keywords), leaves)
    for _ in range(3):
        loss_of(leaves, keywords).backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient)


def test_last_backward_needs_no_second_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """.grad is the memory in which forward put the gradient, scaled in place."""
    calls = spy_on_forward(monkeypatch)
    leaves, keywords = problem()
    loss = loss_of(leaves, keywords)
    _, results = calls.pop()
    addresses = [gradient.data_ptr() for gradient in results[5:]]  # the input was flattened
    del results
    loss.backward(torch.tensor(0.5, dtype=loss.dtype))
    assert [leaf.grad.data_ptr() for leaf in leaves[1:]] == addresses  # type: ignore[union-attr]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_used_twice_and_unused_statistics(reduction: str) -> None:
    leaves, keywords = problem()
    loss, _ = loss_of(leaves, keywords, reduction=reduction, return_statistics=True)  # type: ignore[misc]
    found = torch.autograd.grad((loss * 2 + loss.square()).sum(), leaves)
    x, w, b = leaves
    expected = F.cross_entropy(
        F.linear(x, w, b).flatten(0, 1), keywords["target"].flatten(), reduction=reduction
    )
    expected = (expected * 2 + expected.square()).sum()
    for a, b in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_func_grad(reduction: str, dtype: torch.dtype) -> None:
    leaves, keywords = problem(dtype=dtype)
    expected = torch.autograd.grad(loss_of(leaves, keywords, reduction=reduction).sum(), leaves)
    detached = tuple(leaf.detach() for leaf in leaves)
    for inputs in (detached, leaves):  # also where ordinary autograd is recording
        found = torch.func.grad(
            lambda *leaves: loss_of(leaves, keywords, reduction=reduction).sum(), argnums=(0, 1, 2)
        )(*inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    gradient, loss = torch.func.grad_and_value(
        lambda w: loss_of((detached[0], w, detached[2]), keywords, reduction=reduction).sum()
    )(detached[1])
    torch.testing.assert_close(gradient, expected[1])
    torch.testing.assert_close(loss, loss_of(leaves, keywords, reduction=reduction).sum().detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_code_may_write_into_the_loss(reduction: str, dtype: torch.dtype) -> None:
    """loss += coefficient * auxiliary, as mixtures of experts do."""
    x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(11, 8, dtype=dtype, requires_grad=True)
    y = torch.randint(11, (6,))
    kept, written = (memeff.linear_cross_entropy(x, w, y, reduction=reduction) for _ in range(2))
    written *= 3.0
    written += 1.0
    expected = torch.autograd.grad((3.0 * kept + 1.0).sum(), (x, w))
    for ours, other in zip(torch.autograd.grad(written.sum(), (x, w)), expected, strict=True):
        assert torch.equal(ours, other)


def test_func_vjp_twice() -> None:
    leaves, keywords = problem()
    detached = tuple(leaf.detach() for leaf in leaves)
    loss, pull_back = torch.func.vjp(lambda *leaves: loss_of(leaves, keywords), *detached)
    expected = torch.autograd.grad(loss_of(leaves, keywords), leaves)
    for scale in (2.0, -1.0):
        for a, b in zip(pull_back(torch.full_like(loss, scale)), expected, strict=True):
            torch.testing.assert_close(a, scale * b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_double_backward_is_an_error(reduction: str, dtype: torch.dtype) -> None:
    """Not a silent zero: neither through autograd, nor through torch.func, nor through both."""
    leaves, keywords = problem(dtype=dtype)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return loss_of((x, *leaves[1:]), keywords, reduction=reduction).sum()

    x = leaves[0]
    message = "second derivatives of memeff.linear_cross_entropy"
    gradients = torch.autograd.grad(loss(x), leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=message):
            gradient.square().sum().backward(retain_graph=True)
    # A penalty on the gradient of the input must not count as constant for the weight either.
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(gradient.square().sum(), leaves[1], allow_unused=True)

    first = torch.func.grad(loss)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda x: first(x).square().sum())(x.detach())
    with pytest.raises(RuntimeError, match=message):
        first(x).square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivative_of_a_gradient_in_the_upstream_gradient_is_an_error(reduction: str) -> None:
    leaves, keywords = problem()
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = factor * loss_of(leaves, keywords, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    message = "second derivatives of memeff.linear_cross_entropy"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(gradient.square().sum(), factor, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.square().sum().backward(inputs=[factor])

    def of_input(x: torch.Tensor) -> torch.Tensor:
        return loss_of((x, *leaves[1:]), keywords, reduction=reduction)

    with pytest.raises(RuntimeError, match=message):  # by two backwards
        torch.autograd.functional.jvp(of_input, leaves[0].detach(), leaves[0].detach())


def test_reference_has_second_derivatives() -> None:
    leaves, keywords = problem()
    assert torch.autograd.gradgradcheck(
        lambda *leaves: loss_of(leaves, keywords, backend="reference"), leaves
    )


def spy_on_forward(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Records (arguments, results) of every call of the forward op."""
    from memeff import ops

    calls: list[tuple[Any, ...]] = []
    original = ops.LIBRARIES["cpu"].linear_cross_entropy_forward

    def recording(*tensors: Any, **options: Any) -> Any:
        results = original(*tensors, **options)
        calls.append((tensors, results))
        return results

    monkeypatch.setattr(ops.LIBRARIES["cpu"], "linear_cross_entropy_forward", recording)
    return calls


SUBSETS = [(i, w, b) for i in (False, True) for w in (False, True) for b in (False, True)]


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_wanted_gradients_are_computed(
    subset: tuple[bool, bool, bool],
    reduction: str,
    grad_mode: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves, keywords = problem(dtype=dtype)
    expected = torch.autograd.grad(loss_of(leaves, keywords, reduction=reduction).sum(), leaves)
    for leaf, wanted in zip(leaves, subset, strict=True):
        leaf.requires_grad_(wanted)
    calls = spy_on_forward(monkeypatch)
    with torch.set_grad_enabled(grad_mode):
        loss = loss_of(leaves, keywords, reduction=reduction)
    ((_, results),) = calls
    assert results[2].shape == results[3].shape == (0,)  # no statistics
    in_forward = grad_mode and reduction != "none" and dtype != torch.float16
    for leaf, wanted, gradient in zip(leaves, subset, results[4:], strict=True):
        size = leaf.numel() if wanted and in_forward else 0
        assert gradient.numel() == size
    assert loss.requires_grad == (grad_mode and any(subset))
    if loss.requires_grad:
        loss.sum().backward()
        for leaf, wanted, gradient in zip(leaves, subset, expected, strict=True):
            assert (leaf.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("subset", SUBSETS[1:], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_op_computes_only_what_it_is_asked_for(
    subset: tuple[bool, bool, bool], reduction: str
) -> None:
    x, w, b = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    target = torch.randint(5, (4,))
    lse = F.linear(x, w, b).logsumexp(-1)
    upstream = torch.ones(4) if reduction == "none" else torch.tensor(1.0)
    op = torch.ops.memeff.linear_cross_entropy_backward.default
    flags = dict(zip(("input_grad", "weight_grad", "bias_grad"), subset, strict=True))
    options = op_options(op, reduction=reduction, **flags)
    gradients = op(upstream, lse, x, w, target, b, None, None, None, None, **options)
    assert [g.numel() > 0 for g in gradients] == list(subset)


def test_inference_mode() -> None:
    leaves, keywords = problem()
    with torch.inference_mode():
        loss = loss_of(leaves, keywords)
    torch.testing.assert_close(loss, loss_of(leaves, keywords).detach())


def test_operators_see_what_requires_grad() -> None:
    """Whatever their flags say; those of a caller under torch.vmap cannot be right."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    op = torch.ops.memeff.linear_cross_entropy_forward.default
    options = op_options(op, input_grad=False, weight_grad=False, bias_grad=False)
    target = torch.randint(5, (4,))
    results = op(x, w, target, None, None, None, None, None, **options)
    (found,) = torch.autograd.grad(results[0], x)
    (expected,) = torch.autograd.grad(F.cross_entropy(x @ w.T, target), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(use_reentrant: bool, reduction: str) -> None:
    from torch.utils.checkpoint import checkpoint

    leaves, keywords = problem()
    loss = checkpoint(
        lambda *leaves: loss_of(leaves, keywords, reduction=reduction).sum() * 3,
        *leaves,
        use_reentrant=use_reentrant,
    )
    loss.backward()
    expected = torch.autograd.grad(loss_of(leaves, keywords, reduction=reduction).sum() * 3, leaves)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_leaks_no_memory(reduction: str) -> None:
    """Gradients saved for backward die with the loss, without waiting for the garbage collector."""
    import gc
    import weakref

    x, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((4, 3), (5, 3), (5,)))
    hidden = x * 1
    op = torch.ops.memeff.linear_cross_entropy_forward.default
    options = op_options(op, reduction=reduction)
    loss, *others = op(hidden, w, torch.randint(5, (4,)), b, None, None, None, None, **options)
    in_forward = reduction == "mean"
    saved = [weakref.ref(tensor) for tensor in (others[-3:] if in_forward else [hidden])]
    del others, hidden
    assert all(tensor() is not None for tensor in saved)
    gc.disable()
    try:
        del loss
        assert all(tensor() is None for tensor in saved)
    finally:
        gc.enable()
