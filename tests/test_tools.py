"""What torch's tools make of memeff's operators: FLOP counters, the profiler, vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import memeff
from memeff import losses

N, D, V = 24, 16, 40
PRODUCT = 2 * N * D * V


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, w = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.randint(V, (N,))


def flops(function: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        result = function()
        if result.requires_grad:
            result.sum().backward()
    return counter.get_total_flops()


def test_flops_of_cross_entropy() -> None:
    """As many products as the plain loss has; one more where the logits are computed again."""
    x, w, y = operands()
    assert flops(lambda: F.cross_entropy(x @ w.T, y)) == 3 * PRODUCT
    ce = memeff.linear_cross_entropy
    assert flops(lambda: ce(x, w, y)) == 3 * PRODUCT
    assert flops(lambda: ce(x, w.detach(), y)) == 2 * PRODUCT
    assert flops(lambda: ce(x.detach(), w.detach(), y)) == PRODUCT
    assert flops(lambda: ce(x, w, y, reduction="none")) == 4 * PRODUCT
    x16, w16, _ = operands(torch.float16)
    assert flops(lambda: ce(x16, w16, y)) == 4 * PRODUCT
    with torch.no_grad():
        assert flops(lambda: ce(x, w, y)) == PRODUCT


def test_flops_of_statistics() -> None:
    x, w, y = operands()
    statistics = memeff.linear_token_statistics
    assert flops(lambda: statistics(x.detach(), w.detach(), y).lse) == PRODUCT
    assert flops(lambda: statistics(x, w, y).logprob) == 4 * PRODUCT
    assert flops(lambda: memeff.linear_logprobs(x, w, y)) == 4 * PRODUCT


def test_flops_of_other_losses() -> None:
    x, w, y = operands()
    assert flops(lambda: memeff.linear_loss(lambda s: -s.logprob, x, w, y)) == 3 * PRODUCT
    teacher, weight = torch.randn(N, 2 * D), torch.randn(V, 2 * D)
    distilled = flops(lambda: losses.linear_distillation_loss(x, w, teacher, weight))
    assert distilled == (3 + 2) * PRODUCT


def test_flops_of_a_patched_model() -> None:
    """The same as of the plain one."""
    head = torch.nn.Linear(D, V, bias=False)
    x, _, y = operands()

    def step() -> Tensor:
        return F.cross_entropy(head(x), y)

    plain = flops(step)
    memeff.patch(head, strict=True)
    assert flops(step) == plain == 3 * PRODUCT


def test_names_in_the_profiler() -> None:
    x, w, y = operands()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        memeff.linear_cross_entropy(x, w, y).backward()
        memeff.linear_token_statistics(x, w, y).logprob.sum().backward()
    names = {event.key for event in profiled.key_averages()}
    assert names >= {
        "memeff::linear_cross_entropy_forward",
        "LinearCrossEntropyBackward",
        "memeff::linear_token_statistics_forward",
        "TokenStatisticsBackward",
        "memeff::linear_token_statistics_backward",
    }


@pytest.mark.parametrize("function", [memeff.linear_cross_entropy, memeff.linear_logprobs])
def test_vmap(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Torch loops over it, forward and backward."""
    x = torch.randn(3, 4, D, requires_grad=True)
    w, y = torch.randn(V, D, requires_grad=True), torch.randint(V, (3, 4))
    expected = torch.stack([function(a, w, b) for a, b in zip(x, y, strict=True)])
    found = torch.vmap(lambda a, b: function(a, w, b))(x, y)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(result, (x, w), upstream) for result in (found, expected))
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_vmap_of_linear_loss() -> None:
    """An error that names the way out; without gradients torch loops."""

    def function(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return memeff.linear_loss(lambda s: -s.logprob, x, w, y)

    x, w, y = torch.randn(3, 4, D), torch.randn(V, D), torch.randint(V, (3, 4))
    expected = torch.stack([function(a, w, b) for a, b in zip(x, y, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lambda a, b: function(a, w, b))(x, y), expected)
    w.requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.vmap.*\[B, \.\.\., D\].*or loop over B"):
        torch.vmap(lambda a, b: function(a, w, b))(x, y)
