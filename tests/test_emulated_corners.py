"""Corners of the CUDA kernels, emulated: hidden states of ignored tokens that are not finite,
numbers beyond what fp16 holds, saturated soft caps, logits that are infinite or not a number,
gradients that all round alike.
"""

from __future__ import annotations

import math
from typing import Any

import emulated
import pytest
import torch
import torch.nn.functional as F
from emulated import no_reports  # noqa: F401

import memeff

pytestmark = emulated.needed

VARIANTS = [
    ("generic,generic", torch.float32),
    ("generic,generic", torch.bfloat16),
    ("sm80,generic", torch.bfloat16),
    ("sm80,sm80", torch.float16),
    ("sm90,sm90", torch.bfloat16),
    ("sm90x2,sm90rs", torch.bfloat16),
    ("sm90x2,sm90x2", torch.float16),
]
FP16_VARIANTS = ["generic,generic", "sm80,generic", "sm80,sm80", "sm90,sm90", "sm90x2,sm90x2"]


dtype = emulated.dtype_fixture(VARIANTS)


# ---- what is ignored is never looked at ----


def tensors(dtype: torch.dtype, tokens: int = 140) -> tuple[torch.Tensor, ...]:
    """x, W and targets of which every third is ignored; x again, those rows not finite."""
    features, vocab = 24, 300
    x, w = torch.randn(tokens, features).to(dtype), torch.randn(vocab, features).to(dtype)
    target = torch.randint(vocab, (tokens,))
    target[::3] = -100
    poisoned = x.clone()
    poisoned[0], poisoned[3], poisoned[6] = math.nan, math.inf, -math.inf
    poisoned[9:40:3] = math.nan
    return x, w, target, poisoned


