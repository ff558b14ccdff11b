"""Distillation against full logits, and a plain autograd implementation in float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import assert_same, heads
from tolerances import assert_close_as_plain
from torch import Tensor

from memeff import losses
from memeff._heads import Head
from memeff.bench.isolated import call_isolated
from memeff.bench.memory import PeakMemory

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h
BETAS = [0.0, 0.3, 1.0]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation(beta: float, chunk_size: int, temperature: float) -> None:
    x, w, b = heads()
    teacher_x, teacher_w = torch.randn(3, 4, 9).double(), torch.randn(17, 9).double()
    mask = torch.rand(3, 4) < 0.6
    ours = losses.linear_distillation_loss(
        x, w, teacher_x, teacher_w, mask, student_bias=b, beta=beta, temperature=temperature,
        chunk_size=chunk_size,
    )  # fmt: skip
    p = (F.linear(x, w, b) / temperature).softmax(-1)
    q = (teacher_x @ teacher_w.T / temperature).softmax(-1)
    m = beta * q + (1 - beta) * p

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1)

    expected = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta)
    if expected is None:
        expected = beta * kl(q, m) + (1 - beta) * kl(p, m)
    for leaf in (x, w, b):
        assert_same(ours * 2, expected[mask].sum() / mask.sum() * 2, leaf)
        ours = losses.linear_distillation_loss(
            x, w, teacher_x, teacher_w, mask, student_bias=b, beta=beta, temperature=temperature,
            memory_budget=4000,
        )  # fmt: skip


def test_distillation_of_the_impossible() -> None:
    """Classes that the teacher rules out (-inf) and tokens that do not count add nothing."""
    x, w, b = heads()
    teacher_b = torch.zeros(17, dtype=torch.float64)
    teacher_b[3] = -torch.inf
    teacher_x, teacher_w = torch.randn(3, 4, 9).double(), torch.randn(17, 9).double()
    ours = losses.linear_distillation_loss(
        x, w, teacher_x, teacher_w, student_bias=b, teacher_bias=teacher_b, beta=0.0
    )
    q = (teacher_x @ teacher_w.T + teacher_b).log_softmax(-1)
    expected = F.kl_div(F.linear(x, w, b).log_softmax(-1), q.exp(), reduction="none")
    assert_same(ours, expected.sum(-1).mean(), x)
    nothing = losses.linear_distillation_loss(x, w, teacher_x, teacher_w, torch.zeros(3, 4))
    assert nothing == 0 and not torch.autograd.grad(nothing, x)[0].any()


@pytest.mark.parametrize("add_tail", [False, True])
def test_top_k_distillation(add_tail: bool) -> None:
    x, w, b = heads()
    log_p = F.linear(x, w, b).log_softmax(-1)
    teacher = torch.randn(3, 4, 17, dtype=torch.float64).log_softmax(-1).topk(5)
    mask = torch.rand(3, 4) < 0.6
    ours = losses.top_k_distillation_loss(
        log_p.gather(-1, teacher.indices), teacher.values, mask, add_tail=add_tail
    )
    terms = []
    for i in zip(*mask.nonzero(as_tuple=True), strict=True):
        q, p = teacher.values[i].exp(), log_p[i][teacher.indices[i]].exp()
        term = (q * (q / p).log()).sum()
        if add_tail:
            term = term + (1 - q.sum()) * ((1 - q.sum()) / (1 - p.sum())).log()
        terms.append(term)
    assert_same(ours, sum(terms) / len(terms), x)


class Pair:
    """A student and a teacher, with everything that each side may have."""

    def __init__(
        self, dtype: torch.dtype, tokens: int = 61, vocab: int = 130, teacher_vocab: int = 130
    ) -> None:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

        self.student = [draw(tokens, 24), draw(vocab, 24, scale=0.4), draw(vocab)]
        self.teacher = [draw(tokens, 40), draw(teacher_vocab, 40, scale=0.3), draw(teacher_vocab)]
        self.mask = torch.rand(tokens) < 0.6
        for leaf in self.student:
            leaf.requires_grad_()

    def in_float64(self) -> Pair:
        copy = Pair.__new__(Pair)
        copy.student = [t.detach().double().requires_grad_() for t in self.student]
        copy.teacher = [t.double() for t in self.teacher]
        copy.mask = self.mask
        return copy

    def ours(self, **options: Any) -> Tensor:
        x, w, b = self.student
        teacher_x, teacher_w, teacher_b = self.teacher
        return losses.linear_distillation_loss(
            x, w, teacher_x, teacher_w, self.mask, student_bias=b, teacher_bias=teacher_b, **options
        )

    def plain(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        vocab_size: int | None = None,
    ) -> Tensor:
        """Autograd on full logits, upcast; impossible classes must not occur."""

        def log_softmax(side: list[Tensor], softcap: float | None, logit_scale: float) -> Tensor:
            z = F.linear(*side)[self.mask][:, :vocab_size]
            z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            return (z / temperature).log_softmax(-1)

        log_p = log_softmax(self.student, student_softcap, student_logit_scale)
        log_q = log_softmax(self.teacher, teacher_softcap, teacher_logit_scale).detach()
        if beta == 0:
            total = (log_q.exp() * (log_q - log_p)).sum()
        elif beta == 1:
            total = (log_p.exp() * (log_p - log_q)).sum()
        else:
            log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
            total = beta * (log_q.exp() * (log_q - log_m)).sum()
            total = total + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum()
        return total / self.mask.sum()


def check(p: Pair, planning: dict[str, Any], **options: Any) -> None:
    """Loss and gradients by the tolerance rule, for two upstream gradients."""
    exact = p.in_float64()
    sides = [
        (p, p.ours(**planning, **options)),
        (p, p.plain(**options)),
        (exact, exact.plain(**options)),
    ]
    assert_close_as_plain("loss", *(loss.detach() for _, loss in sides), gradient=False)
    for scale in (1.0, -0.7):
        gradients = [
            torch.autograd.grad(loss * scale, q.student, retain_graph=True) for q, loss in sides
        ]
        for name, *three in zip(("dx", "dw", "db"), *gradients, strict=True):
            assert_close_as_plain(name, *three)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "student_softcap": 3.0, "teacher_logit_scale": 0.7},
        {"teacher_softcap": 2.0, "student_logit_scale": -1.3},
    ],
    ids=str,
)
def test_each_side_has_its_own_transform(
    dtype: torch.dtype, beta: float, options: dict[str, Any]
) -> None:
    check(Pair(dtype), {"chunk_size": 17}, beta=beta, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(130, 200), (200, 130), (150, 160)])
@pytest.mark.parametrize("beta", BETAS)
def test_padded_vocabularies(
    dtype: torch.dtype, vocab: int, teacher_vocab: int, beta: float
) -> None:
    """Of heads of different sizes the first classes take part, padding does not."""
    check(Pair(dtype, 61, vocab, teacher_vocab), {"chunk_size": 30}, beta=beta, vocab_size=130)


def test_saturated_soft_cap() -> None:
    """All logits far beyond the cap: 1 - tanh^2 would err by 1e-3 and more in float32."""
    p = Pair(torch.float32)
    x, w, b = p.student
    far = (torch.rand(130) * 2 + 5.5) * b.detach().sign()  # of the argument of tanh
    p.student = [x, (w.detach() * 0.05).requires_grad_(), (far * 2.0).requires_grad_()]
    exact = p.in_float64()
    options = {"student_softcap": 2.0, "beta": 0.0}
    ours = torch.autograd.grad(p.ours(**options), p.student)
    expected = torch.autograd.grad(exact.plain(**options), exact.student)
    for a, e in zip(ours, expected, strict=True):
        assert (a - e).norm() <= 1e-4 * e.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["both", "student", "teacher"])
@pytest.mark.parametrize("beta", BETAS)
def test_impossible_classes(dtype: torch.dtype, side: str, beta: float) -> None:
    """A bias of -inf on either side or both: the value and gradient of the limit."""
    p = Pair(dtype)
    classes = [3, 77]
    if side != "teacher":
        p.student[2] = p.student[2].detach().index_fill(0, torch.tensor(classes), -torch.inf)
        p.student[2].requires_grad_()
    if side != "student":
        p.teacher[2][classes] = -torch.inf
    ours = p.ours(beta=beta, chunk_size=13)
    gradients = torch.autograd.grad(ours, p.student)

    def limit(far: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = p.in_float64()
        q.student[2] = q.student[2].detach().clamp(min=-far).requires_grad_()
        q.teacher[2] = q.teacher[2].clamp(min=-far)
        loss = q.plain(beta=beta)
        return loss, torch.autograd.grad(loss, q.student)

    if (side, beta) in (("student", 0.0), ("teacher", 1.0)):
        assert ours == torch.inf  # one side counts on what the other rules out
        return
    loss, expected = limit(600.0)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours.double(), loss, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() <= tolerance * max(b.norm().item(), 1e-2)
    if side != "teacher":
        assert not gradients[1][classes].any() and not gradients[2][classes].any()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ignored_tokens_are_never_looked_at(odd: float, beta: float, dtype: torch.dtype) -> None:
    """Not finite hidden states of ignored tokens, on either side: the same bits."""
    p = Pair(dtype)

    def step() -> tuple[Tensor, ...]:
        loss = p.ours(beta=beta, chunk_size=16)
        return loss.detach(), *torch.autograd.grad(loss, p.student)

    expected = step()
    with torch.no_grad():
        p.student[0][~p.mask] = odd
        p.teacher[0][~p.mask] = -odd
    found = step()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert not found[1][~p.mask].any()


def test_ignored_tokens_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 61 tokens 7 count: 7 rows of either side are multiplied."""
    p = Pair(torch.float32)
    p.mask = torch.zeros(61, dtype=torch.bool)
    p.mask[[0, 3, 4, 30, 31, 59, 60]] = True
    rows = []
    logits = Head.logits

    def counting(head: Head, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return logits(head, hidden)

    monkeypatch.setattr(Head, "logits", counting)
    p.ours(chunk_size=4).backward()
    assert rows == [4, 4, 3, 3]


def test_upstream_gradients_and_num_items() -> None:
    p = Pair(torch.float32)
    mean = p.ours()
    total = mean * p.mask.sum()
    expected = torch.autograd.grad(total, p.student, retain_graph=True)
    for num_items in (7, 7.5, torch.tensor(7), torch.tensor([7.0]), 0, torch.tensor(0)):
        divisor = float(num_items) or 1.0
        ours = p.ours(num_items=num_items)
        torch.testing.assert_close(ours * divisor, total)
        for a, b in zip(torch.autograd.grad(ours * divisor, p.student), expected, strict=True):
            torch.testing.assert_close(a, b)
    p.mask[:] = False
    for num_items in (None, 0, 3):
        nothing = p.ours(num_items=num_items)
        assert nothing == 0
        assert not any(g.any() for g in torch.autograd.grad(nothing, p.student))


def test_autograd_contract() -> None:
    p = Pair(torch.float32)
    x, w, b = p.student
    loss = p.ours()
    first = torch.autograd.grad(loss, p.student, retain_graph=True)
    last = torch.autograd.grad(loss, p.student)  # may take the memory of what was kept
    for a, b_ in zip(first, last, strict=True):
        torch.testing.assert_close(a, b_)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, p.student)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(p.ours(), x, create_graph=True)
    for frozen in ([0], [1, 2], [0, 1]):  # what needs no gradient gets none
        for i, leaf in enumerate(p.student):
            leaf.requires_grad_(i not in frozen)
        wanted = [leaf for leaf in p.student if leaf.requires_grad]
        found = torch.autograd.grad(p.ours(), wanted)
        for leaf, gradient in zip(wanted, found, strict=True):
            expected = first[[id(t) for t in p.student].index(id(leaf))]
            torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        torch.testing.assert_close(p.ours(), loss.detach())
    assert not w.requires_grad and b.requires_grad


