"""The statistics of a token have the same bits whatever else a call computes.

Other tokens, the token's place among them, chunks, memory budgets, threads, gradients: each is
varied against one call for all tokens without gradients. Where torch's products compute the scores
nothing is promised (docs/numerics.md), so kernels are those that compute them by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import emulated
import pytest
import torch
from cases import DTYPES
from torch import Tensor

import memeff

FIELDS = ("lse", "logprob", "entropy", "max_logit", "argmax")
CPU_KERNELS = [
    ("avx512_bf16", torch.bfloat16),
    ("bf16_portable", torch.bfloat16),
    *(("batch_invariant", dtype) for dtype in DTYPES),
]
CUDA_KERNELS = [
    ("sm80,generic", torch.bfloat16),
    ("sm80,sm80", torch.float16),
    ("sm90,sm90", torch.bfloat16),
    ("sm90x2,sm90x2", torch.float16),
]


@dataclass
class Problem:
    x: Tensor
    w: Tensor
    b: Tensor
    y: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def draw(tokens: int, features: int, vocab: int, dtype: torch.dtype) -> Problem:
        x, w, b = torch.randn(tokens, features), torch.randn(vocab, features), torch.randn(vocab)
        b[torch.rand(vocab) < 0.1] = -math.inf
        y = torch.randint(vocab, (tokens,))
        y[b[y] == -math.inf] = int(b.argmax())
        return Problem(x.to(dtype), (w * 3 / features**0.5).to(dtype), b.to(dtype), y)

    def rows(self, tokens: Sequence[int]) -> Problem:
        """Of these tokens, in this order."""
        index = list(tokens)
        return Problem(self.x[index], self.w, self.b, self.y[index], self.options)

    def statistics(self, **options: Any) -> dict[str, Tensor]:
        result = memeff.linear_token_statistics(
            self.x, self.w, self.y, linear_bias=self.b,
            **{"entropy": True, "argmax": True, **self.options, **options},
        )  # fmt: skip
        return {name: value for name in FIELDS if (value := getattr(result, name)) is not None}

    def cross_entropy(self, gradients: bool, **options: Any) -> dict[str, Tensor]:
        """Statistics in addition to the mean, with gradients in the same pass or without any."""
        leaves = [t.detach().requires_grad_(gradients) for t in (self.x, self.w, self.b)]
        _, result = memeff.linear_cross_entropy(
            leaves[0], leaves[1], self.y, linear_bias=leaves[2], return_statistics=True,
            **self.options, **options,
        )  # fmt: skip
        return {name: getattr(result, name) for name in ("loss", *FIELDS)}

    def linear_loss(self, gradients: bool, **options: Any) -> dict[str, Tensor]:
        """What the function of `linear_loss` gets, chunk by chunk."""
        seen: list[memeff.LogitStatistics] = []

        def fn(s: memeff.LogitStatistics) -> Tensor:
            seen.append(
                memeff.LogitStatistics(*(v if v is None else v.detach().clone() for v in s))
            )
            assert s.logprob is not None and s.entropy is not None
            return s.lse * 0.1 - s.logprob - s.entropy

        leaves = [t.detach().requires_grad_(gradients) for t in (self.x, self.w, self.b)]
        memeff.linear_loss(
            fn, leaves[0], leaves[1], self.y, linear_bias=leaves[2], entropy=True,
            **self.options, **options,
        )  # fmt: skip
        return {
            name: torch.cat([getattr(s, name) for s in seen])
            for name in ("lse", "logprob", "entropy", "max_logit")
        }


def assert_same(ours: dict[str, Tensor], wanted: dict[str, Tensor], tokens: Sequence[int]) -> None:
    for name, values in ours.items():
        assert len(values) == len(tokens)
        assert torch.equal(values, wanted[name][list(tokens)]), name


def smallest_budget(call: Callable[[int], object]) -> int:
    with pytest.raises(ValueError, match="the minimum is") as caught:
        call(1)
    return int(str(caught.value).split("the minimum is ")[1].split()[0])


def check_places(p: Problem, wanted: dict[str, Tensor], several: Sequence[Sequence[int]]) -> None:
    """Some of the tokens, in other orders, and next to others that are not numbers."""
    for tokens in several:
        assert_same(p.rows(tokens).statistics(), wanted, tokens)
    broken = Problem(p.x.clone(), p.w, p.b, p.y, p.options)
    broken.x[::2], broken.x[::4] = math.nan, math.inf
    others = range(1, len(p.x), 2)
    ours = {name: values[1::2] for name, values in broken.statistics().items()}
    assert_same(ours, wanted, others)


def check_plans(p: Problem, wanted: dict[str, Tensor], chunks: Sequence[int]) -> None:
    """Chunks, budgets, gradients or not."""
    every = range(len(p.x))
    loss = p.cross_entropy(gradients=False)
    assert_same({name: loss[name] for name in FIELDS}, wanted, every)
    for gradients in (False, True):
        least = smallest_budget(lambda b, g=gradients: p.cross_entropy(g, memory_budget=b))
        assert_same(p.linear_loss(gradients), wanted, every)
        planning: list[dict[str, int]] = [{"memory_budget": int(least * f)} for f in (1, 2)]
        for plan in ({}, *planning, *({"chunk_size": size} for size in chunks)):
            assert_same(p.cross_entropy(gradients, **plan), loss, every)


# ---- CPU ----


@pytest.fixture(params=CPU_KERNELS, ids=lambda v: f"{v[0]}-{v[1]}".replace("torch.", ""))
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of the inputs, with the kernels chosen."""
    kernels, dtype = request.param
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", kernels)
    try:
        assert memeff.plan(8, 8, 8, dtype).kernels == kernels
    except ValueError as error:
        pytest.skip(str(error))
    assert isinstance(dtype, torch.dtype)
    return dtype


