"""Every call of torch.nn.functional.linear_cross_entropy gives the same loss and gradients here."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import memeff

needs_torch_function = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"),
    reason=f"torch {torch.__version__} has no linear_cross_entropy (2.13 and later have)",
)


def two_steps(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    ignore_index: int | None = None,
    **keywords: Any,
) -> torch.Tensor:
    """What torch documents its function to be equivalent to, for versions without it."""
    rows = linear_weight.flatten(0, -2)
    logits = F.linear(input, rows, None if linear_bias is None else linear_bias.flatten())
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    ignore_index = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(logits, target, ignore_index=ignore_index, **keywords)


TORCH: Any = getattr(F, "linear_cross_entropy", two_steps)
SHAPES = {  # input, linear_weight
    "batched": ((11, 6), (9, 6)),
    "one row": ((6,), (9, 6)),
    "batch of one": ((1, 6), (9, 6)),
    "one class": ((4, 6), (1, 6)),
    "one row, one class": ((6,), (1, 6)),
    "K=1": ((5, 6), (9, 3, 6)),
    "K=2": ((5, 6), (7, 2, 3, 6)),
    "K=3": ((2, 4), (5, 2, 1, 3, 4)),
}


def make(shape: str, *, probabilities: bool, bias: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call, with leaves that require grad."""
    input_shape, weight_shape = SHAPES[shape]
    lead, classes = input_shape[:-1], weight_shape[:-1]
    if probabilities:
        target = torch.randn(*lead, *classes, dtype=dtype).softmax(len(lead))
    else:
        target = torch.randint(classes[0], (*lead, *classes[1:]))
    return {
        "input": torch.randn(input_shape, dtype=dtype).requires_grad_(),
        "linear_weight": torch.randn(weight_shape, dtype=dtype).requires_grad_(),
        "target": target,
        "linear_bias": torch.randn(classes, dtype=dtype).requires_grad_() if bias else None,
    }