def test_in_place_change_before_backward() -> None:
    """Gradients that are ready are those of the forward pass; those that are not raise."""
    ready, late = Pair(torch.float32), Pair(torch.float16)
    expected = torch.autograd.grad(ready.ours(), ready.student)
    loss = ready.ours()
    with torch.no_grad():
        ready.student[1].add_(1)
    for a, b in zip(torch.autograd.grad(loss, ready.student), expected, strict=True):
        torch.testing.assert_close(a, b)
    loss = late.ours()
    with torch.no_grad():
        late.student[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, late.student)


def test_float16_with_a_loss_scale() -> None:
    """Gradients too small for float16 arrive when a loss scale multiplies them in time."""
    p = Pair(torch.float16)
    exact = p.in_float64()
    scale, items = 2.0**15, 5_000_000
    ours = torch.autograd.grad(p.ours(num_items=items) * scale, p.student)
    plain = exact.plain() * p.mask.sum() / items * scale
    for a, b in zip(ours, torch.autograd.grad(plain, exact.student), strict=True):
        assert (a.double() - b).norm() <= 1e-3 * b.norm()


def test_autocast_and_modules() -> None:
    """Inside a region float32 hidden states are rounded as F.linear would round them."""
    p, rounded = Pair(torch.float32), Pair(torch.bfloat16)
    rounded.student = [t.detach().bfloat16().requires_grad_() for t in p.student]
    rounded.teacher = [t.bfloat16() for t in p.teacher]
    rounded.mask = p.mask
    with torch.autocast("cpu", torch.bfloat16):
        loss = p.ours()
        inside = rounded.ours()
    expected = rounded.ours()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected) and torch.equal(inside, expected)
    gradients = torch.autograd.grad(loss, p.student)
    for a, b in zip(gradients, torch.autograd.grad(expected, rounded.student), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_one_graph_when_compiled(backend: str, dtype: torch.dtype, masked: bool) -> None:
    """fullgraph=True, several lengths, the bits of eager."""
    torch.manual_seed(0)
    _, w, b = Pair(dtype).student
    _, teacher_w, teacher_b = Pair(dtype).teacher

    def step(x: Tensor, w: Tensor, b: Tensor, teacher_x: Tensor, mask: Tensor | None) -> Tensor:
        loss = losses.linear_distillation_loss(
            x * 2, w, teacher_x, teacher_w, mask, student_bias=b, teacher_bias=teacher_b,
            student_softcap=5.0, temperature=1.5, vocab_size=120,
        )  # fmt: skip
        return loss * 3

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for length in (8, 11, 13):
        x = torch.randn(2, length, 24, dtype=dtype).requires_grad_()
        teacher_x = torch.randn(2, length, 40, dtype=dtype)
        mask = torch.rand(2, length) < 0.6 if masked else None
        results = []
        for function in (step, compiled):
            loss = function(x, w, b, teacher_x, mask)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, w, b))))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)


