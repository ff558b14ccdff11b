"""Random programs of views, copies, writes and uses of logits: plain ones' numbers, or an error.

Plain logits share memory with their views, lazy ones have none: what a write changes, and what was
taken before it, is where lazy logits could be wrong without a word.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazy_cases import VOCAB, Comparison
from torch import Tensor

V = VOCAB
PROGRAMS = 40
_CLASSES = torch.arange(V)
_BIAS = torch.randn(V, generator=torch.Generator().manual_seed(1))

# They take logits [..., V] of two dimensions or more.
VIEWS_AND_COPIES: list[Callable[[Any], Any]] = [
    lambda z: z.reshape(-1, V),
    lambda z: z[1:] if len(z) > 1 else z[:],
    lambda z: z[-1:],
    lambda z: z.unsqueeze(0),
    lambda z: z.transpose(0, -2),
    lambda z: z.transpose(-1, -2).transpose(-1, -2),
    lambda z: z.unbind(0)[0] if z.dim() > 2 else z,
    lambda z: z[torch.zeros(2, dtype=torch.int64)],
    lambda z: z.detach(),
    lambda z: z.float(),
    lambda z: z.contiguous(),
    lambda z: z.clone(),
    lambda z: z.double().float(),
    lambda z: z * -0.7,
    lambda z: z + _BIAS,
    lambda z: torch.tanh(z / 3) * 3,
    lambda z: z.log_softmax(-1),
    lambda z: z.exp(),
]
WRITES: list[Callable[[Any], Any]] = [
    lambda z: z.mul_(0.5),
    lambda z: z.neg_(),
    lambda z: z.tanh_(),
    lambda z: z.zero_(),
    lambda z: z.masked_fill_(_CLASSES > 50, -5.0),
    lambda z: z.__setitem__(0, 1.0),
    lambda z: z.add_(_BIAS),
]
USES: list[Callable[[Any], Tensor]] = [
    lambda z: z.logsumexp(-1),
    lambda z: F.cross_entropy(z.reshape(-1, V), torch.arange(z.numel() // V) % V),
    lambda z: z.gather(-1, torch.full((*z.shape[:-1], 1), 5)),
    lambda z: z.topk(3).values,
    lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    lambda z: z.mean(),
    lambda z: z[..., :3] * 1.0,
    lambda z: z.exp().mean(-1),
]


def run(z: Any, rng: random.Random) -> list[Tensor]:
    """What a program of some steps, and at the end every value it has, makes of logits."""
    values, results = [z], []
    for _ in range(rng.randint(2, 7)):
        functions = rng.choice([VIEWS_AND_COPIES] * 4 + [WRITES] * 3 + [USES] * 2)
        function, value = rng.choice(functions), rng.choice(values)
        with torch.set_grad_enabled(rng.random() > 0.2):
            result = function(value)
        if functions is VIEWS_AND_COPIES:
            values.append(result)
        elif functions is USES:
            results.append(result)
    return results + [value.logsumexp(-1) for value in values]


def weighted(result: Tensor) -> Tensor:
    """A sum whose gradient is neither 1 nor uniform."""
    return (result * torch.linspace(0.5, 1.5, result.numel()).view(result.shape)).sum()


@pytest.mark.filterwarnings("ignore:.*computed the logits")
def test_programs(seed: int) -> None:
    compared = refused = 0
    for program in range(PROGRAMS):
        c = Comparison((3, 5), strict=False)
        outcomes: list[Any] = []
        for side in (c.plain, c.lazy):
            try:
                results = run(side.head(side.hidden), random.Random(seed * PROGRAMS + program))
                sum(weighted(result) for result in results).backward()
                outcomes.append(results)
            except RuntimeError as error:
                outcomes.append(error)
        plain, lazy = outcomes
        if isinstance(plain, RuntimeError):
            continue  # autograd refuses such writes
        if isinstance(lazy, RuntimeError):
            assert "modified in place" in str(lazy), program
            refused += 1
            continue
        compared += 1
        for ours, theirs in zip(lazy, plain, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-5)
        for name, leaf in c.lazy.leaves.items():
            ours, theirs = (x.grad for x in (leaf, c.plain.leaves[name]))
            if theirs is not None:
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6, (program, name)
    assert compared > PROGRAMS / 2 and refused < PROGRAMS / 4
