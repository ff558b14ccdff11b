"""Gradients under the tolerance rule, by dtype, reduction, options, plan and what is wanted."""

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
    compact_budget,
    make_inputs,
    run_memeff,
    run_plain,
)
from tolerances import assert_close_as_plain

import memeff

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [
    (37, 19, 53),
    (64, 32, 256),
    (130, 65, 1031),
    (1, 8, 40),
    (9, 1, 33),
    (5, 7, 1),
    (1, 1, 1),
    (300, 17, 2),
]
LARGE = (
    520,
    96,
    2053,
)  # several tiles of tokens, classes and features in every kernel, and a rest in each


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, reduction: str) -> None:
    tokens, features, vocab = shape
    check(Case((tokens,), features, vocab, dtype=dtype, reduction=reduction, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0], ids=["flat", "usual", "peaked"])
def test_larger(dtype: torch.dtype, reduction: str, spread: float) -> None:
    tokens, features, vocab = LARGE
    check(
        Case(
            (tokens,), features, vocab, dtype=dtype, reduction=reduction, spread=spread, ignored=0.1
        )
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(options: dict[str, Any], dtype: torch.dtype, reduction: str) -> None:
    check(Case((70,), 24, 301, dtype=dtype, reduction=reduction, **options))


@pytest.mark.parametrize("num_items", [1, 7, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_num_items(num_items: int, dtype: torch.dtype) -> None:
    case = Case(
        (50,),
        16,
        99,
        dtype=dtype,
        num_items=num_items,
        ignored=0.3,
        z_loss=1e-3,
        class_weights=True,
    )
    ours = check(case)
    as_tensor = run_memeff(case, make_inputs(case), num_items=torch.tensor(num_items))
    for name in ("loss", "dx", "dw"):
        assert torch.equal(getattr(ours, name), getattr(as_tensor, name))


@pytest.mark.parametrize("input_layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts(input_layout: str, weight_layout: str, reduction: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(
            Case(
                (33,),
                40,
                129,
                dtype=dtype,
                input_layout=input_layout,
                weight_layout=weight_layout,
                reduction=reduction,
            )
        )


@pytest.mark.parametrize(
    "differentiate", [("dx",), ("dw",), ("db",), ("dx", "dw"), ("dx", "db"), ("dw", "db")], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_only_what_is_wanted(
    differentiate: tuple[str, ...], reduction: str, dtype: torch.dtype
) -> None:
    check(
        Case(
            (70,),
            24,
            301,
            dtype=dtype,
            bias=True,
            reduction=reduction,
            differentiate=differentiate,
            ignored=0.1,
        )
    )


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift(shift: int, reduction: str) -> None:
    check(Case((3, 11), 16, 57, shift=shift, reduction=reduction, ignored=0.2, token_weight=True))


@pytest.mark.parametrize("lead", [(), (1,), (1, 12), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions(lead: tuple[int, ...], reduction: str) -> None:
    ours = check(Case(lead, 20, 71, reduction=reduction))
    assert ours.dx is not None and ours.dx.shape == (*lead, 20)


@pytest.mark.parametrize("chunk_size", [1, 16, 100, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunk_sizes(chunk_size: int, dtype: torch.dtype, reduction: str) -> None:
    check(
        Case(
            (150,),
            24,
            333,
            dtype=dtype,
            reduction=reduction,
            chunk_size=chunk_size,
            accum_dtype=torch.promote_types(dtype, torch.float32),
            ignored=0.2,
            bias=True,
        )
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads_wanted", [1, 2])
@pytest.mark.parametrize(
    ("case", "seeds"),
    [
        (Case((27,), 256, 4306, ignored=0.8), 3),  # about five tokens count
        (Case((27,), 256, 4306, ignored=0.9, reduction="none"), 3),
        (Case((8,), 4096, 700), 2),
        (Case((8,), 4096, 700, reduction="none"), 2),
    ],
    ids=str,
)
def test_sums_for_few_tokens(case: Case, seeds: int, threads_wanted: int) -> None:
    """Where tokens are few, a BLAS adds up classes, or features, one after the other."""
    torch.set_num_threads(threads_wanted)
    for seed in range(seeds):
        check(replace(case, seed=seed))


@pytest.mark.parametrize("vocab", [5, 6, 11])
def test_scores_of_few_classes(vocab: int) -> None:
    """A BLAS adds up features one after the other where classes are few, too, which the gradient of
    the entropy shows."""
    sides: list[list[torch.Tensor]] = [[], [], []]
    for _ in range(20):
        x, w, upstream = torch.randn(64, 73), torch.randn(vocab, 73) / 3, torch.randn(64)
        for i, side in enumerate((x, x, x.double())):
            leaf = side.clone().requires_grad_()
            if i == 0:
                entropy = memeff.linear_token_statistics(leaf, w, entropy=True).entropy
            else:
                log_p = (leaf @ w.to(leaf.dtype).t()).log_softmax(-1)
                entropy = -(log_p.exp() * log_p).sum(-1)
            assert entropy is not None
            sides[i] += torch.autograd.grad(entropy, leaf, upstream.to(leaf.dtype))
    assert_close_as_plain("dx", *(torch.cat(side) for side in sides))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads_wanted", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [2, 3, 108])
def test_scores_computed_again(vocab: int, dtype: torch.dtype, threads_wanted: int) -> None:
    """Few of many tokens have a gradient, so that other blocks are computed again. Where p is close
    to 1 scores with other bits than those that lse comes from would not cancel."""
    torch.set_num_threads(threads_wanted)
    sides: list[list[torch.Tensor]] = [[], [], []]
    for counted in range(1, 12):
        x, w = torch.randn(40, 55, dtype=dtype), torch.randn(vocab, 55, dtype=dtype)
        y, upstream = (x @ w.t()).argmax(-1), torch.zeros(40, dtype=dtype)
        upstream[torch.randperm(40)[:counted]] = 1
        for i, side in enumerate((x, x, x.double())):
            leaf = side.clone().requires_grad_()
            if i == 0:
                logprob = memeff.linear_logprobs(leaf, w, y)
            else:
                z = leaf @ w.to(leaf.dtype).t()
                logprob = -F.cross_entropy(z, y, reduction="none")
            (gradient,) = torch.autograd.grad(logprob, leaf, upstream.to(logprob.dtype))
            # Row by row: those of certain tokens are small.
            rows = gradient[upstream > 0].double()
            sides[i].append(rows)
    ours, plain, exact = (torch.cat(side) for side in sides)
    sizes = exact.norm(dim=1).clamp(min=torch.finfo(dtype).eps)
    errors, plain_errors = ((side - exact).norm(dim=1) / sizes for side in (ours, plain))
    if dtype == torch.float32:
        assert errors.median() <= 1.1 * plain_errors.median() + 1e-7
    else:
        assert errors.median() <= 1e-13


@pytest.mark.parametrize("probabilities", [False, True])
def test_bias_gradient_of_many_chunks(probabilities: bool) -> None:
    """28 additions to each entry, which must not be 28 roundings to float32."""
    case = Case(
        (224,), 5, 2002, reduction="sum", bias=True, probabilities=probabilities, chunk_size=1,
        differentiate=("db",), spread=0.3,
    )  # fmt: skip
    for seed in range(3):
        check(replace(case, seed=seed))


@pytest.mark.parametrize("accum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_chunks_do_not_cost_accuracy(
    accum_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    """A 16-bit running sum over 64 chunks would be several times as far from float64 as plain
    PyTorch.
    """
    check(Case((1024,), 32, 515, dtype=dtype, chunk_size=16, accum_dtype=accum_dtype))


@pytest.mark.parametrize(
    ("spread", "options"),
    [(0.1, {}), (12.0, {}), (3.0, {"bias": True, "label_smoothing": 0.1, "ignored": 0.3})],
    ids=["flat", "peaked", "usual"],
)
def test_compact_sums_do_not_cost_accuracy(spread: float, options: dict[str, Any]) -> None:
    case = Case((2048,), 128, 8192, dtype=torch.bfloat16, spread=spread, **options)
    check(case, memory_budget=compact_budget(case))


def test_compact_sums_beside_outliers() -> None:
    """Features 256 times larger than the others, as hidden states have them: the others' gradients,
    which share exponents with theirs, are as good by themselves.
    """
    case = Case((2048,), 128, 8192, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    large = torch.arange(case.features) % 16 == 5
    inputs.x[..., large] *= 256
    inputs.w[..., large] /= 256
    ours = run_memeff(case, inputs, memory_budget=compact_budget(case))
    plain = run_plain(case, inputs)
    exact = run_plain(replace(case, dtype=torch.float64), inputs.in_float64())
    assert ours.dw is not None and plain.dw is not None and exact.dw is not None
    for name, columns in (("outliers", large), ("others", ~large)):
        assert_close_as_plain(
            f"dw of {name}", ours.dw[:, columns], plain.dw[:, columns], exact.dw[:, columns]
        )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smallest_budget(options: dict[str, Any], dtype: torch.dtype, reduction: str) -> None:
    """The plan of the least memory that works, which the error for a hopeless budget names."""
    case = Case((300,), 40, 1500, dtype=dtype, reduction=reduction, **options)
    inputs = make_inputs(case)
    with pytest.raises(ValueError, match="memory_budget") as caught:
        run_memeff(case, inputs, memory_budget=1)
    least = max(int(word) for word in _numbers(str(caught.value)))
    with pytest.raises(ValueError, match="memory_budget"):
        run_memeff(case, inputs, memory_budget=least - 1)
    check(case, memory_budget=least)


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_backward_with_another_upstream(dtype: torch.dtype, reduction: str) -> None:
    """Gradients are linear in the upstream gradient; asking once does not spoil the next."""
    case = Case((40,), 12, 77, dtype=dtype, reduction=reduction, bias=True)
    inputs = make_inputs(case)
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.w, inputs.b) if t is not None]
    loss = memeff.linear_cross_entropy(
        leaves[0], leaves[1], inputs.y, linear_bias=leaves[2], reduction=reduction
    )
    up = torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, up, retain_graph=True)
    tripled = torch.autograd.grad(loss, leaves, 3 * up, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, up)
    epsilon = torch.finfo(dtype).eps
    for a, b, c in zip(first, tripled, again, strict=True):
        assert torch.equal(a, c)
        assert (3 * a.double() - b.double()).abs().max() <= 4 * epsilon * b.double().abs().max()


def test_gradients_accumulate_into_grad() -> None:
    """.backward() twice adds up, and the accumulated tensor is not a buffer the library still
    writes to.
    """
    case = Case((40,), 12, 77)
    inputs = make_inputs(case)
    w = inputs.w.detach().requires_grad_()
    for _ in range(2):
        memeff.linear_cross_entropy(inputs.x, w, inputs.y).backward()
    once = torch.autograd.grad(memeff.linear_cross_entropy(inputs.x, w, inputs.y), w)[0]
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 2 * once)
