"""linear_token_statistics and linear_logprobs: values, gradients of any combination, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import lay_out, op_options
from tolerances import Comparison, assert_all_hold, assert_close_as_plain, compare
from torch import Tensor

import memeff
import memeff.statistics_ops
from memeff.bench.isolated import call_isolated
from memeff.bench.memory import PeakMemory

MIB = 2**20
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIFFERENTIABLE = ("logprob", "lse", "entropy")
SUMS = ("logit_sum", "mean_logit", "log_sum_sq_probs")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Problem:
    def __init__(
        self,
        tokens: int = 37,
        features: int = 24,
        vocab: int = 301,
        *,
        targets: int | None = None,
        dtype: torch.dtype = torch.float64,
        bias: bool = True,
        ignored: float = 0.3,
        spread: float = 2.0,
    ) -> None:
        self.x = torch.randn(tokens, features, dtype=torch.float64).to(dtype).requires_grad_()
        w = torch.randn(vocab, features, dtype=torch.float64) * spread / features**0.5
        self.w = w.to(dtype).requires_grad_()
        self.b = (
            torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
        )
        shape = (tokens,) if targets is None else (tokens, targets)
        self.target = torch.randint(vocab, shape)
        self.target[torch.rand(shape) < ignored] = -100
        if tokens > 2:
            self.target[2] = -100  # a token without any target

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.w, self.b) if t is not None]

    def in_float64(self) -> Problem:
        copy = Problem.__new__(Problem)
        copy.x, copy.w = (t.detach().double().requires_grad_() for t in (self.x, self.w))
        copy.b = None if self.b is None else self.b.detach().double().requires_grad_()
        copy.target = self.target
        return copy

    def ours(self, **options: Any) -> memeff.LogitStatistics:
        return memeff.linear_token_statistics(
            self.x, self.w, self.target, linear_bias=self.b, **options
        )


def plain(
    p: Problem,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: Tensor | None = None,
    top_k: int = 0,
) -> dict[str, Tensor]:
    """Eager PyTorch with the float32 upcast, nothing of it from the package."""
    z = F.linear(p.x, p.w, p.b)
    z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z if temperature is None else z / temperature[:, None].to(z.dtype)
    log_p = F.log_softmax(z, -1)
    index = p.target if p.target.dim() == 2 else p.target[:, None]
    ignored = index == -100
    logprob = log_p.gather(1, index.masked_fill(ignored, 0)).masked_fill(ignored, 0)
    result = {
        "logprob": logprob.reshape(p.target.shape),
        "lse": torch.logsumexp(z, -1),
        "entropy": torch.special.entr(log_p.exp()).sum(-1),
        "max_logit": z.amax(-1),
        "logit_sum": z.sum(-1),
        "mean_logit": z.mean(-1),
        "log_sum_sq_probs": log_p.exp().square().sum(-1).log(),
    }
    if top_k:
        result["top_logprobs"], result["top_ids"] = log_p.topk(top_k)
    return result


def random_sum(fields: dict[str, Tensor], upstream: dict[str, Tensor]) -> Tensor:
    return sum((fields[name] * upstream[name].to(fields[name].dtype)).sum() for name in upstream)


def upstream_for(p: Problem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients that are not uniform; some tokens have none."""
    shapes = {"logprob": p.target.shape}
    result = {}
    for name in names:
        values = torch.randn(shapes.get(name, p.x.shape[:1]), dtype=torch.float64) + 0.5
        values[5:9] = 0
        result[name] = values
    return result