def results(
    call: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """What the call returns, and its gradients for uneven upstream ones."""
    leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    values = call(*leaves)
    values = values if isinstance(values, (tuple, list)) else [values]
    values = [v for v in values if v.requires_grad]
    total = sum(
        (v * torch.linspace(0.5, 2, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in values
    )
    assert isinstance(total, torch.Tensor)
    return [*(v.detach() for v in values), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "z_loss": 0.1},
        {"return_statistics": True},
        {"label_smoothing": 0.1, "skip_mass": 1e-3},
        {"softcap": 4.0, "label_smoothing": 0.1},
        {"chunk_size": 64},
    ],
    ids=str,
)
def test_hidden_states_of_ignored_tokens(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The same bits whatever they are."""
    x, w, target, poisoned = tensors(dtype)
    bias = None if "skip_mass" in options else torch.randn(len(w)).to(dtype)

    def call(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> Any:
        result = memeff.linear_cross_entropy(
            x, w, target, linear_bias=b, backend="emulated", **options
        )
        return result[0] if "return_statistics" in options else result

    for mine, wanted in zip(
        results(call, poisoned, w, bias), results(call, x, w, bias), strict=True
    ):
        assert torch.equal(mine, wanted) and wanted.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_states_of_ignored_tokens_in_the_smallest_budget(
    reduction: str, dtype: torch.dtype
) -> None:
    """Where blocks of tokens take turns in the copy of the hidden states."""
    x, w, target, poisoned = tensors(dtype, 300)

    def call(x: torch.Tensor, w: torch.Tensor, budget: int) -> torch.Tensor:
        return memeff.linear_cross_entropy(
            x, w, target, reduction=reduction, memory_budget=budget, backend="emulated"
        )

    with pytest.raises(ValueError, match="memory_budget") as caught:
        results(lambda x, w: call(x, w, 1), x, w)
    least = int(str(caught.value).rpartition(" bytes")[0].split()[-1])
    mine, wanted = (results(lambda x, w: call(x, w, least), side, w) for side in (poisoned, x))
    for value, other in zip(mine, wanted, strict=True):
        assert torch.equal(value, other) and other.isfinite().all()


def test_hidden_states_of_ignored_tokens_in_statistics(dtype: torch.dtype) -> None:
    x, w, target, poisoned = tensors(dtype)

    def logprobs(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return memeff.linear_logprobs(x, w, target, backend="emulated")

    def per_token_loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        def loss(s: memeff.LogitStatistics, target: torch.Tensor) -> torch.Tensor:
            # What is ignored has an lse, which must not enter arithmetic.
            return s.lse.masked_fill(target == -100, 0.0).square() - s.logprob

        return memeff.linear_loss(loss, x, w, target, target, reduction="sum", backend="emulated")

    for call in (logprobs, per_token_loss):
        for mine, wanted in zip(results(call, poisoned, w), results(call, x, w), strict=True):
            assert torch.equal(mine, wanted) and wanted.isfinite().all()


# ---- coefficients beyond what fp16 holds ----


@pytest.mark.parametrize("kernels", FP16_VARIANTS)
@pytest.mark.parametrize(
    ("tokens", "vocab", "scale", "upstream", "z_loss"),
    [
        (12, 1, 1e4, 1024.0, 0.1),  # a large lse
        (12, 5, 1e3, 1024.0, 0.1),
        (140, 300, 1.0, 3e6, 0.0),  # upstream gradients times a loss scale
        (140, 300, 1.0, None, 1e-3),  # of all sizes, 1e-3 to 1e6
    ],
)
def test_large_coefficients(
    tokens: int,
    vocab: int,
    scale: float,
    upstream: float | None,
    z_loss: float,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients that fp16 holds are right although the gradients of the logits are beyond it."""
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    features = 16
    x = (torch.randn(tokens, features) * scale).half()
    w = (torch.randn(vocab, features) * 0.01).half()
    b = torch.randn(vocab).half()
    target = torch.randint(vocab, (tokens,))
    grad = torch.full((tokens,), upstream) if upstream else 10 ** torch.linspace(-3, 6, tokens)
    # So small that grad_weight and grad_bias of so many tokens are finite, too.
    grad = grad * 2.0**-10 if vocab > 100 else grad
    token_weight = torch.full((tokens,), 2.0**10) if vocab > 100 else torch.ones(tokens)

    def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        z = F.linear(x, w, b).to(wide)
        loss = F.cross_entropy(z, target, reduction="none") + z_loss * z.logsumexp(-1).square()
        return loss * token_weight.to(wide)

    sides = []
    for to in (torch.half, torch.double):
        leaves = [t.to(to).requires_grad_() for t in (x, w, b)]
        if to == torch.half:
            loss = memeff.linear_cross_entropy(
                *leaves[:2], target, linear_bias=leaves[2], reduction="none", z_loss=z_loss,
                token_weight=token_weight, backend="emulated",
            )  # fmt: skip
        else:
            loss = plain(*leaves)
        sides.append(torch.autograd.grad(loss, leaves, grad.to(loss.dtype)))
    for name, ours, exact in zip(("dx", "dw", "db"), *sides, strict=True):
        fits = exact.abs() < 60000
        assert ours[fits].isfinite().all(), name
        # grad_input row by row, so that large rows do not hide small ones; a few roundings to fp16.
        rows = [t.double().reshape(len(t), -1) for t in (ours, exact)]
        errors = (rows[0] - rows[1]).masked_fill(~fits.view_as(rows[1]), 0).abs().amax(-1)
        sizes = rows[1].abs().amax(-1) if name == "dx" else rows[1].abs().max()
        assert (errors <= 8 * 2.0**-11 * sizes + 2.0**-24).all(), name


@pytest.mark.parametrize("kernels", FP16_VARIANTS)
@pytest.mark.parametrize("size", [1e5, 1e8])
def test_large_coefficients_of_statistics(
    size: float, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    x, w = (torch.randn(140, 16) / 16).half(), (torch.randn(300, 16) / size).half()
    target = torch.randint(300, (140,))

    def loss(s: memeff.LogitStatistics) -> torch.Tensor:
        return size * (s.lse.square() - s.logprob)

    def fused(x: torch.Tensor, w: torch.Tensor, **options: Any) -> torch.Tensor:
        return memeff.linear_loss(loss, x, w, target, reduction="sum", **options)

    w = w * 4
    dx = torch.autograd.grad(fused(x.requires_grad_(), w, backend="emulated"), x)[0]
    exact = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(fused(exact, w.double()), exact)[0]
    assert (dx - wanted).abs().max() <= 4 * 2.0**-11 * wanted.abs().max()


# ---- logits at the ends of the range ----


def test_infinite_logits_and_nan(dtype: torch.dtype) -> None:
    """lse and max_logit of a row with +inf, and of one with NaN, as torch has them."""
    x, w = torch.randn(6, 8).to(dtype), torch.randn(300, 8).to(dtype)
    bias = torch.zeros(300).to(dtype)
    bias[131] = math.inf
    x[3] = math.nan
    z = F.linear(x.double(), w.double(), bias.double())
    s = memeff.linear_token_statistics(x, w, linear_bias=bias, backend="emulated")
    others = torch.arange(6) != 3
    assert (s.lse[others] == math.inf).all() and (s.max_logit[others] == math.inf).all()
    assert torch.equal(s.lse.isnan(), z.logsumexp(-1).isnan()) and s.lse[3].isnan()
    assert torch.equal(s.max_logit.isnan(), z.amax(-1).isnan())
    # Where only one class is NaN, wherever it lies.
    for place in (0, 131, 299):
        bias = torch.zeros(300).to(dtype)
        bias[place] = math.nan
        s = memeff.linear_token_statistics(x, w, linear_bias=bias, backend="emulated")
        assert s.lse.isnan().all() and s.max_logit.isnan().all()


def test_losses_of_infinite_logits(dtype: torch.dtype) -> None:
    """One feature: a hidden state of -inf makes every logit infinite and none NaN."""
    x, w = torch.randn(9, 1).to(dtype), torch.rand(300, 1).to(dtype) + 0.5
    w[::2] *= -1
    x[4] = -math.inf
    target = torch.randint(300, (9,))
    target[4] = -100

    def per_token_loss(s: memeff.LogitStatistics, target: torch.Tensor) -> torch.Tensor:
        return torch.where(target == -100, (-s.lse).exp(), -s.logprob)

    loss = memeff.linear_loss(
        per_token_loss, x, w, target, target, reduction="sum", backend="emulated"
    )
    expected = F.cross_entropy(x.double() @ w.double().T, target, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reach", [3.0, 6.0, 9.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saturated_softcap(reach: float, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits far beyond the cap: their derivatives are small, but keep their digits."""
    for kernels, dtype, tolerance in (
        ("generic,generic", torch.float32, 1e-5),
        ("generic,generic", torch.float64, 1e-12),
        ("generic,generic", torch.bfloat16, 0.02),
        ("sm80,sm80", torch.bfloat16, 0.02),
        ("sm90,sm90", torch.bfloat16, 0.02),
    ):
        monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
        if reduction == "mean" and dtype == torch.bfloat16 and kernels != "generic,generic":
            continue  # scores that are kept in 16 bits: docs/numerics.md
        x, w = torch.ones(40, 8).to(dtype), torch.rand(140, 8).to(dtype)
        w = (w + 3.5) * torch.randint(0, 2, (140, 1)).mul(2).sub(1)
        target = torch.randint(140, (40,))
        cap = 32.0 / reach  # the logits are about +- 32, times 1 +- 0.1
        options: dict[str, Any] = {"softcap": cap, "reduction": reduction}
        mine = results(
            lambda x, w, o=options, t=target: memeff.linear_cross_entropy(
                x, w, t, backend="emulated", **o
            ),
            x, w,
        )  # fmt: skip
        exact = results(
            lambda x, w, c=cap, t=target: F.cross_entropy(
                c * (1 - 2 / (1 + (2 * (x @ w.T) / c).exp())), t, reduction=reduction
            ),
            x.double(), w.double(),
        )  # fmt: skip
        for ours, wanted in zip(mine[1:], exact[1:], strict=True):
            assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max(), (kernels, dtype)


# ---- gradients of the logits that all round alike ----


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "sum"},
        {"reduction": "sum", "softcap": 4.0},
        {"reduction": "sum", "chunk_size": 64},
        {"reduction": "sum", "label_smoothing": 0.5},
    ],
    ids=str,
)
def test_bias_gradient_of_a_flat_softmax(options: dict[str, Any], dtype: torch.dtype) -> None:
    """It is rounded once, as its exact value is. If each token's part was rounded first, as it is
    for the products, the sum would have other bits in bf16 and in fp16."""
    tokens, vocab, upstream = 140, 300, 1.25 if options["reduction"] == "none" else 1.0
    x, w = torch.zeros(tokens, 24, dtype=dtype), torch.randn(vocab, 24).to(dtype)
    b = torch.zeros(vocab, dtype=dtype)
    target = torch.randint(10, (tokens,))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = memeff.linear_cross_entropy(x, w, target, linear_bias=b, backend="emulated", **options)
    *_, gradient = torch.autograd.grad((loss * upstream).sum(), leaves)
    scale = upstream * (1 - options.get("label_smoothing", 0.0))
    counts = torch.bincount(target, minlength=vocab).double()
    exact = scale * (tokens / vocab - counts)
    if dtype == torch.float32:
        torch.testing.assert_close(gradient, exact.float(), rtol=1e-6, atol=1e-6)
        return
    assert torch.equal(gradient, exact.to(dtype))
    rounded = torch.tensor(scale / vocab, dtype=torch.float64).to(dtype).double() * tokens
    assert rounded.to(dtype) != gradient[-1], "this test sees no rounding"