def test_opcheck() -> None:
    p = Pair(torch.float32, tokens=9)
    p.mask[0] = True
    tensors = (*p.student, *p.teacher, p.mask, torch.tensor(0.2))
    options = {
        "beta": 0.5, "temperature": 2.0, "student_softcap": 3.0, "student_logit_scale": 1.0,
        "teacher_softcap": 0.0, "teacher_logit_scale": 1.5, "chunk_size": 4, "memory_budget": -1,
        "vocab_group": "", "ranks": 1, "reduce_input_grad": False, "reduce_dtype": None,
        "input_grad": True, "weight_grad": True, "bias_grad": True,
    }  # fmt: skip
    torch.library.opcheck(torch.ops.memeff.linear_distillation.default, tensors, options)


def measure(dtype: str, memory_budget: int) -> dict[str, int]:
    # What glibc keeps in its heap after the first large block is not measured, only what is in use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)

    def step(tokens: int, vocab: int) -> tuple[int, int]:
        p = Pair(getattr(torch, dtype), tokens, vocab, vocab)
        p.mask[:] = True
        with PeakMemory() as peak:
            p.ours(memory_budget=memory_budget, student_softcap=20.0).backward()
        return peak.extra_bytes, sum(t.grad.nbytes for t in p.student if t.grad is not None)

    step(64, 512)
    peak, gradients = step(2048, 20_011)
    return {"over": peak - gradients}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_budget(dtype: str) -> None:
    """Both heads' logits would take 312 MiB in float32."""
    measured = call_isolated(measure, dtype=dtype, memory_budget=32 * MIB)
    # In addition to blocks of logits: rows of a chunk, slices of a weight, the sums' units.
    assert measured["over"] <= (32 + 4) * MIB, measured


