"""Gradients made chunk by chunk in the forward pass: added up, kept, and scaled in backward.

A gradient in 16 bits would be rounded by every chunk, and once more when an upstream gradient
multiplies it. Sums in float32 would take twice the gradient's memory. `GradientSum` keeps
them in the memory of the gradient itself: 16-bit integers in units that blocks of adjacent elements
share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memeff._gradients import first_derivatives_only, is_batch, is_last_backward

__all__ = [
    "GradientSum",
    "ReadyGradients",
    "keep_gradients",
    "row_slices",
    "scale_kept_gradients",
]

# Elements of [rows, columns] that pass through float32 at a time. On the CPU they stay in a core's
# cache; a GPU wants enough to do for each of the kernels.
_CPU_SLICE, _GPU_SLICE = 1 << 18, 1 << 23
_BLOCK = 32  # adjacent elements that share a unit
_EXPONENT_BITS = 0x7F800000  # of a float32
_LARGEST = 2**15 - 1  # of a number of units
# A unit, as a share of a block's largest power of two, at least half of its largest element.
_UNIT = 2.0**-14
_LEAST_UNIT = 2.0**-110  # 1 / unit stays finite


def row_slices(shape: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
    """Ranges of rows of a matrix that pass through float32 together."""
    rows, columns = shape
    elements = _CPU_SLICE if device.type == "cpu" else _GPU_SLICE
    size = max(1, elements // max(1, columns))
    return [(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


class GradientSum:
    """A gradient of one or two dimensions, zero at first.

    For 16-bit gradients of two dimensions ``element = number * unit``, with a number in 16 bits and
    a unit, a power of two, per block of 32 elements (the largest divisor of the row up to that). A
    unit is 2^-14 of the largest power of two in its block, so that storing a block errs by at most
    2^-15 of its largest element, 2^-16 on average: a hundredth of the final rounding to bfloat16
    for one chunk, a sixth for 300. A block with inf or nan has nothing else, as 0 * inf is nan.

    Any other gradient is summed in its own dtype, 16-bit ones of one dimension in float32.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        self._wide = torch.promote_types(dtype, torch.float32)
        self._units: Tensor | None = None
        if dtype != self._wide and len(self.shape) == 2:
            self._block = next((n for n in range(_BLOCK, 1, -1) if columns % n == 0), 1)
            blocks = columns // self._block
            self._units = torch.zeros((rows, blocks, 1), dtype=torch.bfloat16, device=device)
            kept = torch.int16
        else:
            kept = self._wide
        self._numbers = torch.zeros((rows, columns), dtype=kept, device=device)

    def add(self, values: Tensor) -> None:
        """Adds values of the whole shape."""
        everything = slice(0, len(self._numbers))
        self._store(everything, self._load(everything).add_(values))

    def add_product(self, begin: int, end: int, left: Tensor, right: Tensor) -> None:
        """Adds left @ right, [end - begin, c] @ [c, columns], to rows begin..end."""
        rows = self._load(slice(begin, end))
        if left.dtype == rows.dtype:
            rows.addmm_(left, right)
        else:  # 16-bit factors, which only GPUs multiply to float32
            rows.add_(torch.mm(left, right, out_dtype=rows.dtype))
        self._store(slice(begin, end), rows)

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        """Sets rows, a range of them or those of an index tensor; values are overwritten."""
        if self._units is None:
            self._numbers[rows] = values
        else:
            self._store(rows, values.to(self._wide))

    def times(self, factor: Tensor | None, *, last: bool) -> Tensor:
        """The gradient, times ``factor``, in its dtype. With ``last`` it takes the sum's memory,
        and the sum is gone."""
        if self._units is None:
            if factor is None:
                scaled = self._numbers
            else:
                scaled = self._numbers.mul_(factor) if last else self._numbers * factor
            return scaled.to(self.dtype).view(self.shape)
        result = self._numbers.view(self.dtype) if last else self._new(self.dtype)
        for begin, end in row_slices(self.shape, self._numbers.device):
            values = self._load(slice(begin, end))
            result[begin:end] = values if factor is None else values.mul_(factor)
        return result

    def _new(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device=self._numbers.device)

    def _load(self, rows: slice) -> Tensor:
        """Rows to be changed and stored: the sum itself where it is not compact."""
        numbers = self._numbers[rows]
        if self._units is None:
            return numbers
        values = numbers.to(self._wide)
        self._in_blocks(values).mul_(self._units[rows])
        return values

    def _store(self, rows: slice | Tensor, values: Tensor) -> None:
        if self._units is None:
            return  # they are the sum's own memory
        blocks = self._in_blocks(values)
        largest = blocks.abs().amax(-1, keepdim=True)  # ten times as fast as a norm
        power = (largest.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
        unit = power.mul_(_UNIT).clamp_(min=_LEAST_UNIT)
        blocks.div_(unit).round_().clamp_(-_LARGEST, _LARGEST)
        for kept, new in ((self._units, unit), (self._numbers, values)):
            if isinstance(rows, slice):
                kept[rows] = new  # converts as it copies
            else:
                kept[rows] = new.to(kept.dtype)

    def _in_blocks(self, values: Tensor) -> Tensor:
        return values.view(len(values), values.shape[1] // self._block, self._block)


Gradient = GradientSum | Tensor | None


def keep_gradients(ctx: Any, output: Tensor, gradients: Sequence[Gradient]) -> None:
    """In the forward of an autograd.Function: keeps gradients for an upstream gradient of 1."""
    # A saved tensor makes autograd refuse a backward after the last one.
    ctx.save_for_backward(output)
    ctx.kept_gradients = gradients


def scale_kept_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """In its backward: the gradients times the upstream one, without copies if it is the last."""
    _ = ctx.saved_tensors
    last = is_last_backward(upstream)
    gradients, ctx.kept_gradients = ctx.kept_gradients, None if last else ctx.kept_gradients
    return [_scaled(gradient, upstream, last) for gradient in gradients]


def _scaled(gradient: Gradient, upstream: Tensor, last: bool) -> Tensor | None:
    if isinstance(gradient, GradientSum):
        if is_batch(upstream):  # nothing in place
            whole = gradient.times(None, last=False)
            return (whole.to(upstream.dtype) * upstream).to(whole.dtype)
        return gradient.times(upstream, last=last)
    if gradient is None:
        return None
    return gradient.mul_(upstream) if last else gradient * upstream.to(gradient.dtype)


class ReadyGradients(torch.autograd.Function):
    """A scalar whose gradients, for an upstream gradient of 1, have been computed with it.

    ``ReadyGradients.apply(value, gradients, *inputs)``: one gradient (or None) per input. Plain
    tensors among them are multiplied in place.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Gradient], *inputs: Tensor) -> Tensor:
        keep_gradients(ctx, value, gradients)
        return value.clone()

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *scale_kept_gradients(ctx, grad)
