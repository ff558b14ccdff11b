"""linear_loss: per-token losses of statistics, gradients in the forward pass."""

from __future__ import annotations

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
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Problem:
    def __init__(
        self, dtype: torch.dtype, tokens: int = 203, vocab: int = 700, features: int = 40
    ) -> None:
        self.x = torch.randn(tokens, features, dtype=torch.float64).to(dtype).requires_grad_()
        w = torch.randn(vocab, features, dtype=torch.float64) * 2 / features**0.5
        self.w = w.to(dtype).requires_grad_()
        self.b = torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_()
        self.target = torch.randint(vocab, (tokens,))
        self.target[torch.rand(tokens) < 0.3] = -100
        self.old = torch.randn(tokens).requires_grad_()
        self.scale = torch.tensor(0.7, requires_grad=True)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.w, self.b, self.old, self.scale]

    def in_float64(self) -> Problem:
        copy = Problem.__new__(Problem)
        copy.target = self.target
        for name in ("x", "w", "b", "old", "scale"):
            setattr(copy, name, getattr(self, name).detach().double().requires_grad_())
        return copy

    def per_token(self, logprob: Tensor, lse: Tensor, entropy: Tensor, old: Tensor) -> Tensor:
        """A loss that uses everything."""
        ratio = (logprob - old.clamp(-1, 1)).clamp(max=2).exp()
        return ratio * self.scale - 0.1 * entropy.square() + 0.01 * lse.square()

    def ours(self, **options: Any) -> Tensor:
        return memeff.linear_loss(
            lambda s, old: self.per_token(s.logprob, s.lse, s.entropy, old),
            self.x, self.w, self.target, self.old, linear_bias=self.b, entropy=True,
            **({"reduction": "sum"} | options),
        )  # fmt: skip

    def plain(
        self, reduction: str = "sum", logit_scale: float = 1.0, softcap: Any = None
    ) -> Tensor:
        z = F.linear(self.x, self.w, self.b)
        z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        log_p = z.log_softmax(-1)
        ignored = self.target == -100
        logprob = log_p.gather(1, self.target.masked_fill(ignored, 0)[:, None]).squeeze(1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        logprob = logprob.masked_fill(ignored, 0)
        losses = self.per_token(logprob, z.logsumexp(-1), entropy, self.old.to(z.dtype))
        losses = losses.masked_fill(ignored, 0)
        if reduction == "none":
            return losses
        return losses.sum() / (~ignored).sum() if reduction == "mean" else losses.sum()


NAMES = ("dx", "dw", "db", "old", "scale")


def check(p: Problem, planning: dict[str, Any], **options: Any) -> None:
    """Loss and gradients by the tolerance rule, twice."""
    exact = p.in_float64()
    ours = p.ours(**planning, **options)
    sides = [(p, ours), (p, p.plain(**options)), (exact, exact.plain(**options))]
    losses = [loss.detach() for _, loss in sides]
    assert_close_as_plain("loss", *losses, gradient=False)
    for scale in (1.5, -0.25):
        gradients = [
            torch.autograd.grad(loss * scale, q.leaves, retain_graph=True) for q, loss in sides
        ]
        for name, *three in zip(NAMES, *gradients, strict=True):
            assert_close_as_plain(name, *three)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "mean", "logit_scale": 1.3}, {"softcap": 4.0}], ids=str
)
def test_loss_and_gradients(
    dtype: torch.dtype, chunk_size: int | None, options: dict[str, Any]
) -> None:
    check(Problem(dtype), {"chunk_size": chunk_size}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_budget(dtype: torch.dtype) -> None:
    """Vocabulary slices: statistics of all tokens come before any gradient."""
    p = Problem(dtype, tokens=600)
    exact = p.in_float64()
    plain = torch.autograd.grad(p.plain(), p.leaves)
    expected = torch.autograd.grad(exact.plain(), exact.leaves)
    library = memeff.plan(600, 40, 700, dtype).library_bytes  # counts towards a budget, too
    for budget in (1_700_000, 2_500_000):
        ours = torch.autograd.grad(p.ours(memory_budget=library + budget), p.leaves)
        for name, *three in zip(NAMES, ours, plain, expected, strict=True):
            assert_close_as_plain(name, *three)


def test_equals_the_other_forms() -> None:
    """statistics, linear_loss and chunked_linear_apply: one loss."""
    p = Problem(torch.float64)

    def nll(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum")

    forms = [
        memeff.linear_loss(
            lambda s: -s.logprob, p.x, p.w, p.target, linear_bias=p.b, reduction="sum"
        ),
        -memeff.linear_logprobs(p.x, p.w, p.target, linear_bias=p.b).sum(),
        memeff.chunked_linear_apply(nll, p.x, p.w, p.target, linear_bias=p.b, chunk_size=30),
        memeff.linear_cross_entropy(p.x, p.w, p.target, linear_bias=p.b, reduction="sum"),
    ]
    results = [(f.detach(), *torch.autograd.grad(f, [p.x, p.w, p.b])) for f in forms]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rows_masked(dtype: torch.dtype) -> None:
    """No target anywhere: log-probabilities are 0, what depends on nothing else has no gradient,
    and the other statistics are those of the rows."""
    p = Problem(dtype)
    p.target.fill_(-100)
    loss = memeff.linear_loss(
        lambda s: -s.logprob, p.x, p.w, p.target, linear_bias=p.b, reduction="sum"
    )
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, [p.x, p.w, p.b]))
    check(p, {})


