"""The loss without gradients (the statistics-only plan), and the per-token statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    INPUT_LAYOUTS,
    OPTIONS,
    WEIGHT_LAYOUTS,
    Case,
    check,
    make_inputs,
    run_plain,
)
from tolerances import assert_close_as_plain

import memeff

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Multiples of nothing, multiples of everything, single entries.
SHAPES = [
    (37, 19, 53),
    (64, 32, 256),
    (130, 65, 1031),
    (1, 8, 40),
    (9, 1, 33),
    (5, 7, 1),
    (1, 1, 1),
    (3, 300, 2),
]


def forward(tokens: int, features: int, vocab: int, **fields: Any) -> Case:
    return Case((tokens,), features, vocab, differentiate=(), **fields)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, reduction: str) -> None:
    check(forward(*shape, dtype=dtype, reduction=reduction))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(options: dict[str, Any], dtype: torch.dtype, reduction: str) -> None:
    check(forward(70, 24, 301, dtype=dtype, reduction=reduction, **options))


@pytest.mark.parametrize("num_items", [1, 7, 10**12])
def test_num_items(num_items: int) -> None:
    check(forward(50, 16, 99, num_items=num_items, ignored=0.3, z_loss=1e-3, class_weights=True))


@pytest.mark.parametrize("lead", [(), (1,), (1, 12), (3, 4, 5), (2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions(lead: tuple[int, ...], reduction: str) -> None:
    ours = check(Case(lead, 20, 71, reduction=reduction, differentiate=()))
    assert ours.loss.shape == (lead if reduction == "none" else ())


@pytest.mark.parametrize("input_layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts(input_layout: str, weight_layout: str, dtype: torch.dtype) -> None:
    check(
        forward(
            33,
            40,
            129,
            dtype=dtype,
            input_layout=input_layout,
            weight_layout=weight_layout,
            reduction="none",
        )
    )


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift(shift: int, reduction: str) -> None:
    case = Case(
        (3, 11),
        16,
        57,
        shift=shift,
        reduction=reduction,
        ignored=0.2,
        token_weight=True,
        differentiate=(),
    )
    ours = check(case)
    assert ours.loss.shape == ((3, 11 - shift) if reduction == "none" else ())


@pytest.mark.parametrize("chunk_size", [1, 16, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chunk_size_does_not_change_what_is_computed(chunk_size: int, dtype: torch.dtype) -> None:
    check(forward(150, 24, 333, dtype=dtype, reduction="none", chunk_size=chunk_size, ignored=0.2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_tokens(dtype: torch.dtype) -> None:
    """Sure of its target, a token has next to no loss: lse - z_y must not be all rounding."""
    torch.manual_seed(1)
    w = torch.eye(40, dtype=dtype)
    y = torch.arange(40)
    x = 25 * w  # z_y = 25, all others 0
    ours = memeff.linear_cross_entropy(x, w, y, reduction="none")
    exact = F.cross_entropy(x.double() @ w.double().T, y, reduction="none")
    plain = F.cross_entropy((x @ w.T).to(ours.dtype), y, reduction="none")
    assert_close_as_plain("loss", ours, plain, exact, gradient=False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(options: dict[str, Any], dtype: torch.dtype) -> None:
    case = forward(61, 24, 211, dtype=dtype, **options)
    inputs = make_inputs(case)
    keywords: dict[str, Any] = (
        {} if case.ignore_index is None else {"ignore_index": case.ignore_index}
    )
    _, ours = memeff.linear_cross_entropy(
        inputs.x,
        inputs.w,
        inputs.y,
        linear_bias=inputs.b,
        weight=inputs.class_weights,
        label_smoothing=case.label_smoothing,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        z_loss=case.z_loss,
        token_weight=inputs.token_weight,
        return_statistics=True,
        **keywords,
    )
    none = replace(case, reduction="none")
    plain_loss = run_plain(none, inputs).loss
    exact_loss = run_plain(replace(none, dtype=torch.float64), inputs.in_float64()).loss
    assert_close_as_plain("loss", ours.loss, plain_loss, exact_loss, gradient=False)

    def expected(side: Any) -> dict[str, torch.Tensor]:
        z = F.linear(side.x, side.w, side.b)
        z = (z if z.dtype == torch.float64 else z.float()) * case.logit_scale
        z = z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)
        if case.probabilities:
            counted = torch.ones(len(z), dtype=torch.bool)
            target_logit = (side.y.to(z.dtype) * z).sum(-1)
        else:
            counted = side.y != case.kept_ignore_index
            target_logit = z.gather(1, side.y.long().where(counted, 0)[:, None])[:, 0]
        lse = z.logsumexp(-1)
        log_p = z.log_softmax(-1)
        fields = {
            "lse": lse,
            "target_logit": target_logit,
            "logprob": target_logit - lse,
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "max_logit": z.amax(-1),
        }
        return {name: field.where(counted, 0) for name, field in fields.items()}

    plain, exact = expected(inputs), expected(inputs.in_float64())
    for name, reference in exact.items():
        value = getattr(ours, name)
        assert not value.requires_grad
        assert_close_as_plain(name, value, plain[name], reference, gradient=False)
    z = (
        F.linear(*(t.double() if t is not None else None for t in (inputs.x, inputs.w, inputs.b)))
        * case.logit_scale
    )
    top = z.topk(2, -1)
    clear = top.values[:, 0] - top.values[:, 1] > 0.1  # no other class is the largest by rounding
    assert clear.sum() > 10
    index = inputs.y.argmax(-1) if case.probabilities else inputs.y
    counted = torch.ones_like(clear) if case.probabilities else inputs.y != case.kept_ignore_index
    assert torch.equal(ours.argmax[clear], top.indices[:, 0].where(counted, 0)[clear])
    assert torch.equal(ours.correct, (ours.argmax == index) & counted)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_the_same_definition(options: dict[str, Any], reduction: str) -> None:
    """memeff.reference against torch's own cross entropy, in float64, where nothing but the formula
    matters.
    """
    case = Case((2, 13), 8, 31, dtype=torch.float64, reduction=reduction, **options)
    ours = check(case, backend="reference")
    assert ours.dx is not None


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has linear_cross_entropy from 2.13 on"
)
@pytest.mark.parametrize("positions", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_drop_in_for_torch(positions: tuple[int, ...], probabilities: bool, reduction: str) -> None:
    """The same call with torch's function; K-dimensional weights included."""
    n, d, v = 11, 6, 9
    x = torch.randn(n, d, dtype=torch.float64)
    w = torch.randn(v, *positions, d, dtype=torch.float64)
    b = torch.randn(v, *positions, dtype=torch.float64)
    keywords: dict[str, Any] = {
        "weight": torch.rand(v, dtype=torch.float64),
        "label_smoothing": 0.1,
    }
    if probabilities:
        y = torch.randn(n, v, *positions, dtype=torch.float64).softmax(1)
    else:
        y = torch.randint(v, (n, *positions))
        y[::4] = 2
        keywords["ignore_index"] = 2
    sides = []
    for function in (F.linear_cross_entropy, memeff.linear_cross_entropy):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = function(
            leaves[0], leaves[1], y, linear_bias=leaves[2], reduction=reduction, **keywords
        )
        weights = torch.arange(1.0, loss.numel() + 1, dtype=torch.float64).view(loss.shape)
        sides.append([loss, *torch.autograd.grad(loss, leaves, weights)])
    for theirs, ours in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
