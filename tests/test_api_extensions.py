"""What linear_cross_entropy takes beyond torch's: shapes, shift, num_items, statistics, budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import memeff


def problem(*lead: int, features: int = 6, vocab: int = 11) -> tuple[torch.Tensor, ...]:
    """float64 leaves input [*lead, D], linear_weight [V, D], and a target with ignored tokens."""
    target = torch.randint(vocab, lead)
    target[torch.rand(lead) < 0.3] = -100
    x = torch.randn(*lead, features, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(vocab, features, dtype=torch.float64, requires_grad=True), target


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def assert_all_close(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("lead", [(), (5,), (1, 5), (2, 3, 4), (2, 0, 3), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_leading_dimensions(lead: tuple[int, ...], reduction: str, probabilities: bool) -> None:
    x, w, target = problem(*lead)
    if probabilities:
        target = torch.rand(*lead, 11, dtype=torch.float64)
    ours = memeff.linear_cross_entropy(x, w, target, reduction=reduction)
    assert ours.shape == (lead if reduction == "none" else ())
    flat_target = target.reshape(-1, 11) if probabilities else target.reshape(-1)
    expected = F.cross_entropy((x @ w.T).reshape(-1, 11), flat_target, reduction=reduction)
    if reduction == "none":
        expected = expected.reshape(lead)
    assert_all_close(gradients(ours, x, w), gradients(expected, x, w))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "reversed batch"])
def test_strides(layout: str) -> None:
    base = torch.randn(4, 6, 8, dtype=torch.float64)
    x = {
        "transposed": base.transpose(1, 2),  # [4, 8, 6]
        "expanded": base[:1, :1, :6].expand(4, 8, 6),
        "sliced": torch.randn(4, 8, 12, dtype=torch.float64)[..., ::2],
        "reversed batch": torch.randn(8, 4, 6, dtype=torch.float64).transpose(0, 1),
    }[layout].requires_grad_()
    _, w, target = problem(4, 8)
    ours = memeff.linear_cross_entropy(x, w, target)
    expected = F.cross_entropy((x @ w.T).flatten(0, 1), target.flatten())
    assert_all_close(gradients(ours, x, w), gradients(expected, x, w))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_target_dtypes(dtype: torch.dtype) -> None:
    x, w, target = problem(20)
    ours = memeff.linear_cross_entropy(x, w, target.to(dtype))
    torch.testing.assert_close(ours, memeff.linear_cross_entropy(x, w, target), rtol=0, atol=0)


@pytest.mark.parametrize("shift", [True, 1, 2, 5, 6, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shift(shift: bool | int, reduction: str) -> None:
    x, w, target = problem(3, 6)
    ours = memeff.linear_cross_entropy(x, w, target, shift=shift, reduction=reduction)
    k = int(shift)
    logits = (x @ w.T)[:, : max(6 - k, 0)]
    expected = F.cross_entropy(logits.reshape(-1, 11), target[:, k:].flatten(), reduction=reduction)
    if reduction == "none":
        expected = expected.reshape(3, max(6 - k, 0))
    assert_all_close(gradients(ours, x, w), gradients(expected, x, w))


def test_shift_of_one_sequence_and_of_zero() -> None:
    x, w, target = problem(9)
    ours = memeff.linear_cross_entropy(x, w, target, shift=2)
    torch.testing.assert_close(ours, memeff.linear_cross_entropy(x[:-2], w, target[2:]))
    ours = memeff.linear_cross_entropy(x, w, target, shift=0)
    torch.testing.assert_close(ours, memeff.linear_cross_entropy(x, w, target), rtol=0, atol=0)


@pytest.mark.parametrize("probabilities", [False, True])
def test_shift_with_everything(probabilities: bool) -> None:
    """token_weight moves with the target; statistics lose the last positions."""
    x, w, target = problem(2, 7)
    if probabilities:
        target = torch.randn(2, 7, 11, dtype=torch.float64).softmax(-1)
    token_weight = torch.rand(2, 7)
    keywords: dict[str, Any] = {
        "softcap": 3.0, "logit_scale": 1.5, "z_loss": 0.1, "label_smoothing": 0.1,
        "return_statistics": True,
    }  # fmt: skip
    loss, statistics = memeff.linear_cross_entropy(
        x, w, target, shift=3, token_weight=token_weight, **keywords
    )
    expected, expected_statistics = memeff.linear_cross_entropy(
        x[:, :-3], w, target[:, 3:], token_weight=token_weight[:, 3:], **keywords
    )
    assert_all_close(gradients(loss, x, w), gradients(expected, x, w))
    for name, ours, other in zip(statistics._fields, statistics, expected_statistics, strict=True):
        assert ours.shape == (2, 4), name
        torch.testing.assert_close(ours, other)


def test_shift_does_not_copy_hidden_states() -> None:
    x = torch.randn(4, 64, 512)
    w, target = torch.randn(8, 512), torch.randint(8, (4, 64))

    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != x.data_ptr():
                self.largest = max(self.largest, result.numel())
            return result

    with Copies() as copies, torch.no_grad():
        memeff.linear_cross_entropy(x, w, target, shift=1)
    assert copies.largest <= target.numel()


@pytest.mark.parametrize("kind", ["int", "int tensor", "float tensor"])
@pytest.mark.parametrize("shape", [(11, 6), (11, 2, 6)], ids=str)
def test_num_items(kind: str, shape: tuple[int, ...]) -> None:
    """Replaces the denominator of both terms, whatever the weights."""
    x, w = torch.randn(5, 6, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    target = torch.randint(11, (5, *shape[1:-1]))
    target[0] = -100
    keywords: dict[str, Any] = {"weight": torch.rand(11, dtype=torch.float64), "z_loss": 0.3}
    number = {"int": 17, "int tensor": torch.tensor(17), "float tensor": torch.tensor(17.0)}[kind]
    ours = memeff.linear_cross_entropy(x, w, target, num_items=number, **keywords)
    total = memeff.linear_cross_entropy(x, w, target, reduction="sum", **keywords)
    torch.testing.assert_close(ours, total / 17)


def test_gradient_accumulation_with_num_items() -> None:
    """Micro-batches with different numbers of counted tokens add up to the whole batch."""
    x, w, target = problem(12)
    whole = gradients(memeff.linear_cross_entropy(x, w, target), w)
    counted = (target != -100).sum()
    parts = [
        gradients(memeff.linear_cross_entropy(x[s], w, target[s], num_items=counted), w)
        for s in (slice(0, 3), slice(3, 4), slice(4, 12))
    ]
    assert_all_close(tuple(map(sum, zip(*parts, strict=True))), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_statistics(dtype: torch.dtype, reduction: str, differentiate: bool) -> None:
    """Against plain PyTorch, also for ignored tokens; detached; the loss stays the same."""
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=differentiate)
    w = torch.randn(13, 8, dtype=dtype, requires_grad=differentiate)
    target = torch.randint(13, (3, 5))
    target[1] = -100
    keywords: dict[str, Any] = {"reduction": reduction, "softcap": 4.0, "z_loss": 0.1}
    loss, s = memeff.linear_cross_entropy(x, w, target, return_statistics=True, **keywords)
    torch.testing.assert_close(loss, memeff.linear_cross_entropy(x, w, target, **keywords))
    assert loss.requires_grad == differentiate

    assert isinstance(s, memeff.TokenStatistics)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, value in zip(s._fields, s, strict=True):
        assert value.shape == (3, 5), name
        assert not value.requires_grad, name
        assert value.dtype == {"argmax": torch.int64, "correct": torch.bool}.get(name, wide), name

    z = 4.0 * torch.tanh(x.detach().double() @ w.detach().double().T / 4.0)
    log_p = z.log_softmax(-1)
    counted = target != -100
    picked = z.gather(-1, target.where(counted, 0)[..., None])[..., 0].where(counted, 0)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    # Ignored tokens are not looked at: all their statistics are 0.
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(s.lse, z.logsumexp(-1).where(counted, 0), **close)
    torch.testing.assert_close(s.entropy, entropy.where(counted, 0), **close)
    torch.testing.assert_close(s.max_logit, z.amax(-1).where(counted, 0), **close)
    torch.testing.assert_close(s.target_logit, picked, **close)
    torch.testing.assert_close(s.logprob, (picked - z.logsumexp(-1)).where(counted, 0), **close)
    expected_loss = (-(picked - z.logsumexp(-1)) + 0.1 * z.logsumexp(-1) ** 2).where(counted, 0)
    torch.testing.assert_close(s.loss, expected_loss, **close)
    of_argmax = z.gather(-1, s.argmax[..., None])[..., 0]
    assert torch.equal(of_argmax[counted], z.amax(-1)[counted])
    assert not s.argmax[~counted].any()
    assert torch.equal(s.correct, (s.argmax == target) & counted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2, "class_weights": True},
        {"z_loss": 0.1, "class_weights": True, "logit_scale": 0.3},
        {"softcap": 2.0, "label_smoothing": 0.2, "token_weight": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("positions", [(), (3,), (2, 2)], ids=str)
def test_statistics_against_reference(
    options: dict[str, Any], probabilities: bool, positions: tuple[int, ...]
) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    w = torch.randn(11, *positions, 6, dtype=torch.float64)
    if probabilities:
        target = torch.randn(5, 11, *positions, dtype=torch.float64).softmax(1)
    else:
        target = torch.randint(11, (5, *positions))
        target[2] = -100
    keywords = dict(options)
    if keywords.pop("class_weights", False):
        keywords["weight"] = torch.rand(11, dtype=torch.float64)
    if keywords.pop("token_weight", False):
        keywords["token_weight"] = torch.rand(5, *positions, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        ours = memeff.linear_cross_entropy(
            x, w, target, return_statistics=True, reduction=reduction, **keywords
        )
        expected = memeff.reference.linear_cross_entropy(
            x, w, target, return_statistics=True, reduction=reduction, **keywords
        )
        torch.testing.assert_close(ours[0], expected[0])
        for name, a, b in zip(ours[1]._fields, ours[1], expected[1], strict=True):
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backend_reference(reduction: str) -> None:
    x, w, target = problem(2, 4)
    keywords: dict[str, Any] = {"reduction": reduction, "shift": 1, "softcap": 5.0, "z_loss": 0.01}
    ours = memeff.linear_cross_entropy(x, w, target, backend="reference", **keywords)
    kernels = memeff.linear_cross_entropy(x, w, target, backend="cpu", **keywords)
    assert_all_close(gradients(ours, x, w), gradients(kernels, x, w))


@pytest.mark.parametrize("budget", ["64MiB", " 0.5 gib ", "1GB", "100000 KB", 2**26, 2**26 + 1])
def test_memory_budget_does_not_change_the_result(budget: int | str) -> None:
    x, w, target = problem(30)
    ours = memeff.linear_cross_entropy(x, w, target, memory_budget=budget)
    expected = memeff.linear_cross_entropy(x, w, target)
    assert_all_close(gradients(ours, x, w), gradients(expected, x, w))


@pytest.mark.parametrize("accum_dtype", [None, "wide"])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 30, 1000])
def test_chunk_size_does_not_change_the_result(accum_dtype: str | None, chunk_size: int) -> None:
    x, w, target = problem(30)
    ours = memeff.linear_cross_entropy(
        x, w, target, chunk_size=chunk_size, accum_dtype=x.dtype if accum_dtype else None
    )
    expected = F.cross_entropy(x @ w.T, target)
    assert_all_close(gradients(ours, x, w), gradients(expected, x, w))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_meta_tensors(reduction: str, requires_grad: bool) -> None:
    """Only shapes and dtypes."""
    x = torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=requires_grad)
    w = torch.empty(100, 8, device="meta", dtype=torch.bfloat16, requires_grad=requires_grad)
    target = torch.empty(2, 5, device="meta", dtype=torch.int64)
    loss, statistics = memeff.linear_cross_entropy(
        x, w, target, reduction=reduction, return_statistics=True, shift=1
    )
    assert loss.is_meta
    assert loss.dtype == torch.float32
    assert loss.shape == ((2, 4) if reduction == "none" else ())
    assert all(value.is_meta and value.shape == (2, 4) for value in statistics)
    if requires_grad:
        loss.sum().backward()
        assert x.grad is not None and x.grad.is_meta and x.grad.shape == x.shape
        assert w.grad is not None and w.grad.is_meta and w.grad.dtype == torch.bfloat16