# Several blocks of the inner dimension, tiles and slices of classes, strips of tokens.
SIZES = (530, 460, 1000)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.7}], ids=str)
def test_places_and_neighbours(dtype: torch.dtype, options: dict[str, Any]) -> None:
    p = Problem.draw(*SIZES, dtype)
    p.options = options
    shuffled = torch.randperm(len(p.x)).tolist()
    several = [[7], [529], [3, 1], shuffled[:31], shuffled[:33], shuffled[:129], shuffled]
    check_places(p, p.statistics(), several)


def test_plans_and_gradients(dtype: torch.dtype) -> None:
    p = Problem.draw(*SIZES, dtype)
    check_plans(p, p.statistics(), chunks=(40, 300))


@pytest.mark.usefixtures("threads")
def test_threads(dtype: torch.dtype) -> None:
    p = Problem.draw(*SIZES, dtype)
    few = range(11, 16)
    torch.set_num_threads(1)
    wanted = p.statistics()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same(p.statistics(), wanted, range(len(p.x)))
        assert_same(p.rows(few).statistics(), wanted, few)


def test_what_else_is_wanted(dtype: torch.dtype) -> None:
    p = Problem.draw(40, 460, 1000, dtype)
    wanted = p.statistics()
    every = range(40)
    for options in ({"entropy": False}, {"argmax": False}, {"logit_sum": True}):
        assert_same(p.statistics(**options), wanted, every)
    many = Problem(p.x, p.w, p.b, torch.randint(1000, (40, 3)))
    many.y[:, 1] = p.y
    ours = many.statistics()
    ours["logprob"] = ours["logprob"][:, 1]
    assert_same(ours, wanted, every)


def test_every_option_of_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """MEMEFF_CPU_KERNELS=batch_invariant: also what the bf16 kernels leave to torch's products."""
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", "batch_invariant")
    p = Problem.draw(*SIZES, torch.bfloat16)
    p.options = {"softcap": 5.0}
    wanted = p.statistics()
    every = range(len(p.x))
    assert_same(p.linear_loss(gradients=True), wanted, every)
    assert_same(p.statistics(top_k=3), wanted, every)
    smoothed = p.cross_entropy(gradients=True, label_smoothing=0.1)
    assert_same({name: smoothed[name] for name in FIELDS}, wanted, every)


# ---- CUDA kernels, emulated ----


@pytest.fixture(params=CUDA_KERNELS, ids=lambda v: f"{v[0]}-{v[1]}".replace("torch.", ""))
def emulated_dtype(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.dtype]:
    """Of the inputs, with the kernels chosen."""
    if emulated.missing() is not None:
        pytest.skip(f"no emulator: {emulated.missing()}")
    kernels, dtype = request.param
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    with emulated.checked():
        yield dtype


def test_emulated(emulated_dtype: torch.dtype) -> None:
    """Two tiles of tokens, three of classes."""
    p = Problem.draw(133, 24, 300, emulated_dtype)
    p.options = {"backend": "emulated"}
    wanted = p.statistics()
    shuffled = torch.randperm(len(p.x)).tolist()
    check_places(p, wanted, [[7], shuffled[:5], shuffled])
    every = range(len(p.x))
    loss = p.cross_entropy(gradients=False)
    assert_same({name: loss[name] for name in FIELDS}, wanted, every)
    least = smallest_budget(lambda budget: p.cross_entropy(True, memory_budget=budget))
    for planning in ({}, {"memory_budget": least}, {"chunk_size": 40}):
        assert_same(p.cross_entropy(True, **planning), loss, every)
    assert_same(p.linear_loss(gradients=True), wanted, every)