def test_gradcheck() -> None:
    p = Problem(torch.float64, tokens=5, vocab=7, features=3)

    def loss(x: Tensor, w: Tensor, b: Tensor, old: Tensor, scale: Tensor) -> Tensor:
        def of_tokens(s: memeff.LogitStatistics, old: Tensor) -> Tensor:
            return (s.logprob - old).exp() * scale + s.entropy.square() * s.lse

        return memeff.linear_loss(
            of_tokens, x, w, p.target, old, linear_bias=b, entropy=True, softcap=2.0,
            logit_scale=0.7, reduction="mean", chunk_size=2,
        )  # fmt: skip

    leaves = [p.x, p.w, p.b, p.old.detach().double().requires_grad_(), p.scale.double()]
    leaves[-1] = leaves[-1].detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 32])
def test_sum_of_logits(
    entropy: bool, softcap: float | None, reduction: str, chunk_size: int | None
) -> None:
    """Label smoothing that a caller writes, (1 - e) (lse - z_y) + e (lse - mean z)."""
    p = Problem(torch.float64)

    def smoothed(s: memeff.LogitStatistics) -> Tensor:
        return -0.8 * s.logprob + 0.2 * (s.lse - s.mean_logit) + 0 * s.logit_sum

    ours = memeff.linear_loss(
        smoothed, p.x, p.w, p.target, linear_bias=p.b, reduction=reduction, softcap=softcap,
        logit_sum=True, entropy=entropy, chunk_size=chunk_size,
    )  # fmt: skip
    z = F.linear(p.x, p.w, p.b)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = F.cross_entropy(z, p.target, label_smoothing=0.2, reduction=reduction)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(loss, (p.x, p.w, p.b), upstream) for loss in (ours, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inside_compiled_code(backend: str) -> None:
    """The call breaks the graph; what surrounds it is compiled. The same bits either way."""
    p = Problem(torch.float32)

    def step(x: Tensor, w: Tensor, b: Tensor, old: Tensor) -> Tensor:
        loss = memeff.linear_loss(
            lambda s, old: (s.logprob - old).exp(), x * 2, w, p.target, old, linear_bias=b
        )
        return loss * 3

    leaves = p.leaves[:-1]
    eager, compiled = step(*leaves), torch.compile(step, backend=backend)(*leaves)
    assert torch.equal(eager, compiled)
    for a, b in zip(
        torch.autograd.grad(eager, leaves), torch.autograd.grad(compiled, leaves), strict=True
    ):
        assert torch.equal(a, b)


def measure(dtype: str, budget: int) -> dict[str, int]:
    def step(tokens: int, vocab: int) -> tuple[int, int]:
        p = Problem(getattr(torch, dtype), tokens, vocab, features=96)
        with PeakMemory() as peak:
            p.ours(memory_budget=budget).backward()
        return peak.extra_bytes, sum(leaf.grad.nbytes for leaf in p.leaves)

    step(64, 512)
    peak, gradients = step(4096, 32777)
    return {"over": peak - gradients}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_budget(dtype: str) -> None:
    """The logits would take 256 MiB in bfloat16."""
    measured = call_isolated(measure, dtype=dtype, budget=16 * MIB)
    # What a plain loss may take over its plan (test_memory.py), and a few numbers per token.
    assert measured["over"] <= 16 * MIB + 3 * MIB, measured


@pytest.mark.parametrize("several", [False, True])
def test_shapes_and_partial_gradients(several: bool) -> None:
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    w = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(11, (3, 5, 2) if several else (3, 5))
    mask = torch.rand(3, 5) < 0.5
    shapes = []

    def fn(s: memeff.LogitStatistics, mask: Tensor) -> Tensor:
        assert s.logprob is not None and s.entropy is None
        shapes.append(s.logprob.shape[1:])
        return (s.logprob.sum(-1) if several else s.logprob) * mask

    ours = memeff.linear_loss(fn, x, w, y, mask, chunk_size=4, reduction="sum")
    assert set(shapes) == {(2,) if several else ()}
    picked = memeff.linear_logprobs(x, w, y)
    expected = ((picked.sum(-1) if several else picked) * mask).sum()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, w), torch.autograd.grad(expected, w))
    without = memeff.linear_loss(fn, x, w.detach(), y, mask, reduction="sum")
    torch.testing.assert_close(without, expected.detach())
    assert memeff.linear_loss(fn, x[:0], w, y[:0], mask[:0], reduction="sum") == 0
    constant = memeff.linear_loss(lambda s: s.lse.detach(), x, w, None)
    assert not torch.autograd.grad(constant, w)[0].any()


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(2.5)], ids=str)
def test_mean_is_that_of_linear_cross_entropy(num_items: int | Tensor | None) -> None:
    """Over tokens that have a target, or over num_items; "mean" is the default."""
    p = Problem(torch.float64)
    ours = memeff.linear_loss(lambda s: -s.logprob, p.x, p.w, p.target, num_items=num_items)
    theirs = memeff.linear_cross_entropy(p.x, p.w, p.target, num_items=num_items)
    torch.testing.assert_close(ours, theirs)
    pairs = (torch.autograd.grad(loss, [p.x, p.w]) for loss in (ours, theirs))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
    # A token counts if one of its targets does; without targets all tokens do.
    two = torch.stack([p.target, torch.full_like(p.target, -100)], 1)
    both = memeff.linear_loss(lambda s: -s.logprob.sum(-1), p.x, p.w, two, num_items=num_items)
    torch.testing.assert_close(both, theirs)
    lse = memeff.linear_loss(lambda s: s.lse, p.x, p.w, None)
    torch.testing.assert_close(lse, F.linear(p.x, p.w).logsumexp(-1).mean())


