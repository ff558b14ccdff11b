"""Checks of the arguments of the losses, before anything is computed.

Every message names the argument, its value, what was expected, and where it is not obvious the way
out. As in the rest of memeff, wrong shapes, dtypes and devices raise RuntimeError, wrong Python
types TypeError, bad values ValueError.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memeff import _checks
from memeff._operands import parse_num_items


class Interval(NamedTuple):
    """The finite numbers from ``low`` to ``high``."""

    low: float
    high: float
    low_included: bool = True
    high_included: bool = True

    def holds(self, value: float) -> bool:
        """NaN is in no interval."""
        above = value >= self.low if self.low_included else value > self.low
        below = value <= self.high if self.high_included else value < self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite value"
        if self.high == math.inf:
            sign = ">=" if self.low_included else ">"
            return f"a finite value {sign} {self.low:g}"
        left, right = "[" if self.low_included else "(", "]" if self.high_included else ")"
        return f"a value in {left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Interval(0, math.inf, low_included=False)
NOT_NEGATIVE = Interval(0, math.inf)
FRACTION = Interval(0, 1)
FINITE = Interval(-math.inf, math.inf)


def check_coefficient(name: str, value: object, interval: Interval) -> None:
    """A Python number in ``interval``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        way_out = ", call .item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{way_out}")
    if not interval.holds(value):
        raise ValueError(f"{name} is {value}, expected {interval}")


def check_floats(name: str, values: Tensor) -> None:
    """A tensor of floats: log-probabilities, log-sum-exps, hidden states."""
    _checks.check_tensor(name, values)
    if values.dtype not in _checks.DTYPES:
        raise RuntimeError(
            f"{name} has dtype {values.dtype}, expected one of "
            f"{', '.join(map(str, _checks.DTYPES))}"
        )


def check_same_shape(name: str, values: Tensor | None, like_name: str, like: Tensor) -> None:
    """The shape and the device of another argument: nothing is broadcast in silence."""
    if values is None:
        return
    _checks.check_tensor(name, values)
    if values.shape != like.shape:
        raise RuntimeError(
            f"{name} has shape {tuple(values.shape)}, expected that of {like_name}, "
            f"{tuple(like.shape)}{_reshaped(values, like)}"
        )
    check_real(name, values, like_name, like)


def check_real(name: str, values: Tensor, like_name: str, like: Tensor) -> None:
    if values.is_complex():
        raise RuntimeError(f"{name} has dtype {values.dtype}, expected real numbers")
    if values.device != like.device:
        raise RuntimeError(
            f"{name} is on {values.device}, expected the device of {like_name}, {like.device}"
        )


def _reshaped(values: Tensor, like: Tensor) -> str:
    """The way out where only dimensions of size 1 differ."""
    if [n for n in values.shape if n != 1] == [n for n in like.shape if n != 1]:
        return f"; .reshape({', '.join(map(str, like.shape))}) gives it that"
    return ""


def check_labels(name: str, labels: Tensor, like_name: str, like: Tensor) -> None:
    """Bool: other labels, such as +1 and -1, do not say which ones mean True."""
    check_same_shape(name, labels, like_name, like)
    if labels.dtype != torch.bool:
        raise RuntimeError(
            f"{name} has dtype {labels.dtype}, expected torch.bool; labels of 0 and 1 or of -1 and "
            "1 become that by `labels > 0`"
        )


def check_given(name: str, value: Tensor | None, coefficient: str, number: float) -> None:
    """A tensor that a coefficient other than 0 asks for."""
    if number != 0 and value is None:
        raise ValueError(f"{name} is None, expected a tensor: {coefficient} is {number}")


def divisor_of(num_items: Any, counted: Tensor) -> Tensor:
    """What a sum over tokens is divided by: ``num_items`` or the positions that count; 0 counts as
    1."""
    if num_items is None:
        return counted.sum().clamp(min=1)
    return parse_num_items(num_items, counted.device)
