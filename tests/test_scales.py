"""A temperature per token, and a logit_scale that is a tensor and may require grad.

tests/test_token_statistics.py has the temperatures' values and gradients by the tolerance rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_as_plain
from torch import Tensor, nn

import memeff

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
N, D, V = 61, 24, 130
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Problem:
    def __init__(self, dtype: torch.dtype, scale: float = 1.3) -> None:
        self.x = torch.randn(N, D).to(dtype).requires_grad_()
        self.w = (torch.randn(V, D) / 3).to(dtype).requires_grad_()
        self.b = torch.randn(V).to(dtype).requires_grad_()
        self.s = torch.tensor(scale).to(torch.promote_types(dtype, torch.float32))
        self.s.requires_grad_()
        self.target = torch.randint(V, (N,))
        self.target[torch.rand(N) < 0.3] = -100

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.w, self.b, self.s]

    def in_float64(self) -> Problem:
        copy = Problem.__new__(Problem)
        copy.target = self.target
        for name in ("x", "w", "b", "s"):
            setattr(copy, name, getattr(self, name).detach().double().requires_grad_())
        return copy

    def logits(self, softcap: float | None = None) -> Tensor:
        """Eager PyTorch with the float32 upcast."""
        z = F.linear(self.x, self.w, self.b)
        z = (z if z.dtype == torch.float64 else z.float()) * self.s
        return z if softcap is None else softcap * torch.tanh(z / softcap)


Of = Callable[[Problem, Any], Tensor]


def cross_entropy(p: Problem, scale: Any, **options: Any) -> Tensor:
    loss = memeff.linear_cross_entropy(
        p.x, p.w, p.target, linear_bias=p.b, logit_scale=scale, **options
    )
    return loss if loss.dim() == 0 else (loss * torch.linspace(0.5, 2, N).to(loss)).sum()


def plain_cross_entropy(p: Problem, softcap: float | None = None, **options: Any) -> Tensor:
    loss = F.cross_entropy(p.logits(softcap), p.target, **options)
    return loss if loss.dim() == 0 else (loss * torch.linspace(0.5, 2, N).to(loss)).sum()


def statistics(p: Problem, scale: Any) -> Tensor:
    s = memeff.linear_token_statistics(p.x, p.w, p.target, linear_bias=p.b, logit_scale=scale)
    return (s.logprob * 0.3 + s.lse * s.entropy).sum()


def plain_statistics(p: Problem) -> Tensor:
    z = p.logits()
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(1, p.target.clamp(min=0)[:, None]).squeeze(1)
    logprob = logprob.masked_fill(p.target == -100, 0)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return (logprob * 0.3 + z.logsumexp(-1) * entropy).sum()


def custom(p: Problem, scale: Any, temperature: Any = 1.0) -> Tensor:
    return memeff.linear_loss(
        lambda s: (s.logprob * 0.1).exp() * s.lse, p.x, p.w, p.target, linear_bias=p.b,
        logit_scale=scale, temperature=temperature,
    )  # fmt: skip


def plain_custom(p: Problem) -> Tensor:
    z = p.logits()
    counted = p.target != -100
    logprob = z.log_softmax(-1).gather(1, p.target.clamp(min=0)[:, None]).squeeze(1)
    return ((logprob * 0.1).exp() * z.logsumexp(-1))[counted].mean()


CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mean": (cross_entropy, plain_cross_entropy, {}),
    "none": (cross_entropy, plain_cross_entropy, {"reduction": "none"}),
    "softcap": (cross_entropy, plain_cross_entropy, {"softcap": 4.0, "reduction": "sum"}),
    "smoothing": (cross_entropy, plain_cross_entropy, {"label_smoothing": 0.2}),
    "statistics": (statistics, plain_statistics, {}),
    "linear_loss": (custom, plain_custom, {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_gradient_of_the_scale(name: str, dtype: torch.dtype) -> None:
    ours, plain, options = CALLS[name]
    p = Problem(dtype)
    exact = p.in_float64()
    loss = ours(p, p.s, **options)
    assert torch.equal(loss, ours(p, p.s.item(), **options)), "the bits of the number"
    sides = [(p, loss), (p, plain(p, **options)), (exact, plain(exact, **options))]
    gradients = [torch.autograd.grad(side * 1.7, q.leaves) for q, side in sides]
    for part, *three in zip(("dx", "dw", "db"), *(g[:3] for g in gradients), strict=True):
        assert_close_as_plain(part, *three)
    of_scale, of_plain, expected = (g[3] for g in gradients)
    assert of_scale.dtype == p.s.dtype and of_scale.shape == ()
    if dtype in (torch.float64, torch.float32):
        assert_close_as_plain("ds", of_scale, of_plain, expected)
    else:
        # The epsilon is that of the hidden states' gradient, which it is made of; a quarter of it,
        # as for 16-bit gradients of so many entries.
        allowed = 1.1 * abs(of_plain - expected) + torch.finfo(dtype).eps / 4 * abs(expected)
        assert abs(of_scale - expected) <= allowed


@pytest.mark.parametrize("name", CALLS)
def test_only_the_scale_requires_grad(name: str) -> None:
    ours, plain, options = CALLS[name]
    p = Problem(torch.float64)
    (expected,) = torch.autograd.grad(plain(p, **options), p.s)
    for leaf in (p.x, p.w, p.b):
        leaf.requires_grad_(False)
    (found,) = torch.autograd.grad(ours(p, p.s, **options), p.s)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not ours(p, p.s, **options).requires_grad


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_heads(backend: str, softcap: float | None) -> None:
    """K-dimensional weights, a negative scale."""
    x, w, b = (torch.randn(n, dtype=torch.float64) for n in ((4, 3), (5, 2, 3), (5, 2)))
    s, y = torch.tensor(-0.7, dtype=torch.float64), torch.randint(5, (4, 2))

    def function(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        options = {"linear_bias": b, "logit_scale": s, "softcap": softcap, "backend": backend}
        fields = memeff.linear_token_statistics(x, w, y, logit_sum=True, **options)
        loss = memeff.linear_cross_entropy(x, w, y, z_loss=0.1, **options)
        return loss, fields.logprob, fields.entropy, fields.logit_sum

    leaves = [t.requires_grad_() for t in (x, w, b, s)]
    assert torch.autograd.gradcheck(function, leaves)


def test_what_does_not_count_is_not_looked_at() -> None:
    """Neither hidden states of ignored tokens nor the bias of impossible classes."""
    p = Problem(torch.float32)
    clean = torch.autograd.grad(cross_entropy(p, p.s), p.s)
    with torch.no_grad():
        p.x[p.target == -100] = torch.nan
    assert torch.equal(torch.autograd.grad(cross_entropy(p, p.s), p.s)[0], clean[0])
    with torch.no_grad():
        p.b[7] = -torch.inf
    p.target[p.target == 7] = 3
    assert torch.autograd.grad(cross_entropy(p, p.s), p.s)[0].isfinite()


def test_a_module_has_the_scale_as_its_parameter() -> None:
    module = memeff.LinearCrossEntropyLoss(D, V, logit_scale=nn.Parameter(torch.tensor(2.0)))
    assert "logit_scale" in dict(module.named_parameters())
    x, target = torch.randn(5, D), torch.randint(V, (5,))
    module(x, target).backward()
    z = F.linear(x, module.linear.weight) * module.logit_scale
    (expected,) = torch.autograd.grad(F.cross_entropy(z, target), module.logit_scale)
    torch.testing.assert_close(module.logit_scale.grad, expected)
    assert "logit_scale" in repr(module)


def test_contrastive_loss_under_autocast() -> None:
    """CLIP: logit_scale.exp() times similarities, in both directions."""
    images, texts = (F.normalize(torch.randn(32, D), dim=-1).requires_grad_() for _ in range(2))
    log_scale = torch.tensor(2.0, requires_grad=True)
    target = torch.arange(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scale = log_scale.exp()
        loss = sum(
            memeff.linear_cross_entropy(a, b, target, logit_scale=scale)
            for a, b in ((images, texts), (texts, images))
        )
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (images, texts)]
    exact_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    z = rounded[0] @ rounded[1].t() * exact_scale.exp()
    expected = F.cross_entropy(z, target) + F.cross_entropy(z.t(), target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(loss, (images, texts, log_scale))
    exact = torch.autograd.grad(expected, (*rounded, exact_scale))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


@pytest.mark.parametrize("name", ["mean", "softcap", "statistics"])
def test_compiled(name: str) -> None:
    ours, _, options = CALLS[name]
    p = Problem(torch.float32)

    def step(*leaves: Tensor) -> Tensor:
        q = Problem.__new__(Problem)
        q.x, q.w, q.b, q.s = leaves
        q.target = p.target
        return ours(q, q.s, **options)

    eager = step(*p.leaves)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*p.leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, p.leaves), torch.autograd.grad(eager, p.leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_transforms_of_torch_func() -> None:
    p = Problem(torch.float64)
    x, w, b = (t.detach() for t in (p.x, p.w, p.b))

    def loss(s: Tensor) -> Tensor:
        return memeff.linear_cross_entropy(x, w, p.target, linear_bias=b, logit_scale=s)

    (expected,) = torch.autograd.grad(loss(p.s), p.s)
    torch.testing.assert_close(torch.func.grad(loss)(p.s.detach()), expected)


# ---- temperatures ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equal_temperatures_are_one(dtype: torch.dtype, softcap: float | None) -> None:
    """Of a power of two, the same bits."""
    p = Problem(dtype)
    results = []
    for temperature in (torch.full((N,), 0.5), 0.5):
        s = memeff.linear_token_statistics(
            p.x, p.w, p.target, linear_bias=p.b, softcap=softcap, temperature=temperature
        )
        loss = (s.logprob + s.lse * s.entropy).sum()
        results.append([s.lse, s.entropy, *torch.autograd.grad(loss, p.leaves[:3])])
    for name, a, b in zip(("lse", "entropy", "dx", "dw", "db"), *results, strict=True):
        if a.dtype == dtype:
            torch.testing.assert_close(a, b, msg=name)
        else:
            assert torch.equal(a, b), name


def test_temperatures_of_linear_loss() -> None:
    """Gradients in the forward pass are those of the statistics."""
    p = Problem(torch.float64)
    temperature = torch.rand(N) + 0.3
    ours = custom(p, 1.2, temperature)
    s = memeff.linear_token_statistics(
        p.x, p.w, p.target, linear_bias=p.b, logit_scale=1.2, temperature=temperature
    )
    expected = ((s.logprob * 0.1).exp() * s.lse)[p.target != -100].mean()
    torch.testing.assert_close(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours, p.leaves[:3]), torch.autograd.grad(expected, p.leaves[:3]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_temperatures_of_ignored_tokens(backend: str) -> None:
    """Padding may have any; greedy decoding of prompts says 0."""
    p = Problem(torch.float64)
    temperature = torch.rand(N) + 0.3
    results = []
    for odd in (1.0, 0.0, torch.nan):
        temperature[p.target == -100] = odd
        logprobs = memeff.linear_logprobs(
            p.x, p.w, p.target, linear_bias=p.b, temperature=temperature, backend=backend
        )
        results.append([logprobs, *torch.autograd.grad(logprobs.square().sum(), p.leaves[:3])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_temperature_with_leading_dimensions_and_shift() -> None:
    x, w = torch.randn(2, 7, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    target, temperature = torch.randint(V, (2, 7)), torch.rand(2, 7, dtype=torch.float64) + 0.3
    ours = memeff.linear_logprobs(x, w, target, temperature=temperature, shift=True)
    z = (x @ w.t() / temperature[..., None])[:, :-1]
    expected = z.log_softmax(-1).gather(-1, target[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("temperature", "kind", "message"),
    [
        (0, ValueError, "temperature is 0, expected a finite value > 0"),
        (float("nan"), ValueError, "temperature is nan, expected"),
        (True, TypeError, "temperature must be a number, got bool"),
        (torch.ones(3), RuntimeError, r"temperature has shape \(3,\), expected .*\(61,\)"),
        (torch.ones(N).long(), RuntimeError, "temperature has dtype torch.int64"),
        (torch.zeros(N), ValueError, r"temperature\[0\] is 0, expected a finite value > 0"),
        (torch.full((N,), torch.inf), ValueError, r"temperature\[0\] is inf, expected"),
        (torch.ones(N, requires_grad=True), RuntimeError, "temperature requires grad, .*detach"),
    ],
    ids=str,
)
def test_errors(temperature: Any, kind: type[Exception], message: str) -> None:
    p = Problem(torch.float32)
    for function in (memeff.linear_token_statistics, memeff.linear_logprobs):
        p.target[0] = 5
        with pytest.raises(kind, match=message):
            function(p.x, p.w, p.target, temperature=temperature)


def test_unknown_options_of_logprobs() -> None:
    p = Problem(torch.float32)
    with pytest.raises(TypeError, match="linear_logprobs got an unexpected keyword argument 'top"):
        memeff.linear_logprobs(p.x, p.w, p.target, top_k=3)