@pytest.mark.parametrize("grad", [False, True])
def test_mean_over_two_dimensions(grad: bool) -> None:
    """Of all B T tokens, or of those with a target."""
    x, w = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    x.requires_grad_(grad)
    target = torch.randint(20, (3, 5))
    target[1, 2:] = -100
    lse = F.linear(x, w).logsumexp(-1)
    torch.testing.assert_close(memeff.linear_loss(lambda s: s.lse, x, w, None), lse.mean())
    ours = memeff.linear_loss(lambda s: -s.logprob, x, w, target)
    expected = F.cross_entropy(F.linear(x, w).flatten(0, 1), target.flatten())
    torch.testing.assert_close(ours, expected)


def test_float16_with_a_loss_scale() -> None:
    """Gradients that fp16 has no numbers for until the loss is scaled."""
    p = Problem(torch.float16)
    gradients = []
    for q in (p, p.in_float64()):
        loss = memeff.linear_loss(
            lambda s: -1e-7 * s.logprob, q.x, q.w, q.target, linear_bias=q.b, reduction="sum"
        )
        gradients.append(torch.autograd.grad(loss * 2.0**22, [q.x, q.w, q.b]))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_losses_per_token(dtype: torch.dtype) -> None:
    p = Problem(dtype)
    lead = (7, 29)
    x, target, old = (t.view(*lead, *t.shape[1:]) for t in (p.x, p.target, p.old))
    ours = memeff.linear_loss(
        lambda s, old: p.per_token(s.logprob, s.lse, s.entropy, old),
        x, p.w, target, old, linear_bias=p.b, entropy=True, reduction="none",
    )  # fmt: skip
    assert ours.shape == lead
    upstream = torch.randn(lead)
    gradients = torch.autograd.grad(ours, p.leaves, upstream.to(ours.dtype))
    exact = p.in_float64()
    sides = []
    for q in (p, exact):
        losses = q.plain(reduction="none").view(lead)
        sides.append(torch.autograd.grad(losses, q.leaves, upstream.to(losses.dtype)))
    for name, *three in zip(NAMES, gradients, *sides, strict=True):
        assert_close_as_plain(name, *three)


def test_errors() -> None:
    p = Problem(torch.float32)
    with pytest.raises(RuntimeError, match=r"fn returned shape \(\) for"):
        memeff.linear_loss(lambda s: s.lse.sum(), p.x, p.w, p.target)
    outside = p.scale * 2
    with pytest.raises(RuntimeError, match="fn closes over a result"):
        memeff.linear_loss(lambda s: s.lse * outside, p.x, p.w, p.target)
    with pytest.raises(ValueError, match="reduction is 'max'"):
        memeff.linear_loss(lambda s: s.lse, p.x, p.w, p.target, reduction="max")
    with pytest.raises(ValueError, match="num_items is given with reduction='sum'"):
        memeff.linear_loss(lambda s: s.lse, p.x, p.w, p.target, reduction="sum", num_items=3)
    with pytest.raises(RuntimeError, match=r"per_token_tensors\[0\] has shape"):
        memeff.linear_loss(lambda s, t: s.lse, p.x, p.w, p.target, torch.zeros(3))
    loss = memeff.linear_loss(lambda s: s.lse, p.x, p.w, p.target)  # still works afterwards
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, p.x, create_graph=True)
