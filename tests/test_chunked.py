"""chunked_linear_apply: any function of the logits, differentiated by autograd, chunk by chunk."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_as_plain
from torch import Tensor

import memeff
from memeff.bench.isolated import call_isolated
from memeff.bench.memory import PeakMemory

MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h
LEAD, FEATURES, VOCAB = (3, 7), 5, 11
TOKENS = 21
CHUNKS = [1, 4, 13, TOKENS, 100]  # single tokens, ragged ones, a prime, all at once, more than all


class Problem:
    """Leaves in float64, whole and as rows."""

    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = True) -> None:
        self.x = torch.randn(*LEAD, FEATURES, dtype=dtype, requires_grad=True)
        self.w = torch.randn(VOCAB, FEATURES, dtype=dtype, requires_grad=True)
        self.b = torch.randn(VOCAB, dtype=dtype, requires_grad=True) if bias else None
        self.target = torch.randint(VOCAB, LEAD)
        self.target[torch.rand(LEAD) < 0.3] = -100
        self.scale = torch.rand(*LEAD, dtype=torch.float64, requires_grad=True)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.w, self.b, self.scale) if t is not None]

    def logits(self) -> Tensor:
        return F.linear(self.x, self.w, self.b).flatten(0, 1)

    def apply(self, fn: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
        return memeff.chunked_linear_apply(
            fn, self.x, self.w, *tensors, linear_bias=self.b, **options
        )


def assert_gradients(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Equal results and gradients, for an upstream gradient that is not uniform, twice."""
    torch.testing.assert_close(ours, expected.reshape(ours.shape))
    upstream = torch.randn_like(ours)
    for _ in range(2):
        for a, b in zip(
            torch.autograd.grad(ours, leaves, upstream, retain_graph=True, allow_unused=True),
            torch.autograd.grad(
                expected, leaves, upstream.reshape(expected.shape), retain_graph=True,
                allow_unused=True,
            ),
            strict=True,
        ):  # fmt: skip
            if b is not None:
                torch.testing.assert_close(a, b)
            else:
                assert a is None or not a.any()


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def focal(z: Tensor, y: Tensor) -> Tensor:
    logp = z.log_softmax(-1).gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
    return -((1 - logp.exp()) ** 2 * logp * (y != -100)).sum()


def squared_error(z: Tensor, y: Tensor) -> Tensor:
    return (z - F.one_hot(y.clamp(min=0), z.shape[-1])).square().sum()


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.3, reduction="sum")


def kl_to_uniform(z: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / z.shape[-1]), reduction="sum")


LOSSES = [cross_entropy, focal, squared_error, smoothed, kl_to_uniform]


