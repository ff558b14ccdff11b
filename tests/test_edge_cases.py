"""Degenerate sizes, not-finite numbers, bad targets, sizes beyond 32 bits: as torch does it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, check
from tolerances import Result, assert_close_as_plain, assert_result

import memeff

REDUCTIONS = ("mean", "sum", "none")


def test_few_features_and_a_million_classes() -> None:
    """BLAS libraries sum such columns in one run, which errs by 1e-3; ours are sums of sums."""
    x, w = torch.randn(2, 4), torch.randn(1_200_000, 4)
    y = torch.randint(len(w), (2,))

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return memeff.linear_cross_entropy(x, w, y)

    def entropy(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return memeff.linear_token_statistics(x, w).entropy.sum()

    for function in (loss, entropy):
        ours, exact = (
            torch.autograd.grad(function(leaf, weight), leaf)[0].double()
            for leaf, weight in (
                (x.clone().requires_grad_(), w), (x.double().requires_grad_(), w.double())
            )
        )  # fmt: skip
        assert (ours - exact).norm() < 4e-6 * exact.norm()


def ours_and_torch(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    b: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[Result, Result, Result]:
    """memeff, plain PyTorch with the float32 upcast, and float64; gradients from an upstream of
    ones.
    """

    def run(function: Any, *tensors: torch.Tensor | None) -> Result:
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        loss = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradients = torch.autograd.grad(loss, wanted, torch.ones_like(loss))
        return Result(loss.detach(), *gradients)

    def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        z = F.linear(x, w, b)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), y, **keywords)

    def fused(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return memeff.linear_cross_entropy(x, w, y, linear_bias=b, **keywords)

    wide = [None if t is None else t.double() for t in (x, w, b)]
    return run(fused, x, w, b), run(eager, x, w, b), run(eager, *wide)


def assert_like_torch(*arguments: Any, **keywords: Any) -> Result:
    ours, plain, exact = ours_and_torch(*arguments, **keywords)
    assert_result(ours, plain, exact)
    return ours


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(reduction: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(0, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    ours = assert_like_torch(x, w, torch.empty(0, dtype=torch.int64), reduction=reduction)
    assert ours.dw is not None and torch.equal(ours.dw, torch.zeros_like(w))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens_and_no_classes(reduction: str) -> None:
    assert_like_torch(
        torch.randn(0, 5), torch.randn(0, 5), torch.empty(0, dtype=torch.int64), reduction=reduction
    )


def test_no_classes() -> None:
    """torch: every target is out of bounds."""
    x, w = torch.randn(3, 5), torch.randn(0, 5)
    with pytest.raises(IndexError, match="target"):
        memeff.linear_cross_entropy(x, w, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_classes_all_ignored(reduction: str) -> None:
    x, w = torch.randn(3, 5), torch.randn(0, 5)
    loss = memeff.linear_cross_entropy(x, w, torch.full((3,), -100), reduction=reduction)
    expected = F.cross_entropy(x @ w.T, torch.full((3,), -100), reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_one_class(dtype: torch.dtype, probabilities: bool) -> None:
    """Certainty: the loss and all gradients are 0."""
    x, w = torch.randn(9, 5, dtype=dtype), torch.randn(1, 5, dtype=dtype)
    b, y = torch.randn(1, dtype=dtype), torch.zeros(9, dtype=torch.int64)
    ours, _, _ = ours_and_torch(x, w, torch.ones(9, 1, dtype=dtype) if probabilities else y, b)
    for value in (ours.loss, ours.dx, ours.dw, ours.db):
        assert value is not None and value.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_with_smoothing(dtype: torch.dtype, reduction: str) -> None:
    """Terms that cancel, whatever their weights: the gradients are 0, not nearly 0."""
    for smoothing in (0.1, 0.3, 0.9):
        leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((50, 5), (1, 5))]
        loss = memeff.linear_cross_entropy(
            *leaves, torch.zeros(50, dtype=torch.int64), label_smoothing=smoothing,
            weight=torch.rand(1, dtype=torch.promote_types(dtype, torch.float32)) + 0.1,
            token_weight=torch.rand(50), logit_scale=0.7, reduction=reduction,
        )  # fmt: skip
        for gradient in torch.autograd.grad(loss.sum(), leaves):
            assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_class_computed_again(dtype: torch.dtype, softcap: float | None) -> None:
    """Scores of other blocks come out with other bits; the gradients are 0 all the same."""
    x, w, b = (
        torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((134, 34), (1, 34), 1)
    )
    target, upstream = torch.zeros(134, dtype=torch.int64), torch.zeros(134)
    options = {"softcap": softcap, "logit_scale": 0.4, "linear_bias": b}
    for count in (1, 3, 11, 20, 133):
        upstream[:count] = torch.rand(count) + 1
        s = memeff.linear_token_statistics(x, w, target, **options)
        loss = memeff.linear_cross_entropy(
            x, w, target, token_weight=upstream, reduction="none", label_smoothing=0.9, **options
        )
        for result in (s.logprob, s.entropy, loss):
            assert result is not None and not result.any()
            gradients = torch.autograd.grad(
                result, (x, w, b), upstream.to(result.dtype), retain_graph=True
            )
            assert not any(gradient.any() for gradient in gradients)
        of_lse = torch.autograd.grad(s.lse, b, upstream.to(s.lse.dtype), retain_graph=True)
        assert of_lse[0].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_features(reduction: str) -> None:
    """D = 0: all logits are the bias."""
    check(Case((6,), 0, 9, reduction=reduction, bias=True, spread=0.0))


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_features_in_chunks(tokens: int) -> None:
    x, w, b = torch.randn(tokens, 0), torch.randn(9, 0), torch.randn(9, requires_grad=True)
    y = torch.randint(9, (tokens,))

    def total(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y, reduction="sum")

    ours = memeff.chunked_linear_apply(total, x, w, y, linear_bias=b)
    another = memeff.MemoryEfficientLinear.apply(
        x, w, y, lambda hidden, linear, y: total(linear(hidden), y), b, "sum"
    )
    expected = total(x @ w.t() + b, y)
    assert isinstance(ours, torch.Tensor)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(another, expected)
    for value in (ours, another):
        torch.testing.assert_close(
            torch.autograd.grad(value, b), torch.autograd.grad(expected, b, retain_graph=True)
        )
    equal = memeff.losses.linear_distillation_loss(x, w, x, w, student_bias=b, teacher_bias=b)
    assert equal.abs() <= 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ignored(reduction: str, dtype: torch.dtype) -> None:
    """Mean nan, sum 0, and gradients of 0, as in torch."""
    x, w, b = (
        torch.randn(6, 5, dtype=dtype),
        torch.randn(7, 5, dtype=dtype),
        torch.randn(7, dtype=dtype),
    )
    ours = assert_like_torch(x, w, torch.full((6,), -100), b, reduction=reduction)
    assert ours.loss.isnan().all() == (reduction == "mean")
    for gradient in (ours.dx, ours.dw, ours.db):
        assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_classes_masked_by_an_infinite_bias(dtype: torch.dtype, reduction: str) -> None:
    """Classes at -inf, whole tiles of every kernel: probability 0, gradient 0, no nan."""
    x, w = torch.randn(70, 16, dtype=dtype), torch.randn(2000, 16, dtype=dtype)
    b = torch.zeros(2000, dtype=dtype)
    b[300:1700] = -math.inf
    ours = assert_like_torch(x, w, torch.randint(300, (70,)), b, reduction=reduction)
    assert ours.dw is not None and not ours.dw[300:1700].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_classes_masked(dtype: torch.dtype) -> None:
    """A running maximum starts at -inf here and must not turn into nan."""
    x, w = torch.randn(40, 16, dtype=dtype), torch.randn(900, 16, dtype=dtype)
    b = torch.zeros(900, dtype=dtype)
    b[:700] = -math.inf
    assert_like_torch(x, w, torch.randint(700, 900, (40,)), b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_target_is_a_masked_class(reduction: str) -> None:
    """Infinite loss for that token only."""
    x, w, b = torch.randn(5, 8), torch.randn(12, 8), torch.zeros(12)
    b[4] = -math.inf
    ours = assert_like_torch(x, w, torch.tensor([0, 4, 1, 2, 3]), b, reduction=reduction)
    assert ours.loss.isinf().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_target_is_a_masked_class_of_weight_0(dtype: torch.dtype, reduction: str) -> None:
    """What counts for nothing may be impossible: no 0 * inf."""
    x, w, b = (torch.randn(shape, dtype=dtype) for shape in ((6, 8), (12, 8), (12,)))
    b[4] = -math.inf
    class_weights = torch.rand(12)
    class_weights[4] = 0
    y = torch.tensor([0, 4, 1, 4, 2, 11])
    ours = memeff.linear_cross_entropy(
        x, w, y, linear_bias=b, weight=class_weights, reduction=reduction
    )
    expected = F.cross_entropy(
        F.linear(x.double(), w.double(), b.double()),
        y.where(y != 4, -100),
        class_weights.double(),
        reduction=reduction,
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smoothing_of_1_and_a_masked_target(dtype: torch.dtype) -> None:
    """The target counts for nothing; the masked class does, with 1 / V."""
    x, w, b = (torch.randn(shape, dtype=dtype) for shape in ((6, 8), (12, 8), (12,)))
    b[4] = -math.inf
    y = torch.tensor([0, 4, 1, 4, 2, 11])
    ours = memeff.linear_cross_entropy(x, w, y, linear_bias=b, label_smoothing=1.0)
    assert ours == math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_poisons_only_itself(dtype: torch.dtype, bad: float) -> None:
    x, w = torch.randn(200, 16, dtype=dtype), torch.randn(300, 16, dtype=dtype)
    y = torch.randint(300, (200,))
    x[77, 3] = bad
    others = torch.arange(200) != 77
    leaf = x.clone().requires_grad_()
    loss = memeff.linear_cross_entropy(leaf, w, y, reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), leaf)
    clean = memeff.linear_cross_entropy(x[others], w, y[others], reduction="none")
    assert loss[77].isnan() and loss[others].isfinite().all()
    torch.testing.assert_close(loss[others], clean)
    assert dx[77].isnan().any() and dx[others].isfinite().all()
    # With a scalar loss too: only the bad token's own gradient row is nan.
    mean = memeff.linear_cross_entropy(leaf, w, y)
    (dx,) = torch.autograd.grad(mean, leaf)
    assert mean.isnan() and dx[77].isnan().any() and dx[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_may_hold_anything(dtype: torch.dtype, reduction: str) -> None:
    """Hidden states of ignored tokens are never looked at, not even times zero."""
    x, w = torch.randn(90, 16, dtype=dtype), torch.randn(120, 16, dtype=dtype)
    y = torch.randint(120, (90,))
    y[::3] = -100
    garbage = x.clone()
    garbage[::3] = math.nan
    sides = []
    for hidden in (x, garbage):
        leaves = [hidden.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = memeff.linear_cross_entropy(*leaves, y, reduction=reduction)
        sides.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for clean, dirty in zip(*sides, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(
    ("dtype", "size"),
    # In float64 the reference itself has logits rounded at 1e4, so gradients are left to 1e2.
    [*((dtype, 1e2) for dtype in DTYPES), *((dtype, 1e4) for dtype in DTYPES[:-1])],
    ids=str,
)
def test_huge_logits(dtype: torch.dtype, size: float) -> None:
    """+-1e4: exp would overflow anywhere but after subtracting the maximum."""
    w = torch.randn(300, 8, dtype=torch.float64)
    x = torch.randn(50, 8, dtype=torch.float64)
    z = x @ w.T
    x *= size / z.abs().max()
    assert_like_torch(x.to(dtype), w.to(dtype), torch.randint(300, (50,)), reduction="none")
    # Tokens that are sure of their target: no loss worth speaking of, gradients of next to nothing.
    ours, plain, exact = ours_and_torch(x.to(dtype), w.to(dtype), z.argmax(-1), reduction="none")
    assert_close_as_plain("loss", ours.loss, plain.loss, exact.loss, gradient=False)
    assert ours.dx is not None and ours.dw is not None
    assert ours.dx.isfinite().all() and ours.dw.isfinite().all()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_all_logits_far_from_zero(offset: float) -> None:
    """A common offset changes nothing but the rounding of the logits themselves."""
    assert_like_torch(
        torch.randn(50, 8),
        torch.randn(300, 8),
        torch.randint(300, (50,)),
        torch.full((300,), offset),
    )


@pytest.mark.parametrize("value", [-1, 50, 51, -101, 2**31, 2**40 + 3, -(2**40)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_target_out_of_range(value: int, reduction: str) -> None:
    """IndexError that names the first offender; the call before and after are fine."""
    x, w = torch.randn(20, 8), torch.randn(50, 8, requires_grad=True)
    y = torch.randint(50, (20,))
    y[13] = value
    y[17] = 777
    with pytest.raises(IndexError, match=rf"target.*{re.escape(str(value))}"):
        memeff.linear_cross_entropy(x, w, y, reduction=reduction)
    memeff.linear_cross_entropy(x, w, y.clamp(0, 49), reduction=reduction).sum().backward()


def test_ignore_index_is_not_out_of_range() -> None:
    x, w, y = torch.randn(4, 8), torch.randn(50, 8), torch.tensor([1, 999, 2, 999])
    assert_like_torch(x, w, y, ignore_index=999)
    with pytest.raises(IndexError, match="-100"):
        memeff.linear_cross_entropy(x, w, torch.tensor([1, -100, 2, 3]), ignore_index=999)


def test_more_than_two_to_the_31_logits() -> None:
    """The tokens repeat, so that 100 of them in float64 are a reference for all 17900."""
    distinct, copies, features, vocab = 100, 179, 4, 120_000
    assert distinct * copies * vocab > 2**31
    torch.manual_seed(0)
    base, w = torch.randn(distinct, features), torch.randn(vocab, features)
    y = torch.randint(vocab, (distinct,))
    y[-1] = vocab - 1

    def run(function: Any, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Result:
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        loss = function(*leaves, y)
        return Result(loss.detach(), *torch.autograd.grad(loss, leaves))

    def eager(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ w.T, y)

    def repeated(result: Result) -> Result:
        assert result.dx is not None
        return replace(result, dx=result.dx.repeat(copies, 1) / copies)

    ours = run(memeff.linear_cross_entropy, base.repeat(copies, 1), w, y.repeat(copies))
    plain, exact = run(eager, base, w, y), run(eager, base.double(), w.double(), y)
    assert_result(ours, repeated(plain), repeated(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(dtype: torch.dtype) -> None:
    """Tensors that span more than 2^31 elements, in memory that is mapped but hardly touched."""
    rows, features, gap = 40, 16, 2**31 // 37
    torch.manual_seed(0)
    far = []
    for _ in range(2):
        storage = torch.empty((rows - 1) * gap + features, dtype=dtype)
        view = storage.as_strided((rows, features), (gap, 1))
        far.append(view.copy_(torch.randn(rows, features)))
    x, w = far
    y = torch.randint(rows, (rows,))
    sides = []
    for a, b in ((x, w), (x.clone(), w.clone())):
        leaves = [t.detach().requires_grad_() for t in (a, b)]
        loss = memeff.linear_cross_entropy(*leaves, y)
        # A gradient takes the strides of its leaf only when accumulated; here it is what the op
        # returned.
        sides.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours, expected in zip(*sides, strict=True):
        torch.testing.assert_close(ours, expected)
