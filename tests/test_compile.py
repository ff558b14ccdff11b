"""torch.compile: one graph, the bits of eager, no recompilation for each new number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import memeff

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves_of(
    *lead: int, vocab: int = 19, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(*lead, 8, dtype=dtype, requires_grad=True),
        torch.randn(vocab, 8, dtype=dtype, requires_grad=True),
        torch.randn(vocab, dtype=dtype, requires_grad=True),
    )


def target_of(*lead: int, vocab: int = 19) -> torch.Tensor:
    target = torch.randint(vocab, lead)
    target[..., ::3] = -100
    return target


def differentiate(
    function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...], *others: Any
) -> tuple[torch.Tensor, ...]:
    loss = function(*leaves, *others)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def assert_same_bits(
    function: Callable[..., torch.Tensor],
    backend: str,
    leaves: tuple[torch.Tensor, ...],
    *others: Any,
) -> None:
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    eager = differentiate(function, leaves, *others)
    for a, b in zip(differentiate(compiled, leaves, *others), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_as_eager(backend: str, reduction: str, dtype: torch.dtype) -> None:
    """With ignored rows, which another library gets wrong when compiled."""

    def loss(
        x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return memeff.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)

    assert_same_bits(loss, backend, leaves_of(3, 7, dtype=dtype), target_of(3, 7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"shift": True, "softcap": 5.0, "logit_scale": 0.5},
        {"z_loss": 0.1, "label_smoothing": 0.1, "num_items": 12},
        {"memory_budget": "64MiB", "chunk_size": 4},
    ],
    ids=str,
)
def test_options(backend: str, options: dict[str, Any]) -> None:
    def loss(
        x: torch.Tensor,
        w: torch.Tensor,
        b: torch.Tensor,
        target: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        class_weights, token_weight = weights
        return memeff.linear_cross_entropy(
            x, w, target, linear_bias=b, weight=class_weights, token_weight=token_weight, **options
        )

    weights = torch.rand(19), torch.rand(3, 7)
    assert_same_bits(loss, backend, leaves_of(3, 7), target_of(3, 7), *weights)


def test_statistics_probabilities_and_positions() -> None:
    def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        loss, s = memeff.linear_cross_entropy(x, w, q, linear_bias=b, return_statistics=True)
        return loss + s.entropy.mean() + s.correct.sum()

    assert_same_bits(loss, "aot_eager", leaves_of(6), torch.randn(6, 19).softmax(-1))

    def loss_of_positions(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return memeff.linear_cross_entropy(x, w, target, weight=torch.ones(5), z_loss=0.1)

    leaves = torch.randn(4, 8, requires_grad=True), torch.randn(5, 2, 8, requires_grad=True)
    assert_same_bits(loss_of_positions, "aot_eager", leaves, target_of(4, 2, vocab=5))


def test_module_and_autocast() -> None:
    module = memeff.LinearCrossEntropyLoss(8, 19, bias=True, shift=1)

    def loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, target)

    assert_same_bits(loss, "aot_eager", (leaves_of(2, 6)[0],), target_of(2, 6))


def test_no_grad_and_frozen_weight() -> None:
    def loss(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return memeff.linear_cross_entropy(x, w, target)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, w, _ = leaves_of(6)
    target = target_of(6)
    with torch.no_grad():
        assert torch.equal(compiled(x, w, target), loss(x, w, target))
    w.requires_grad_(False)
    compiled(x, w, target).backward()
    assert w.grad is None
    assert torch.equal(x.grad, torch.autograd.grad(loss(x, w, target), x)[0])  # type: ignore[arg-type]


def test_second_backward_of_a_compiled_loss() -> None:
    compiled = torch.compile(memeff.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    x, w, _ = leaves_of(6)
    target = target_of(6)
    loss = compiled(x, w, target)
    for scale in (1.0, -3.0, 0.25):
        upstream = torch.tensor(scale)
        found = torch.autograd.grad(loss, (x, w), upstream, retain_graph=True)
        fresh = torch.autograd.grad(memeff.linear_cross_entropy(x, w, target), (x, w), upstream)
        for a, b in zip(found, fresh, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_autograd(reduction: str) -> None:
    """The backward of eager calls, traced by torch._dynamo.compiled_autograd: the second call has
    other options, which the first one's trace must not keep."""
    from torch._dynamo import compiled_autograd

    (x, w, b), target = leaves_of(6), target_of(6)
    others: list[dict[str, Any]] = [
        {"softcap": None, "logit_scale": 1.0},
        {"softcap": 2.0, "logit_scale": 0.7, "ignore_index": int(target[1])},
    ]

    def gradients(options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        options = options | {"linear_bias": b}
        loss = memeff.linear_cross_entropy(
            x, w, target.clamp(min=0), reduction=reduction, **options
        )
        logprob = memeff.linear_logprobs(x, w, target.clamp(min=0), **options)
        return torch.autograd.grad((loss * 3).sum() + logprob.square().sum(), (x, w, b))

    expected = [gradients(options) for options in others]
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = [gradients(options) for options in others]
    for ours, wanted in zip(found, expected, strict=True):
        for a, e in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", [0, 1])
def test_sequence_lengths_do_not_recompile(reduction: str, shift: int) -> None:
    """One graph for the first length, one with a symbolic length, and no more."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(
        x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return memeff.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, shift=shift
        )

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    _, w, b = leaves_of(1)
    for length in (7, 9, 12, 30, 31, 64):
        x, target = leaves_of(3, length)[0], target_of(3, length)
        eager = differentiate(loss, (x, w, b), target)
        for found, expected in zip(differentiate(compiled, (x, w, b), target), eager, strict=True):
            assert torch.equal(found, expected)
    assert counter.frame_count <= 2


def test_marked_dynamic_length_compiles_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memeff.linear_cross_entropy, fullgraph=True, backend=counter)
    _, w, _ = leaves_of(1)
    for length in (7, 9, 30):
        x, target = leaves_of(length)[0], target_of(length)
        for tensor in (x, target):
            torch._dynamo.mark_dynamic(tensor, 0)
        compiled(x, w, target).backward()
    assert counter.frame_count == 1


def test_dynamic_numbers() -> None:
    """dynamic=True makes the coefficients symbolic, too."""
    compiled = torch.compile(
        memeff.linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    x, w, _ = leaves_of(6)
    target = target_of(6)
    for scale, cap in ((0.5, 3.0), (0.7, 4.0), (-1.5, 5.0)):
        options = {"logit_scale": scale, "softcap": cap, "label_smoothing": 0.1, "z_loss": 1e-2}
        found = compiled(x, w, target, **options)
        assert torch.equal(found, memeff.linear_cross_entropy(x, w, target, **options))


def test_num_items_as_int_does_not_recompile_each_step() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memeff.linear_cross_entropy, fullgraph=True, backend=counter)
    x, w, _ = leaves_of(6)
    target = target_of(6)
    for num_items in (11, 12, 19, 400):
        found = compiled(x, w, target, num_items=num_items)
        assert torch.equal(found, memeff.linear_cross_entropy(x, w, target, num_items=num_items))
    assert counter.frame_count <= 2


def test_errors_are_raised_through_the_compiler() -> None:
    compiled = torch.compile(memeff.linear_cross_entropy, backend="eager")
    with pytest.raises(Exception, match="softcap is -1"):
        compiled(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3).long(), softcap=-1.0)


def test_export() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = memeff.LinearCrossEntropyLoss(8, 19)

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.loss(x, target)

    model, x, target = Model(), torch.randn(6, 8), target_of(6)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(
        model, (x, target), dynamic_shapes={"x": {0: tokens}, "target": {0: tokens}}
    )
    x, target = torch.randn(11, 8), target_of(11)
    assert torch.equal(program.module()(x, target), model(x, target))
