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

A call of few tokens has few independent roundings: where they all go one way, one program is twice
as close as the other, for no reason that the next inputs would confirm. (One token with class
probabilities: outside the rule in a quarter of all draws, although the median of the ratios is 1.0;
8 tokens: in none of 150.) Tests that draw such calls at random judge them by `assert_over_draws`. A
call that holds the rule is right as ever. One that does not is run on DRAWS inputs in all, and the
rule is applied to them together: to the root of the mean square of either side's errors, each in
units of its scale. That is the Frobenius norm of a call with so many times the tokens, and as
strict: luck averages out, an error that is always there does not, and one that is there in a single
draw is hidden only where it is below sqrt(DRAWS) times what the rule allows.

For float64 the plain computation is the reference itself, so it says nothing about rounding;
the rule is then error <= 256 epsilons * scale, with a scale of at least 1e-3 (the terms that cancel
in a smaller gradient are of that size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

LOSS_FACTOR = 1.0
GRADIENT_FACTOR = 1.1
LARGEST_ENTRY_FACTOR = 2.0
ENOUGH_ENTRIES = 1024
LUCK_EPSILONS = 4
FLOAT64_EPSILONS = 256
FLOAT64_LEAST_SCALE = 1e-3
DRAWS = 16


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


@dataclass(frozen=True)
class Comparison:
    """One tensor in one norm: the errors of memeff and of plain PyTorch, and what is allowed."""

    name: str  # for the message
    norm: str
    dtype: torch.dtype
    error: float
    plain_error: float
    scale: float
    factor: float
    epsilon: float

    @property
    def allowed(self) -> float:
        return self.factor * self.plain_error + self.epsilon * self.scale

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed

    def check(self) -> None:
        assert self.holds, (
            f"{self.name} ({self.dtype}, {self.norm}): error {self.error:.3e} against float64, "
            f"plain PyTorch's error {self.plain_error:.3e}, allowed {self.allowed:.3e}, "
            f"scale {self.scale:.3e}"
        )


def compare(
    name: str,
    ours: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    *,
    gradient: bool = True,
) -> list[Comparison]:
    """One tensor in every norm: a gradient, or a loss (or another statistic of a token).

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
        return []
    ours64, plain64, exact = ours.double()[finite], plain.double()[finite], exact[finite]
    scales = _norms(exact)
    if not gradient:
        scales["largest entry"] = max(scales["largest entry"], 1.0)
        scales["Frobenius norm"] = max(scales["Frobenius norm"], math.sqrt(exact.numel()))
    errors, plain_errors = _norms(ours64 - exact), _norms(plain64 - exact)
    result = []
    for norm, error in errors.items():
        factor = GRADIENT_FACTOR if gradient else LOSS_FACTOR
        if norm == "largest entry":
            factor *= LARGEST_ENTRY_FACTOR
        scale = scales[norm]
        if ours.dtype == torch.float64:
            scale = max(scale, FLOAT64_LEAST_SCALE)
        epsilon = torch.finfo(ours.dtype).eps * _epsilons(ours.dtype, exact.numel(), norm)
        result.append(
            Comparison(name, norm, ours.dtype, error, plain_errors[norm], scale, factor, epsilon)
        )
    return result


def compare_results(ours: Result, plain: Result, exact: Result) -> list[Comparison]:
    """The loss and every gradient; one that is missing on one side only fails."""
    result = compare("loss", ours.loss, plain.loss, exact.loss, gradient=False)
    for name in ("dx", "dw", "db"):
        parts = [getattr(side, name) for side in (ours, plain, exact)]
        missing = [part is None for part in parts]
        assert all(missing) or not any(missing), (
            f"{name}: missing from (memeff, plain, float64): {missing}"
        )
        if not missing[0]:
            result += compare(name, *parts)
    return result


def assert_all_hold(comparisons: Iterable[Comparison]) -> None:
    for comparison in comparisons:
        comparison.check()


def assert_close_as_plain(
    name: str,
    ours: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    *,
    gradient: bool = True,
) -> None:
    """The rule for one tensor; see `compare`."""
    assert_all_hold(compare(name, ours, plain, exact, gradient=gradient))


def assert_result(ours: Result, plain: Result, exact: Result) -> None:
    """The rule for the loss and every gradient."""
    assert_all_hold(compare_results(ours, plain, exact))


def _together(draws: list[Comparison]) -> Comparison:
    """The same tensor of several draws as if it were one, each in units of its scale."""

    def root_mean_square(errors: Iterable[float]) -> float:
        return math.sqrt(sum(error * error for error in errors) / len(draws))

    units = [draw.scale or 1.0 for draw in draws]
    first = draws[0]
    return Comparison(
        f"{first.name}, over {len(draws)} draws",
        first.norm,
        first.dtype,
        root_mean_square(draw.error / unit for draw, unit in zip(draws, units, strict=True)),
        root_mean_square(draw.plain_error / unit for draw, unit in zip(draws, units, strict=True)),
        1.0,
        first.factor,
        max(draw.epsilon for draw in draws),
    )


def assert_over_draws(draw: Callable[[int], list[Comparison]]) -> None:
    """The rule for a call of any size: draw(i) compares it on the i-th of its inputs.

    What `draw` raises by itself, about a shape or a NaN for example, is no matter of luck.
    """
    draws = [draw(0)]
    if all(comparison.holds for comparison in draws[0]):
        return
    draws += [draw(i) for i in range(1, DRAWS)]
    of_tensor: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in (comparison for comparisons in draws for comparison in comparisons):
        if math.isfinite(comparison.plain_error):  # else it allows anything
            of_tensor.setdefault((comparison.name, comparison.norm), []).append(comparison)
    assert_all_hold(_together(comparisons) for comparisons in of_tensor.values())
