"""THE tolerance rule: memeff may not be farther from float64 than plain PyTorch in the same dtype.

The plain side (`cases.run_plain`) is what model code does: logits from torch's own linear layer,
upcast to float32 (float64 stays), torch's own cross entropy, autograd. Both sides get the same
inputs; the reference is the plain computation on those inputs converted to float64, so that
converting them is no error of an implementation.

For the errors measured in the Frobenius norm,

    error(memeff) <= factor * error(plain) + epsilons * scale

    factor    1.0 for losses, 1.1 for gradients
    epsilons  torch.finfo(dtype of the result).eps, where the loss of 16-bit inputs is float32.
              A quarter of it for 16-bit gradients of at least 1024 entries: a whole bf16 epsilon is
              three times the error that plain PyTorch makes there, and would hide a running sum
              that was rounded to bf16 a few times.
              Four for float32 results of fewer entries, where luck has not averaged out: between
              two correct programs the ratio of errors then varies by a factor of two and more.
    scale     the same norm of the reference; for losses at least the norm of all ones, because
              log(sum exp) of a float32 sum near 1 cannot be better than that

The same with twice the factor (and four epsilons in float32) for the largest error of any entry,
which finds a few wrong entries among many right ones, and which luck alone moves by that much.

For float64 the plain computation is the reference itself, so it says nothing about rounding;
the rule is then error <= 256 epsilons * scale, with a scale of at least 1e-3 (the terms that cancel
in a smaller gradient are of that size).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOSS_FACTOR = 1.0
GRADIENT_FACTOR = 1.1
LARGEST_ENTRY_FACTOR = 2.0
ENOUGH_ENTRIES = 1024
LUCK_EPSILONS = 4
FLOAT64_EPSILONS = 256
FLOAT64_LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class Result:
    """A loss and whichever gradients were asked for."""

    loss: torch.Tensor
    dx: torch.Tensor | None = None
    dw: torch.Tensor | None = None
    db: torch.Tensor | None = None

    def cpu(self) -> Result:
        parts = (self.loss, self.dx, self.dw, self.db)
        return Result(*(None if part is None else part.cpu() for part in parts))


def _norms(difference: torch.Tensor) -> dict[str, float]:
    return {
        "Frobenius norm": difference.norm().item(),
        "largest entry": difference.abs().max().item(),
    }


def _epsilons(dtype: torch.dtype, entries: int, norm: str) -> float:
    averaged = norm == "Frobenius norm" and entries >= ENOUGH_ENTRIES
    if dtype == torch.float64:
        return FLOAT64_EPSILONS
    if dtype == torch.float32:
        return 1 if averaged else LUCK_EPSILONS
    return 1 / 4 if averaged else 1


def assert_close_as_plain(
    name: str,
    ours: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    *,
    gradient: bool = True,
) -> None:
    """The rule for one tensor: a gradient, or a loss (or another statistic of a token).

    All three sides have one shape; `exact` is float64. Where it is not finite, ours must be not
    finite in the same way. `name` is for the message.
    """
    assert ours.shape == exact.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    )
    finite = exact.isfinite()
    if not finite.all():
        odd, expected = ours.double()[~finite], exact[~finite]
        assert torch.equal(odd.isnan(), expected.isnan()), f"{name}: {odd}, expected {expected}"
        infinite = ~expected.isnan()
        assert torch.equal(odd[infinite], expected[infinite]), f"{name}: {odd}, expected {expected}"
    if not finite.any():
        return
    ours64, plain64, exact = ours.double()[finite], plain.double()[finite], exact[finite]
    scales = _norms(exact)
    if not gradient:
        scales["largest entry"] = max(scales["largest entry"], 1.0)
        scales["Frobenius norm"] = max(scales["Frobenius norm"], math.sqrt(exact.numel()))
    errors, plain_errors = _norms(ours64 - exact), _norms(plain64 - exact)
    for norm, error in errors.items():
        factor = GRADIENT_FACTOR if gradient else LOSS_FACTOR
        if norm == "largest entry":
            factor *= LARGEST_ENTRY_FACTOR
        epsilon = torch.finfo(ours.dtype).eps * _epsilons(ours.dtype, exact.numel(), norm)
        if ours.dtype == torch.float64:
            scales[norm] = max(scales[norm], FLOAT64_LEAST_SCALE)
        allowed = factor * plain_errors[norm] + epsilon * scales[norm]
        assert error <= allowed, (
            f"{name} ({ours.dtype}, {norm}): error {error:.3e} against float64, plain PyTorch's "
            f"error {plain_errors[norm]:.3e}, allowed {allowed:.3e}, scale {scales[norm]:.3e}"
        )


def assert_result(ours: Result, plain: Result, exact: Result) -> None:
    """The rule for the loss and every gradient; one that is missing on one side only fails."""
    assert_close_as_plain("loss", ours.loss, plain.loss, exact.loss, gradient=False)
    for name in ("dx", "dw", "db"):
        parts = [getattr(side, name) for side in (ours, plain, exact)]
        missing = [part is None for part in parts]
        assert all(missing) or not any(missing), (
            f"{name}: missing from (memeff, plain, float64): {missing}"
        )
        if not missing[0]:
            assert_close_as_plain(name, *parts)