@pytest.mark.parametrize("fn", LOSSES, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scalar(fn: Any, chunk_size: int, recompute: bool, bias: bool) -> None:
    p = Problem(bias=bias)
    ours = p.apply(fn, p.target, chunk_size=chunk_size, recompute=recompute)
    assert_gradients(ours, fn(p.logits(), p.target.flatten()), p.leaves[:-1])


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("shape", [(), (2,), (VOCAB, 3)], ids=str)
def test_results_per_token(chunk_size: int, shape: tuple[int, ...]) -> None:
    p = Problem()

    def fn(z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        logp = z.log_softmax(-1) * scale[:, None]
        if shape == ():
            return logp.gather(-1, y.clamp(min=0)[:, None]).squeeze(-1)
        return logp[:, :2] if shape == (2,) else torch.stack([logp, z, z * z], -1)

    ours = p.apply(fn, p.target, p.scale, chunk_size=chunk_size)
    assert ours.shape == LEAD + shape
    assert_gradients(ours, fn(p.logits(), p.target.flatten(), p.scale.flatten()), p.leaves)


@pytest.mark.parametrize("recompute", [None, True])
def test_tuples(recompute: bool | None) -> None:
    """Several results of different kinds; each may be differentiated, with the others or alone."""
    p = Problem()

    def fn(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return z.logsumexp(-1), z.argmax(-1), z.square().sum(), (y != -100).sum()

    ours = p.apply(fn, p.target, chunk_size=5, recompute=recompute)
    expected = fn(p.logits(), p.target.flatten())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape))
    assert_gradients(ours[0], expected[0], p.leaves[:-1])
    assert_gradients(ours[2], expected[2], p.leaves[:-1])
    both = ours[0].square().sum() * ours[2]
    assert_gradients(both, expected[0].square().sum() * expected[2], p.leaves[:-1])


def test_one_differentiable_scalar_among_others_is_computed_once() -> None:
    p = Problem()
    calls = []

    def fn(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(z))
        return cross_entropy(z, y), z.argmax(-1)

    loss, argmax = p.apply(fn, p.target, chunk_size=8)
    loss.backward()
    assert calls == [8, 8, 5]
    assert argmax.shape == LEAD


@pytest.mark.parametrize("recompute", [None, True])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_closures(recompute: bool | None, scalar: bool, leaf: bool) -> None:
    """Parameters, and results of other computations, that fn closes over get their gradients."""
    p = Problem()
    raw = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    module = torch.nn.Linear(VOCAB, 1).double()
    temperature = raw if leaf else raw.exp()

    def fn(z: Tensor) -> Tensor:
        result = module((z * temperature).tanh()).squeeze(-1)
        return result.sum() if scalar else result

    leaves = [*p.leaves[:-1], raw, *module.parameters()]
    ours, expected = p.apply(fn, chunk_size=4, recompute=recompute), fn(p.logits())
    assert_gradients(ours, expected, leaves)
    # Alone, without the gradients of the projection.
    assert_gradients(ours, expected, [raw])


def test_closures_accumulate_in_grad() -> None:
    p = Problem()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for recompute in (False, True):
        scale.grad = None
        p.apply(lambda z: (z * scale).sum(), chunk_size=4, recompute=recompute).backward()
        torch.testing.assert_close(scale.grad, p.logits().sum())


@pytest.mark.parametrize("frozen", ["x", "w", "b", "all"])
@pytest.mark.parametrize("recompute", [None, True])
def test_frozen(frozen: str, recompute: bool | None) -> None:
    p = Problem()
    for name in ("x", "w", "b") if frozen == "all" else (frozen,):
        getattr(p, name).requires_grad_(False)
    leaves = [t for t in p.leaves if t.requires_grad]

    def fn(z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return (z.logsumexp(-1) * scale).sum()

    ours = p.apply(fn, p.target, p.scale, chunk_size=4, recompute=recompute)
    assert_gradients(ours, fn(p.logits(), p.target.flatten(), p.scale.flatten()), leaves)


def test_without_gradients() -> None:
    p = Problem()
    with torch.no_grad():
        result = p.apply(lambda z: z.sum(-1), chunk_size=4)
    assert not result.requires_grad
    torch.testing.assert_close(result.flatten(), p.logits().sum(-1))
    assert not p.apply(lambda z: z.argmax(-1)).requires_grad


@pytest.mark.parametrize("recompute", [None, True])
def test_no_tokens(recompute: bool | None) -> None:
    x = torch.randn(2, 0, 5, requires_grad=True)
    w = torch.randn(11, 5, requires_grad=True)
    loss, logp = memeff.chunked_linear_apply(
        lambda z: (z.sum(), z.log_softmax(-1)), x, w, recompute=recompute
    )
    assert loss == 0 and logp.shape == (2, 0, 11)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert dx.shape == x.shape and not dw.any()


@pytest.mark.parametrize("scalar", [False, True])
def test_dropout_is_the_same_when_computed_again(scalar: bool) -> None:
    p = Problem()

    def fn(z: Tensor) -> Tensor:
        return F.dropout(z, 0.5).sum() if scalar else F.dropout(z, 0.5)

    for recompute in (None, True):
        torch.manual_seed(1)
        ours = p.apply(fn, chunk_size=TOKENS, recompute=recompute)
        torch.manual_seed(5)  # what happens before backward
        ours_gradient = torch.autograd.grad(ours.sum(), p.x)[0]
        torch.manual_seed(1)
        expected = fn(p.logits())
        torch.testing.assert_close(ours.flatten(), expected.flatten())
        torch.testing.assert_close(ours_gradient, torch.autograd.grad(expected.sum(), p.x)[0])


@pytest.mark.parametrize("recompute", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(recompute: bool | None, dtype: torch.dtype) -> None:
    """Logits come from bfloat16 operands; what fn does under autocast it does again."""
    x = torch.randn(40, 32, dtype=dtype, requires_grad=True)
    w = torch.randn(64, 32, requires_grad=True)  # float32 with 16-bit activations
    v = torch.randn(64, 8)
    seen = []

    def fn(z: Tensor) -> Tensor:
        product = z @ v
        seen.append((z.dtype, product.dtype))
        return product.float().square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = memeff.chunked_linear_apply(fn, x, w, chunk_size=16, recompute=recompute)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert dx.dtype == dtype and dw.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fn(F.linear(x, w).float())
    expected_dx, expected_dw = torch.autograd.grad(expected, (x, w))
    torch.testing.assert_close(dx, expected_dx, rtol=0.05, atol=0.05 * expected_dx.abs().max())
    torch.testing.assert_close(dw, expected_dw, rtol=0.05, atol=0.05 * expected_dw.abs().max())


def random_function(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that no library can know: a random composition of differentiable operations."""
    rng = random.Random(seed)
    steps: list[Callable[[Tensor], Tensor]] = [
        torch.tanh, torch.sin, F.softplus, torch.atan, lambda t: t.log_softmax(-1),
        lambda t: t * t.sigmoid(), lambda t: t - t.mean(-1, keepdim=True), lambda t: t.cumsum(-1),
    ]  # fmt: skip
    chosen = rng.choices(steps, k=4)
    weights = [rng.uniform(-2, 2) for _ in chosen]

    def fn(z: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros_like(z)
        for weight, step in zip(weights, chosen, strict=True):
            z = step(z)
            total = total + weight * z
        return (total * (y[:, None] + 1)).square().mean(-1)

    return fn


@pytest.mark.parametrize("draw", range(5))
def test_unknown_functions(draw: int, seed: int) -> None:
    fn = random_function(1000 * seed + draw)
    p = Problem()
    expected = fn(p.logits(), p.target.flatten())
    assert_gradients(p.apply(fn, p.target, chunk_size=6), expected, p.leaves[:-1])
    scalar = p.apply(lambda z, y: fn(z, y).sum(), p.target, chunk_size=6)
    assert_gradients(scalar, expected.sum(), p.leaves[:-1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_numerics(dtype: torch.dtype, recompute: bool) -> None:
    """Not farther from float64 than the standard way with its float32 upcast."""
    tokens, features, vocab = 256, 64, 512
    x, w = torch.randn(tokens, features), torch.randn(vocab, features) * 3 / features**0.5
    y = torch.randint(vocab, (tokens,))
    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()

    def standard(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        z = F.linear(x, w)
        loss = cross_entropy(z if z.dtype == torch.float64 else z.float(), y)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    loss = memeff.chunked_linear_apply(cross_entropy, x, w, y, chunk_size=48, recompute=recompute)
    ours = (loss.detach(), *torch.autograd.grad(loss, (x, w)))
    plain = standard(x, w)
    exact = standard(x.detach().double().requires_grad_(), w.detach().double().requires_grad_())
    for name, *three in zip(("loss", "dx", "dw"), ours, plain, exact, strict=True):
        assert_close_as_plain(name, *three, gradient=name != "loss")


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_gradients_are_rounded_once(recompute: bool) -> None:
    """However many chunks there are, and after the upstream gradient."""
    x, w = torch.randn(200, 64).bfloat16(), torch.randn(512, 64).bfloat16()
    y = torch.randint(512, (200,))
    leaves = [x.requires_grad_(), w.requires_grad_()]
    loss = memeff.chunked_linear_apply(cross_entropy, x, w, y, chunk_size=7, recompute=recompute)
    ours = torch.autograd.grad(loss * 1.7, leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(cross_entropy(F.linear(*doubles), y) * 1.7, doubles)
    for name, a, e in zip(("dx", "dw"), ours, exact, strict=True):
        error, rounding = ((t.double() - e).norm() for t in (a, e.bfloat16()))
        assert error <= 1.05 * rounding, (name, error / rounding)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute: bool) -> None:
    p = Problem()
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def total(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, t: Tensor) -> Tensor:
        def fn(z: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            return F.cross_entropy(z * scale[:, None] / t, y, reduction="sum")

        return memeff.chunked_linear_apply(
            fn, x, w, p.target, scale, linear_bias=b, chunk_size=5, recompute=recompute
        )

    assert torch.autograd.gradcheck(total, [*p.leaves, temperature])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_parameter_whose_gradient_is_expanded(recompute: bool) -> None:
    """The sum of a parameter has ones as its gradient, one element seen as many."""
    p, parameter = Problem(), torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = p.apply(
        lambda z: z.square().sum() + parameter.sum(), chunk_size=TOKENS, recompute=recompute
    )
    (gradient,) = torch.autograd.grad(loss * 2, parameter)
    torch.testing.assert_close(gradient, torch.full_like(parameter, 2.0))


def test_float16_is_recomputed_by_default() -> None:
    """Gradients for an upstream gradient of 1 could underflow before a loss scale is applied."""
    x = torch.randn(8, 16, dtype=torch.float16, requires_grad=True)
    w = torch.randn(32, 16, dtype=torch.float16, requires_grad=True)
    loss = memeff.chunked_linear_apply(lambda z: (z * 1e-9).sum(), x, w)
    (dx,) = torch.autograd.grad(loss * 1e9, x)
    torch.testing.assert_close(
        dx, w.detach().float().sum(0).expand(8, 16).half(), rtol=0.02, atol=0.02
    )


def test_without_upcast() -> None:
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(32, 16, dtype=torch.bfloat16)
    result = memeff.chunked_linear_apply(lambda z: z, x, w, upcast=False)
    assert torch.equal(result, F.linear(x, w))


class _Breaks(torch.autograd.Function):
    """The identity, whose backward fails when it has been called often enough."""

    remaining = 0

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        _Breaks.remaining -= 1
        if _Breaks.remaining == 0:
            raise RuntimeError("broken")
        return gradient


@pytest.mark.parametrize("per_token", [False, True])
def test_a_backward_that_fails_leaves_nothing_behind(per_token: bool) -> None:
    p = Problem()

    def fn(z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(_Breaks.apply(z), y, reduction="none")
        return losses if per_token else losses.sum()

    _Breaks.remaining = 0
    result = p.apply(fn, p.target, chunk_size=9, recompute=True).sum()
    leaves = [p.x, p.w, p.b]
    expected = torch.autograd.grad(result, leaves, retain_graph=True)
    for fails_at in (2, 3):
        _Breaks.remaining = fails_at
        with pytest.raises(RuntimeError, match="broken"):
            torch.autograd.grad(result, leaves, retain_graph=True)
        ours = torch.autograd.grad(result, leaves, retain_graph=True)
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


def test_second_derivatives_are_refused() -> None:
    p = Problem()
    for recompute in (False, True):
        loss = p.apply(lambda z: z.square().sum(), chunk_size=8, recompute=recompute)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(loss, p.x, create_graph=True)


def test_inside_compiled_code() -> None:
    p = Problem()

    @torch.compile(backend="aot_eager")
    def step(x: Tensor, w: Tensor) -> Tensor:
        return memeff.chunked_linear_apply(cross_entropy, x * 2, w, p.target, chunk_size=8) * 3

    expected = cross_entropy(F.linear(p.x * 2, p.w).flatten(0, 1), p.target.flatten()) * 3
    assert_gradients(step(p.x, p.w), expected, [p.x, p.w])


def step(tokens: int, recompute: bool, budget: int) -> tuple[int, int]:
    x = torch.randn(tokens, 64, requires_grad=True)
    w = torch.randn(16384, 64, requires_grad=True)
    y = torch.randint(16384, (tokens,))
    with PeakMemory() as peak:
        loss = memeff.chunked_linear_apply(
            cross_entropy, x, w, y, memory_budget=budget, recompute=recompute
        )
        gradients = torch.autograd.grad(loss, (x, w))
    return peak.extra_bytes, sum(g.nbytes for g in gradients)


def measure(recompute: bool, budget: int) -> dict[str, int]:
    # By default glibc raises its threshold after the first large block, and keeps later ones in its
    # heap. What it keeps is not measured here, only what is in use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    step(32, recompute, budget)  # what torch allocates once
    peak, gradients = step(1024, recompute, budget)
    return {"over": peak - gradients}


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_budget(recompute: bool) -> None:
    """A quarter of what the logits alone would take (64 MiB)."""
    measured = call_isolated(measure, recompute=recompute, budget=16 * MIB)
    assert measured["over"] <= 16 * MIB + 8 * MIB, measured


def test_budget_becomes_a_chunk_size() -> None:
    x, w = torch.randn(100, 4), torch.randn(1000, 4)
    sizes = []
    memeff.chunked_linear_apply(
        lambda z: sizes.append(len(z)) or z.sum(), x, w, memory_budget=30 * 4 * 4 * 1000
    )
    assert sizes == [30, 30, 30, 10]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([lambda z: 1.0], {}, TypeError, "fn returned float"),
        ([lambda z: z[:3]], {}, RuntimeError, r"shape \(3, 11\) for a chunk of 21 tokens"),
        ([lambda z: z], {"recompute": False}, RuntimeError, "not a scalar, it has shape"),
        ([lambda z: (z.sum(), z.sum())], {"recompute": False}, RuntimeError, "2 differentiable"),
        ([lambda z: z.sum()], {"chunk_size": 0}, ValueError, "chunk_size is 0"),
        ([lambda z: z.sum()], {"memory_budget": 10}, ValueError, "expected at least 352"),
        ([lambda z: z.sum()], {"memory_budget": 1, "chunk_size": 1}, ValueError, "only one"),
        ([lambda z, y: z.sum(), torch.zeros(7, 3)], {}, RuntimeError, r"per_token_tensors\[0\]"),
        ([lambda z, y: z.sum(), 3], {}, TypeError, r"per_token_tensors\[0\] must be a torch"),
    ],
)  # fmt: skip
def test_errors(arguments: Any, options: Any, error: Any, message: str) -> None:
    p = Problem()
    with pytest.raises(error, match=message):
        p.apply(*arguments, **options)