def comparisons(
    p: Problem, names: tuple[str, ...], planning: Any = None, **options: Any
) -> list[Comparison]:
    """Values and gradients. temperature=True: any, one per token."""
    if options.get("temperature") is True:
        options["temperature"] = 0.3 + 2 * torch.rand(len(p.x), dtype=torch.float64)
    sums = {"logit_sum": "logit_sum" in names, "log_sum_sq_probs": "log_sum_sq_probs" in names}
    ours = p.ours(**options, **sums, **(planning or {}))._asdict()
    upstream = upstream_for(p, names)
    exact = p.in_float64()
    three = []
    for problem, fields in (
        (p, ours), (p, plain(p, **options)), (exact, plain(exact, **options)),
    ):  # fmt: skip
        loss = random_sum(fields, upstream)
        three.append((fields, torch.autograd.grad(loss, problem.leaves)))
    result = []
    for name in dict.fromkeys(("logprob", "lse", "entropy", "max_logit", *names)):
        sides = [fields[name].detach() for fields, _ in three]
        result += compare(name, *sides, gradient=False)
    for i, name in enumerate(("dx", "dw", "db")[: len(p.leaves)]):
        assert three[0][1][i].dtype == p.x.dtype
        result += compare(name, *(gradients[i] for _, gradients in three))
    return result


def check(p: Problem, names: tuple[str, ...], planning: Any = None, **options: Any) -> None:
    """The same under the tolerance rule."""
    assert_all_hold(comparisons(p, names, planning, **options))


COMBINATIONS = [
    ("logprob",), ("lse",), ("entropy",), ("logprob", "lse"), ("logprob", "entropy"),
    ("lse", "entropy"), DIFFERENTIABLE, ("logit_sum",), ("log_sum_sq_probs",),
    ("logprob", "logit_sum"), (*DIFFERENTIABLE, *SUMS),
]  # fmt: skip


@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [None, 3])
def test_combinations(names: tuple[str, ...], dtype: torch.dtype, targets: int | None) -> None:
    check(Problem(targets=targets, dtype=dtype), names)


