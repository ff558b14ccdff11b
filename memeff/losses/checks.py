"""Checks of the arguments of the losses, before anything is computed.

Every message names the argument, its value, what was expected, and where it is not obvious the way
out. As in the rest of memeff, wrong shapes, dtypes and devices raise RuntimeError, wrong Python
types TypeError, bad values ValueError.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memeff._checks import check_floats, check_number, check_tensor, dequantised
from memeff._operands import check_device, parse_num_items


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
        return above and below and -sys.float_info.max <= value <= sys.float_info.max

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
    check_number(name, value)
    assert isinstance(value, (int, float))
    if not interval.holds(value):
        raise ValueError(f"{name} is {value}, expected {interval}")


def check_like(name: str, values: Tensor, like_name: str, like: Tensor) -> None:
    """Floats of the shape and on the device of another argument: nothing is broadcast in
    silence."""
    _check_shape_of(name, values, like_name, like)
    check_floats(name, values)


def check_real_like(name: str, values: Tensor, like_name: str, like: Tensor) -> None:
    """The same with integers or bools, too."""
    _check_shape_of(name, values, like_name, like)
    check_real(name, values)


def check_mask(mask: Tensor | None, like_name: str, like: Tensor) -> None:
    """None, or zeros and other numbers in the shape of another argument."""
    if mask is not None:
        check_real_like("mask", mask, like_name, like)


def check_token_mask(mask: Tensor | None, tokens: torch.Size, like_name: str, like: Tensor) -> None:
    """The same with one number per token of shape ``tokens``."""
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.shape != tokens:
        raise RuntimeError(
            f"mask has shape {tuple(mask.shape)}, expected {tuple(tokens)}, one per token"
        )
    check_real("mask", mask)
    check_device("mask", mask, like, like_name)


def check_real(name: str, values: Tensor) -> None:
    """Floats, integers or bools."""
    check_tensor(name, values)
    small = values.is_floating_point() and values.element_size() == 1
    if values.is_complex() or values.is_quantized or small:
        raise RuntimeError(
            f"{name} has dtype {values.dtype}, expected real numbers of at least 16 bits, integers "
            f"or bools{dequantised(name, values)}"
        )


def _check_shape_of(name: str, values: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(name, values)
    if values.shape != like.shape:
        raise RuntimeError(
            f"{name} has shape {tuple(values.shape)}, expected that of {like_name}, "
            f"{tuple(like.shape)}{_reshaped(values, like)}"
        )
    check_device(name, values, like, like_name)


def _reshaped(values: Tensor, like: Tensor) -> str:
    """The way out where only dimensions of size 1 differ."""
    if [n for n in values.shape if n != 1] == [n for n in like.shape if n != 1]:
        return f"; .reshape({', '.join(map(str, like.shape))}) gives it that"
    return ""


def check_labels(name: str, labels: Tensor, like_name: str, like: Tensor) -> None:
    """Bool: other labels, such as +1 and -1, do not say which ones mean True."""
    _check_shape_of(name, labels, like_name, like)
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
