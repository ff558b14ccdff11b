"""Token statistics and linear_loss of K-dimensional weights: those of each of the classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memeff

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
N, D, V = 9, 6, 21
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Heads:
    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        positions: tuple[int, ...] = (2, 3),
        lead: tuple[int, ...] = (N,),
        targets: tuple[int, ...] = (),
    ) -> None:
        self.positions = positions
        self.x = torch.randn(*lead, D).to(dtype).requires_grad_()
        self.w = torch.randn(V, *positions, D).to(dtype).requires_grad_()
        self.b = torch.randn(V, *positions).to(dtype).requires_grad_()
        self.target = torch.randint(V, (*lead, *positions, *targets))
        self.target[torch.rand(self.target.shape) < 0.3] = -100
        self.temperature = torch.rand(lead) + 0.5

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.w, self.b]

    def each(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """linear_weight, linear_bias and target of each position."""
        lead = self.x.dim() - 1
        w = self.w.flatten(1, -2).unbind(1)
        b = self.b.flatten(1).unbind(1)
        y = self.target.flatten(lead, lead + len(self.positions) - 1).unbind(lead)
        return list(zip(w, b, y, strict=True))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0, "logit_scale": 0.7, "logit_sum": True, "log_sum_sq_probs": True},
    {"top_k": 4, "entropy": False, "argmax": False, "temperature": True},
    {"skip_ignored": True, "chunk_size": 4, "logit_sum": True, "top_k": 2},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("targets", [(), (2,)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_position(
    dtype: torch.dtype,
    positions: tuple[int, ...],
    targets: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    """The same bits as a call for each position; and gradients, but for the order of sums."""
    p = Heads(dtype, positions, targets=targets)
    options = {k: p.temperature if k == "temperature" else v for k, v in options.items()}
    ours = memeff.linear_token_statistics(p.x, p.w, p.target, linear_bias=p.b, **options)
    alone = [
        memeff.linear_token_statistics(p.x, w, y, linear_bias=b, **options) for w, b, y in p.each()
    ]
    losses = [ours.lse.new_zeros(()), ours.lse.new_zeros(())]
    for name, field in ours._asdict().items():
        parts = [getattr(one, name) for one in alone]
        if field is None:
            assert parts == [None] * len(parts)
            continue
        expected = torch.stack(parts, 1)
        expected = expected.unflatten(1, positions)
        assert torch.equal(field, expected), name
        if field.requires_grad:
            upstream = torch.randn_like(field)
            losses = [
                loss + (value * upstream).sum()
                for loss, value in zip(losses, (field, expected), strict=True)
            ]
    eps = torch.finfo(dtype).eps
    for a, b in zip(*(torch.autograd.grad(loss, p.leaves) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * b.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lead", [(4,), (2, 5)], ids=str)
@pytest.mark.parametrize("targets", [(), (2,)], ids=str)
def test_reference(
    options: dict[str, Any], lead: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    p = Heads(lead=lead, targets=targets)
    options = {k: p.temperature if k == "temperature" else v for k, v in options.items()}
    results = []
    for backend in ("cpu", "reference"):
        s = memeff.linear_token_statistics(
            p.x, p.w, p.target, linear_bias=p.b, backend=backend, **options
        )
        loss = (s.logprob * s.lse.detach().reshape(*lead, 2, 3, *[1] * len(targets))).sum()
        loss = loss + s.lse.square().sum()
        results.append((s, torch.autograd.grad(loss, p.leaves)))
    (ours, gradients), (expected, expected_gradients) = results
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-10, atol=1e-10), name
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_shift_and_logprobs() -> None:
    p = Heads(lead=(2, 7))
    ours = memeff.linear_logprobs(p.x, p.w, p.target, linear_bias=p.b, shift=2)
    assert ours.shape == (2, 5, 2, 3)
    z = torch.einsum("btd,vijd->btijv", p.x, p.w) + p.b.movedim(0, -1)
    later = p.target[:, 2:]
    picked = z[:, :5].log_softmax(-1).gather(-1, later.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(ours, picked.masked_fill(later == -100, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("targets", [(), (2,)], ids=str)
def test_linear_loss(dtype: torch.dtype, reduction: str, targets: tuple[int, ...]) -> None:
    """Every position of a token is a token of its own."""
    p = Heads(dtype, targets=targets)
    old = torch.randn(N, 2, 3, requires_grad=True)

    def fn(s: memeff.LogitStatistics, old: Tensor) -> Tensor:
        assert s.logprob is not None and s.entropy is not None
        logprob = s.logprob.sum(-1) if targets else s.logprob
        return (logprob - old).tanh() + 0.1 * s.entropy * s.lse

    ours = memeff.linear_loss(
        fn, p.x, p.w, p.target, old, linear_bias=p.b, entropy=True, reduction=reduction
    )
    s = memeff.linear_token_statistics(
        p.x, p.w, p.target, linear_bias=p.b, skip_ignored=True, argmax=False
    )
    ignored = p.target == -100
    ignored = ignored.all(-1) if targets else ignored
    losses = fn(s, old).masked_fill(ignored, 0)
    expected = losses
    if reduction != "none":
        expected = losses.sum() / ((~ignored).sum() if reduction == "mean" else 1)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(ours)
    leaves = [*p.leaves, old]
    eps = torch.finfo(dtype).eps
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=max(8 * eps, 1e-6) * scale)


def test_mean_with_num_items_and_without_targets() -> None:
    p = Heads()
    total = memeff.linear_loss(lambda s: s.lse, p.x, p.w, None, reduction="sum")
    mean = memeff.linear_loss(lambda s: s.lse, p.x, p.w, None)
    torch.testing.assert_close(mean, total / (N * 6))
    mean = memeff.linear_loss(lambda s: s.lse, p.x, p.w, None, num_items=5)
    torch.testing.assert_close(mean, total / 5)


def test_one_graph_when_compiled() -> None:
    p = Heads(torch.float32)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        s = memeff.linear_token_statistics(x, w, p.target, linear_bias=b)
        assert s.logprob is not None and s.entropy is not None
        return (s.logprob * s.entropy).sum()

    eager, compiled = (
        step(*p.leaves), torch.compile(step, backend="aot_eager", fullgraph=True)(*p.leaves)
    )  # fmt: skip
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, p.leaves), torch.autograd.grad(eager, p.leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_memory_budget() -> None:
    """It holds for each of the positions, which run one after the other."""
    p = Heads(torch.float32)
    with pytest.raises(ValueError, match="the minimum is") as caught:
        memeff.linear_token_statistics(p.x, p.w, p.target, linear_bias=p.b, memory_budget=1)
    least = int(str(caught.value).split("the minimum is ")[1].split()[0])
    s = memeff.linear_token_statistics(p.x, p.w, p.target, linear_bias=p.b, memory_budget=least)
    s.lse.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(N, 2).long()}, r"target has shape \(9, 2\), expected \(9, 2, 3\)"),
        ({"target": torch.zeros(N, 2, 3, 1, 1).long()}, r"one dimension more with several"),
        ({"linear_bias": torch.zeros(V)}, r"linear_bias has shape \(21,\), expected \(21, 2, 3\)"),
        ({"input": torch.zeros(D)}, r"linear_weight with shape .* is K-dimensional"),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], message: str) -> None:
    p = Heads(torch.float32)
    given = {"input": p.x, "linear_weight": p.w, "target": p.target, "linear_bias": p.b, **change}
    with pytest.raises(RuntimeError, match=message):
        memeff.linear_token_statistics(**given)


def test_errors_of_linear_loss() -> None:
    p = Heads(torch.float32)
    with pytest.raises(RuntimeError, match=r"begins with \(9, 2, 3\).*positions of linear_weight"):
        memeff.linear_loss(lambda s, a: s.lse, p.x, p.w, p.target, torch.zeros(N, 2))
    with pytest.raises(RuntimeError, match="expected at least one position"):
        memeff.linear_loss(lambda s: s.lse, p.x, torch.zeros(V, 0, D), None)
