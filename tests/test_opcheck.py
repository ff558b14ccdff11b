"""torch.library.opcheck of every op: schema, autograd registration, fake kernels, AOT autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import OPTIONS, op_options

FORWARD = torch.ops.memeff.linear_cross_entropy_forward.default
BACKWARD = torch.ops.memeff.linear_cross_entropy_backward.default
SUBSETS = [(i, w, b) for i in (False, True) for w in (False, True) for b in (False, True)]


def tensors(
    subset: tuple[bool, bool, bool],
    *,
    shape: tuple[int, int, int] = (4, 3, 5),
    dtype: torch.dtype = torch.float32,
    probabilities: bool = False,
    everything: bool = False,
) -> tuple[Any, ...]:
    """input, linear_weight, target, linear_bias, weight, token_weight, num_items, scale."""
    tokens, features, vocab = shape
    x, w, b = (
        torch.randn(size, dtype=dtype).requires_grad_(wanted)
        for size, wanted in zip(
            ((tokens, features), (vocab, features), (vocab,)), subset, strict=True
        )
    )
    if probabilities:
        target = torch.randn(tokens, vocab, dtype=dtype).softmax(-1)
    else:
        target = torch.randint(vocab, (tokens,))
    others = (torch.rand(vocab), torch.rand(tokens)) if everything else (None, None)
    return x, w, target, b, *others, None, torch.tensor(0.7) if everything else None


def wanted(subset: tuple[bool, bool, bool]) -> dict[str, bool]:
    return dict(zip(("input_grad", "weight_grad", "bias_grad"), subset, strict=True))


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("statistics", [False, True], ids=["", "statistics"])
def test_forward(subset: tuple[bool, bool, bool], reduction: str, statistics: bool) -> None:
    torch.library.opcheck(
        FORWARD,
        tensors(subset),
        op_options(FORWARD, reduction=reduction, return_statistics=statistics, **wanted(subset)),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_forward_dtypes_and_options(
    reduction: str, dtype: torch.dtype, probabilities: bool
) -> None:
    subset = (True, True, True)
    arguments = tensors(
        subset, shape=(2, 8, 16), dtype=dtype, probabilities=probabilities, everything=True
    )
    torch.library.opcheck(
        FORWARD,
        arguments,
        op_options(
            FORWARD,
            **OPTIONS["everything"] | {"ignore_index": 1},
            reduction=reduction,
            return_statistics=True,
        ),
    )


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (7, 2, 33)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_shapes(shape: tuple[int, int, int], bias: bool) -> None:
    x, w, target, b, *others = tensors((True, True, bias), shape=shape)
    others[2] = torch.tensor(3)  # num_items
    torch.library.opcheck(
        FORWARD,
        (x, w, target, b if bias else None, *others),
        op_options(
            FORWARD,
            return_statistics=True,
            memory_budget=2**26,
            chunk_size=4,
            accum_dtype=torch.float32,
            bias_grad=bias,
        ),
    )


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward(subset: tuple[bool, bool, bool], reduction: str) -> None:
    arguments = tensors((False, False, False))
    x, w, _, b, *_ = arguments
    lse = F.linear(x, w, b).logsumexp(-1)
    grad_loss = torch.randn(4) if reduction == "none" else torch.randn(())
    torch.library.opcheck(
        BACKWARD,
        (grad_loss, lse, *arguments),
        op_options(BACKWARD, reduction=reduction, **wanted(subset)),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0,), (7,)], ids=str)
def test_scale(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = (torch.randn(shape, dtype=dtype), torch.tensor(-1.5, dtype=wide))
    torch.library.opcheck(torch.ops.memeff.scale_gradient.default, arguments)
    torch.library.opcheck(torch.ops.memeff.scale_gradient_.default, arguments)
    gradient, scale = arguments
    expected = (gradient.to(wide) * scale).to(dtype)
    assert torch.equal(torch.ops.memeff.scale_gradient(gradient, scale), expected)
    torch.ops.memeff.scale_gradient_(gradient, scale)
    assert torch.equal(gradient, expected)