@pytest.mark.parametrize(
    ("vocab", "expected"), [(500, [256, 44]), (4096, [256, 44]), (65_536, [128, 128, 44])]
)
def test_tokens_per_chunk(monkeypatch: pytest.MonkeyPatch, vocab: int, expected: list[int]) -> None:
    """Without a size or a budget: 256, as long as eight blocks of logits take at most 256 MiB."""
    p = Pair(torch.float32, 300, 2, 2)
    p.mask[:] = True
    p.student = [p.student[0].detach(), torch.zeros(vocab, 24), torch.zeros(vocab)]
    p.teacher = [p.teacher[0], torch.zeros(vocab, 40), torch.zeros(vocab)]
    rows = []

    def no_product(head: Head, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return torch.zeros(len(hidden), 2)

    monkeypatch.setattr(Head, "logits", no_product)
    p.ours()
    assert rows[::2] == rows[1::2] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_of_a_step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Gradients are made once: in the forward pass, of float16 in the backward pass."""
    p = Pair(dtype)
    calls = []
    add_gradients = Head.add_gradients

    def counting(head: Head, *arguments: Any) -> Tensor | None:
        calls.append(len(arguments[1]))
        return add_gradients(head, *arguments)

    monkeypatch.setattr(Head, "add_gradients", counting)
    loss = p.ours(chunk_size=100)
    counted = int(p.mask.sum())
    assert calls == ([] if dtype == torch.float16 else [counted])
    loss.backward()
    assert calls == [counted]