def differentiate(function: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Loss and gradients with an upstream gradient that is neither 1 nor uniform."""
    call = dict(arguments)
    positional = [call.pop(name) for name in ("input", "linear_weight", "target")]
    loss = function(*positional, **call)
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    upstream = torch.linspace(0.5, -2.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss, *torch.autograd.grad(loss, leaves, upstream)


def assert_same(arguments: dict[str, Any]) -> None:
    ours = differentiate(memeff.linear_cross_entropy, arguments)
    theirs = differentiate(TORCH, arguments)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_argument_space(
    shape: str, reduction: str, probabilities: bool, label_smoothing: float, dtype: torch.dtype
) -> None:
    for bias, class_weights in itertools.product([False, True], [False, True]):
        arguments = make(shape, probabilities=probabilities, bias=bias, dtype=dtype)
        vocab = SHAPES[shape][1][0]
        arguments |= {
            "weight": torch.rand(vocab, dtype=dtype) if class_weights else None,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        assert_same(arguments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [None, -100, 0, -7, 10**6])
def test_ignored(shape: str, reduction: str, ignore_index: int | None) -> None:
    arguments = make(shape, probabilities=False, bias=True, dtype=torch.float64)
    target, vocab = arguments["target"], SHAPES[shape][1][0]
    chosen = torch.rand(target.shape) < 0.4
    target[chosen] = -100 if ignore_index is None else ignore_index
    weight = torch.rand(vocab, dtype=torch.float64)
    assert_same(
        arguments | {"reduction": reduction, "ignore_index": ignore_index, "weight": weight}
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_weights", [False, True])
def test_everything_ignored(shape: str, reduction: str, class_weights: bool) -> None:
    """The mean is nan, the sum is 0."""
    arguments = make(shape, probabilities=False, bias=True, dtype=torch.float64)
    arguments["target"].fill_(-100)
    weight = torch.rand(SHAPES[shape][1][0], dtype=torch.float64) if class_weights else None
    ours = memeff.linear_cross_entropy(**arguments, reduction=reduction, weight=weight)
    theirs = TORCH(**arguments, reduction=reduction, weight=weight)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize(
    ("input_shape", "weight_shape"),
    [
        ((0, 4), (5, 4)),
        ((3, 0), (5, 0)),
        ((0, 4), (5, 2, 4)),
        ((3, 4), (5, 0, 4)),
        ((3, 0), (5, 2, 0)),
    ],
    ids=["N=0", "D=0", "N=0 K=1", "d1=0", "D=0 K=1"],
)
def test_empty(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], probabilities: bool, reduction: str
) -> None:
    lead, classes = input_shape[:-1], weight_shape[:-1]
    arguments = {
        "input": torch.randn(input_shape, requires_grad=True),
        "linear_weight": torch.randn(weight_shape, requires_grad=True),
        "target": torch.rand(*lead, *classes)
        if probabilities
        else torch.zeros(*lead, *classes[1:]).long(),
        "reduction": reduction,
    }
    assert_same(arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_classes(reduction: str) -> None:
    """V = 0: only ignored tokens have a loss."""
    x, w = torch.randn(3, 4), torch.randn(0, 4)
    ignored = torch.full((3,), -100)
    ours = memeff.linear_cross_entropy(x, w, ignored, reduction=reduction)
    torch.testing.assert_close(ours, TORCH(x, w, ignored, reduction=reduction), equal_nan=True)
    with pytest.raises(IndexError, match="V = 0"):
        memeff.linear_cross_entropy(x, w, torch.zeros(3).long(), reduction=reduction)


def test_uint8_targets() -> None:
    arguments = make("batched", probabilities=False, bias=False, dtype=torch.float32)
    assert_same(arguments | {"target": arguments["target"].byte()})


def test_one_row_with_target_of_one_entry() -> None:
    """Torch takes it in forward (its backward fails)."""
    x, w, target = torch.randn(6), torch.randn(9, 6), torch.tensor([3])
    for reduction in ("mean", "sum", "none"):
        ours = memeff.linear_cross_entropy(x, w, target, reduction=reduction)
        torch.testing.assert_close(ours, TORCH(x, w, target, reduction=reduction))


@pytest.mark.parametrize("wanted", ["target", "weight"])
def test_gradient_of_probabilities_and_class_weights(wanted: str) -> None:
    arguments = make("batched", probabilities=True, bias=False, dtype=torch.float64)
    arguments["weight"] = torch.rand(9, dtype=torch.float64)
    arguments[wanted].requires_grad_()
    assert_same(arguments | {"label_smoothing": 0.1})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_that_are_not_finite(value: float, label_smoothing: float, reduction: str) -> None:
    arguments = make("batched", probabilities=False, bias=True, dtype=torch.float32)
    arguments["target"] = torch.arange(11) % 8  # never the class with the odd logit
    arguments["linear_bias"].data[8] = value
    keywords = {"label_smoothing": label_smoothing, "reduction": reduction}
    ours = memeff.linear_cross_entropy(**arguments, **keywords)
    torch.testing.assert_close(ours, TORCH(**arguments, **keywords), equal_nan=True)


@needs_torch_function
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
def test_options_of_torch() -> None:
    arguments = make("batched", probabilities=False, bias=True, dtype=torch.float32)
    for options in (
        torch.nn.LinearCrossEntropyOptions(),
        torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4, chunking_method=None),
        torch.nn.LinearCrossEntropyOptions(acc_policy="accurate"),
    ):
        assert_same(arguments | {"options": options})
        # Torch stores the logits for this one, and warns about it.
        assert_same(arguments | {"options": options, "label_smoothing": 0.1})


@needs_torch_function
def test_signature_is_a_superset() -> None:
    theirs = inspect.signature(TORCH).parameters
    ours = inspect.signature(memeff.linear_cross_entropy).parameters
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    assert list(ours)[: len(theirs)] == list(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_of_16_bit_inputs_is_float32(dtype: torch.dtype, reduction: str) -> None:
    """A deliberate difference; and float32 class weights with 16-bit inputs."""
    x, w = torch.randn(7, 6, dtype=dtype), torch.randn(9, 6, dtype=dtype)
    target, weight = torch.randint(9, (7,)), torch.rand(9)
    ours = memeff.linear_cross_entropy(x, w, target, weight=weight, reduction=reduction)
    assert ours.dtype == torch.float32
    exact = F.cross_entropy(x.double() @ w.double().T, target, weight.double(), reduction=reduction)
    torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-5)
