"""What the tests of memeff.losses share: batches, pairs, heads, and equality with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

B, T = 5, 9


def batch(masked_row: bool = True) -> dict[str, Tensor]:
    """Log-probabilities [B, T]; masked positions hold nan, as nothing may look at them."""
    mask = torch.rand(B, T) < 0.7
    mask[:, 0] = True
    if masked_row:
        mask[2] = False
    result = {"mask": mask, "advantages": torch.randn(B, dtype=torch.float64)}
    for name, spread in (("logprobs", 0.0), ("old", 0.6), ("ref", 0.4)):
        base = result.get("logprobs", -torch.rand(B, T, dtype=torch.float64) * 3)
        values = base + spread * torch.randn(B, T, dtype=torch.float64)
        result[name] = values.masked_fill(~mask, torch.nan)
    result["logprobs"].requires_grad_()
    return result


def assert_same(ours: Tensor, expected: Tensor, leaf: Tensor, mask: Tensor | None = None) -> None:
    """Equal values and gradients; no gradient where the mask is zero."""
    torch.testing.assert_close(ours, expected)
    (a,) = torch.autograd.grad(ours * 1.7, leaf, retain_graph=True)
    (b,) = torch.autograd.grad(expected * 1.7, leaf, retain_graph=True)
    if mask is not None:
        assert not a[~mask].any()
        a, b = a[mask], b[mask]
    torch.testing.assert_close(a, b)


def pairs(count: int) -> list[Tensor]:
    return [-torch.rand(B, dtype=torch.float64) * 3 - 0.01 for _ in range(count)]


def heads(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(3, 4, 6, dtype=dtype, requires_grad=True),
        torch.randn(17, 6, dtype=dtype, requires_grad=True),
        torch.randn(17, dtype=dtype, requires_grad=True),
    )