OPTIONS: list[dict[str, Any]] = [
    {"softcap": 3.0},
    {"logit_scale": 0.4},
    {"softcap": 4.0, "logit_scale": -1.3},
    {"temperature": True},
    {"temperature": True, "softcap": 3.0, "logit_scale": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names", [("logprob", "lse"), DIFFERENTIABLE, (*DIFFERENTIABLE, *SUMS)], ids="-".join
)
def test_options(options: dict[str, Any], dtype: torch.dtype, names: tuple[str, ...]) -> None:
    check(Problem(dtype=dtype, targets=2), names, **options)


@pytest.mark.parametrize("kernels", ["bf16_portable", "blas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "vocab"), [(70, 5000), (90, 40)])
def test_many_targets(
    tokens: int, vocab: int, dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six per token: over several slices of classes, and more of them in all than classes."""
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", kernels)
    p = Problem(tokens, 48, vocab, dtype=dtype, targets=6)
    check(p, DIFFERENTIABLE)
    if dtype == torch.float32:
        check_top(p, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [32, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_and_slices(dtype: torch.dtype, chunk_size: int, bias: bool) -> None:
    """Several blocks of tokens, tiles and slices of classes, all ragged."""
    p = Problem(203, 40, 2500, dtype=dtype, bias=bias, targets=2)
    plan = memeff.plan(203, 40, 2500, dtype, reduction="none", chunk_size=32)
    budget = plan.workspace_bytes + plan.library_bytes
    check(p, (*DIFFERENTIABLE, *SUMS), {"chunk_size": chunk_size})
    check(p, DIFFERENTIABLE, {"memory_budget": budget + 200_000})
    check(p, (*DIFFERENTIABLE, *SUMS), {"chunk_size": chunk_size}, temperature=True, softcap=9.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.3, 12.0])
def test_flat_and_peaked(dtype: torch.dtype, spread: float) -> None:
    check(Problem(64, 32, 700, dtype=dtype, spread=spread), DIFFERENTIABLE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_class_that_is_several_targets(dtype: torch.dtype) -> None:
    p = Problem(dtype=dtype, targets=4, ignored=0.0)
    p.target[:, 2] = p.target[:, 0]
    p.target[::2, 3] = p.target[::2, 1]
    check(p, ("logprob", "entropy"))


@pytest.mark.parametrize("wanted", ["x", "w", "b"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_gradient_alone(wanted: str, dtype: torch.dtype) -> None:
    p = Problem(dtype=dtype)
    upstream = upstream_for(p, DIFFERENTIABLE)
    together = torch.autograd.grad(random_sum(p.ours()._asdict(), upstream), p.leaves)
    for name in ("x", "w", "b"):
        getattr(p, name).requires_grad_(name == wanted)
    (alone,) = torch.autograd.grad(random_sum(p.ours()._asdict(), upstream), getattr(p, wanted))
    # The sums may be taken in another order.
    eps = torch.finfo(dtype).eps
    expected = together["xwb".index(wanted)]
    torch.testing.assert_close(alone, expected, rtol=2 * eps, atol=4 * eps)


def test_two_backwards_and_accumulation() -> None:
    p = Problem(dtype=torch.float32)
    upstream = upstream_for(p, DIFFERENTIABLE)
    loss = random_sum(p.ours()._asdict(), upstream)
    first = torch.autograd.grad(loss, p.leaves, retain_graph=True)
    second = torch.autograd.grad(loss * -2.5, p.leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a * -2.5, b)


def test_gradcheck() -> None:
    p = Problem(5, 3, 7, targets=2)

    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        fields = memeff.linear_token_statistics(
            x, w, p.target, linear_bias=b, softcap=2.0, logit_scale=0.7, logit_sum=True,
            log_sum_sq_probs=True,
        )  # fmt: skip
        return tuple(getattr(fields, name) for name in (*DIFFERENTIABLE, *SUMS))

    assert torch.autograd.gradcheck(function, p.leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 7, 301])
def test_top_k(dtype: torch.dtype, top_k: int) -> None:
    check_top(Problem(dtype=dtype), top_k)


def check_top(p: Problem, top_k: int) -> None:
    ours = p.ours(top_k=top_k, chunk_size=32)
    exact = plain(p.in_float64(), top_k=top_k)
    assert_close_as_plain(
        "top_logprobs", ours.top_logprobs, plain(p, top_k=top_k)["top_logprobs"].detach(),
        exact["top_logprobs"].detach(), gradient=False,
    )  # fmt: skip
    log_p = F.linear(*(t.double() for t in (p.x, p.w, p.b))).log_softmax(-1)
    torch.testing.assert_close(
        log_p.gather(1, ours.top_ids), exact["top_logprobs"], rtol=1e-5, atol=1e-5
    )
    assert all(len(set(row.tolist())) == top_k for row in ours.top_ids)
    assert (ours.top_logprobs.diff() <= 0).all()
    assert torch.equal(ours.top_ids[:, 0], ours.argmax)
    assert not ours.top_logprobs.requires_grad


def test_top_k_ties_and_impossible_classes() -> None:
    bias = torch.tensor([1.0, 2.0, -torch.inf, 2.0, -torch.inf, 0.0])
    x, w = torch.zeros(3, 4), torch.zeros(6, 4)
    ours = memeff.linear_token_statistics(x, w, linear_bias=bias, top_k=6)
    assert ours.top_ids[0].tolist() == [1, 3, 0, 5, 2, 4]
    torch.testing.assert_close(ours.top_logprobs[0], bias.log_softmax(0)[ours.top_ids[0]])
    assert ours.logprob is None


@pytest.mark.parametrize("kernels", ["bf16_portable", "blas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equal_classes(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest logit several times: in one vector, one tile of classes, and other slices."""
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", kernels)
    x, w = torch.randn(40, 16, dtype=dtype), torch.randn(9000, 16, dtype=dtype) / 8
    equal = [5, 6, 37, 1000, 7000]
    x[:, 0], w[equal] = 4, torch.eye(16, dtype=dtype)[0] * 8
    ours = memeff.linear_token_statistics(x, w)
    assert (ours.argmax == equal[0]).all()
    assert memeff.linear_token_statistics(x, w, top_k=4).top_ids.tolist() == [equal[:4]] * 40
    _, statistics = memeff.linear_cross_entropy(
        x, w, torch.full((40,), equal[1]), return_statistics=True
    )
    assert (statistics.argmax == equal[0]).all() and not statistics.correct.any()


def test_every_target_is_checked() -> None:
    target = torch.tensor([[0, 1], [2, 8], [3, 4]])
    x, w = torch.randn(3, 4), torch.randn(8, 4)
    with pytest.raises(IndexError, match=r"target\[3\] is 8: expected a class index in \[0, 8\)"):
        memeff.linear_token_statistics(x, w, target)


def test_rows_with_much_in_common() -> None:
    """Gradients of the logits sum to zero: what they all err by meets the rows' common part.

    Coefficients of float32, rounded once, would err by 2 epsilons of it; the kernels add what
    rounding takes from them, which leaves the errors of 3000 classes, of 1 / 3000 each.
    """
    p = Problem(40, 24, 3000, dtype=torch.float32, ignored=0, bias=False, spread=0.1)
    common = 1000
    with torch.no_grad():
        p.x[:, 0] = 0  # the logits do not have that part
        p.w[:, 0] += common
    exact = p.in_float64()
    ours, expected = (
        torch.autograd.grad(entropy.sum(), q.x)[0][:, 0].double()
        for q, entropy in ((p, p.ours().entropy), (exact, plain(exact)["entropy"]))
    )
    error = (ours - expected).square().mean().sqrt() / common
    assert error < 0.5 * torch.finfo(torch.float32).eps


def test_impossible_classes_have_no_gradient() -> None:
    """-inf logits: p log p is 0, and so are the gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        p = Problem(dtype=dtype)
        with torch.no_grad():
            p.b[7] = p.b[250] = -torch.inf
        p.target[p.target == 7] = p.target[p.target == 250] = 3
        upstream = upstream_for(p, DIFFERENTIABLE)
        gradients = torch.autograd.grad(random_sum(p.ours()._asdict(), upstream), p.leaves)
        assert all(g.isfinite().all() for g in gradients)
        assert gradients[2][7] == 0 and not gradients[1][7].any()


def test_only_what_is_asked_for() -> None:
    p = Problem()
    ours = p.ours(entropy=False, argmax=False)
    assert (ours.entropy, ours.argmax, ours.top_ids, ours.top_logprobs) == (None,) * 4
    full = p.ours(top_k=2)
    for name in ("logprob", "lse", "max_logit"):
        assert torch.equal(getattr(ours, name), getattr(full, name)), name
    assert ours.logprob.requires_grad and ours.lse.requires_grad
    assert not ours.max_logit.requires_grad
    with torch.no_grad():
        assert not p.ours().lse.requires_grad


def test_nothing_to_differentiate() -> None:
    """All upstream gradients zero, or all targets ignored: zeros, not what the memory held."""
    for dtype in DTYPES:
        p = Problem(dtype=dtype)
        zero = torch.autograd.grad(p.ours().logprob.sum() * 0, p.leaves)
        p.target.fill_(-100)
        logprobs = memeff.linear_logprobs(p.x, p.w, p.target, linear_bias=p.b)
        assert not logprobs.any()
        ignored = torch.autograd.grad(logprobs.sum(), p.leaves)
        assert not any(g.any() for g in (*zero, *ignored))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [None, 3])
def test_logprobs(dtype: torch.dtype, targets: int | None) -> None:
    """The same bits as the statistics, where no token is left out."""
    p = Problem(dtype=dtype, targets=targets, ignored=0.0)
    p.target[2] = 1
    logprobs = memeff.linear_logprobs(p.x, p.w, p.target, linear_bias=p.b, temperature=0.7)
    statistics = p.ours(logit_scale=1 / 0.7)
    assert torch.equal(logprobs, statistics.logprob)
    upstream = torch.randn(p.target.shape)
    for a, b in zip(
        torch.autograd.grad(logprobs, p.leaves, upstream.to(logprobs.dtype)),
        torch.autograd.grad(statistics.logprob, p.leaves, upstream.to(logprobs.dtype)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_logprobs_skip_ignored_tokens() -> None:
    p = Problem(targets=3, ignored=0.6)
    logprobs = memeff.linear_logprobs(p.x, p.w, p.target, linear_bias=p.b)
    torch.testing.assert_close(logprobs, plain(p)["logprob"])
    upstream = torch.randn_like(logprobs)
    for a, b in zip(
        torch.autograd.grad(logprobs, p.leaves, upstream),
        torch.autograd.grad(plain(p)["logprob"], p.leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_temperature_comes_after_the_softcap() -> None:
    p = Problem()
    ours = memeff.linear_logprobs(
        p.x, p.w, p.target, linear_bias=p.b, temperature=0.5, softcap=3.0, logit_scale=1.2
    )
    z = 3.0 * torch.tanh(1.2 * F.linear(p.x, p.w, p.b) / 3.0) / 0.5
    ignored = p.target == -100
    expected = z.log_softmax(-1).gather(1, p.target.masked_fill(ignored, 0)[:, None]).squeeze(1)
    torch.testing.assert_close(ours, expected.masked_fill(ignored, 0))


@pytest.mark.parametrize("lead", [(), (1, 5), (2, 3, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_shapes(lead: tuple[int, ...], several: bool) -> None:
    x = torch.randn(*lead, 6, dtype=torch.float64)
    w = torch.randn(11, 6, dtype=torch.float64)
    target = torch.randint(11, (*lead, 2) if several else lead)
    ours = memeff.linear_token_statistics(x, w, target, top_k=3)
    assert ours.logprob.shape == target.shape
    assert ours.lse.shape == ours.entropy.shape == ours.argmax.shape == ours.max_logit.shape == lead
    assert ours.top_ids.shape == ours.top_logprobs.shape == (*lead, 3)
    expected = memeff.linear_token_statistics(x, w, target, top_k=3, backend="reference")
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("shift", [True, 3, 9])
def test_shift(several: bool, shift: bool | int) -> None:
    x = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 6, dtype=torch.float64)
    target = torch.randint(11, (2, 8, 2) if several else (2, 8))
    k = int(shift)
    ours = memeff.linear_token_statistics(x, w, target, shift=shift)
    expected = memeff.linear_token_statistics(x[:, : max(8 - k, 0)], w, target[:, k:])
    for name, a, b in zip(ours._fields, ours, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(memeff.linear_logprobs(x, w, target, shift=shift), ours.logprob)
    loss = ours.logprob.sum() + ours.entropy.square().sum()
    same = expected.logprob.sum() + expected.entropy.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(same, x))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "padded"])
def test_strides(layout: str) -> None:
    p = Problem()
    p.x = lay_out(p.x.detach(), layout).requires_grad_()
    p.w = lay_out(p.w.detach(), layout).requires_grad_()
    check(p, DIFFERENTIABLE)


def test_autocast() -> None:
    p = Problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = p.ours()
    halved = [t.detach().bfloat16() for t in p.leaves]
    expected = memeff.linear_token_statistics(*halved[:2], p.target, linear_bias=halved[2])
    assert torch.equal(ours.lse, expected.lse)
    gradients = torch.autograd.grad(ours.entropy.sum(), p.leaves)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_compiled_with_the_same_bits() -> None:
    p = Problem(dtype=torch.float32)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        s = memeff.linear_token_statistics(x, w, p.target, linear_bias=b)
        assert s.logprob is not None and s.entropy is not None
        return (s.logprob * s.lse.detach()).sum() + s.entropy.square().sum()

    eager, compiled = step(*p.leaves), torch.compile(step, fullgraph=True)(*p.leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, p.leaves), torch.autograd.grad(eager, p.leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_func_grad() -> None:
    p = Problem()

    def loss(x: Tensor) -> Tensor:
        return memeff.linear_logprobs(x, p.w.detach(), p.target).sum()

    (expected,) = torch.autograd.grad(loss(p.x), p.x)
    torch.testing.assert_close(torch.func.grad(loss)(p.x.detach()), expected)


@pytest.mark.parametrize("subset", [(True, True, True), (False, True, False), (False,) * 3])
@pytest.mark.parametrize("target", [False, True])
def test_opcheck(subset: tuple[bool, ...], target: bool) -> None:
    x, w, b = (
        torch.randn(shape).requires_grad_(wanted)
        for shape, wanted in zip(((4, 3), (5, 3), (5,)), subset, strict=True)
    )
    y = torch.randint(5, (4, 2)) if target else None
    flags = dict(zip(("input_grad", "weight_grad", "bias_grad"), subset, strict=True))
    given = {"softcap": 2.0, "logit_scale": 0.7} | flags
    given |= {"entropy": True, "logit_sum": True, "argmax": True, "top_k": 2}
    forward = torch.ops.memeff.linear_token_statistics_forward.default
    scale, temperature = torch.tensor(1.5), torch.rand(4) + 0.5
    operands = (x, w, y, b, scale, temperature)
    torch.library.opcheck(forward, operands, op_options(forward, **given))
    lse, entropy = torch.randn(4).double(), torch.rand(4)
    upstream = (torch.randn(4, 2) if target else None, None, torch.randn(4), torch.randn(4))
    x, w, b = x.detach(), w.detach(), b.detach()
    backward = torch.ops.memeff.linear_token_statistics_backward.default
    torch.library.opcheck(
        backward,
        (*upstream, lse, entropy, x, w, y, b, scale, temperature),
        op_options(backward, **given),
    )


def test_second_derivatives_are_refused() -> None:
    p = Problem()
    (dx,) = torch.autograd.grad(p.ours().lse.sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives of memeff\.linear_token"):
        dx.sum().backward()


def measure(dtype: str, budget: int) -> dict[str, int]:
    def step(tokens: int, vocab: int) -> tuple[int, int]:
        p = Problem(tokens, 96, vocab, dtype=getattr(torch, dtype), bias=False)
        with PeakMemory() as peak:
            s = p.ours(memory_budget=budget)
            (s.logprob * 0.3 + s.entropy * s.lse).sum().backward()
        return peak.extra_bytes, p.x.grad.nbytes + p.w.grad.nbytes

    step(64, 512)
    peak, gradients = step(4096, 32777)
    return {"over": peak - gradients}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_budget(dtype: str) -> None:
    """The logits would take 256 MiB in bfloat16."""
    measured = call_isolated(measure, dtype=dtype, budget=16 * MIB)
    assert measured["over"] <= 16 * MIB + 8 * MIB, measured


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(3, dtype=torch.long)}, RuntimeError, r"target has shape \(3,\)"),
        ({"target": torch.zeros(37)}, RuntimeError, "target has dtype torch.float32"),
        ({"target": torch.full((37,), 301)}, IndexError, "is 301: expected a class index in"),
        ({"top_k": 302}, ValueError, r"top_k is 302, expected .* \[0, 301\]"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"linear_bias": torch.zeros(5)}, RuntimeError, "linear_bias has shape"),
        ({"linear_weight": torch.zeros(5, 5)}, RuntimeError, "linear_weight"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"memory_budget": 1000}, ValueError, "minimum is"),
        ({"target": None, "shift": 1}, ValueError, "there is no target"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], error: Any, message: str) -> None:
    p = Problem(dtype=torch.float32)
    arguments: dict[str, Any] = {
        "input": p.x, "linear_weight": p.w, "target": p.target, "linear_bias": p.b, **change
    }  # fmt: skip
    with pytest.raises(error, match=message):
        memeff.linear_token_statistics(**arguments)
    with pytest.raises(ValueError, match="temperature is 0"):
        memeff.linear_logprobs(p.x, p.w, p.target, temperature=0)
