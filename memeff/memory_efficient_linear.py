"""``MemoryEfficientLinear``: a loss over a projection, as an autograd function called like this:

    MemoryEfficientLinear.apply(hidden, linear.weight, labels, forward_function, linear.bias)

``forward_function(hidden_chunk, linear, labels_chunk)`` is written as for the whole batch. It
projects by ``linear(hidden_chunk)``, upcasts with ``.float()`` and returns a scalar:

    def forward_function(hidden, linear, labels):
        logits = linear(hidden).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))

:func:`memeff.chunked_linear_apply` does the same for functions of logits and more: results per
token, several results, and parameters that the function closes over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memeff import _arguments, _checks
from memeff._gradient_sums import GradientSum, keep_gradients, scale_kept_gradients
from memeff._gradients import (
    CapturedResult,
    captured_leaves,
    first_derivatives_only,
    node_number,
)
from memeff._heads import Chunk, Head, choose_chunk_size

__all__ = ["MemoryEfficientLinear"]

_REDUCTIONS = ("mean", "sum")


class MemoryEfficientLinear(torch.autograd.Function):
    """``apply(X, weight, labels, forward_function, bias=None, reduction="mean", chunk_size=None,
    ignore_index=-100)`` returns what ``forward_function(X, linear, labels)`` does, in float32.

    Gradients of ``X``, ``weight`` and ``bias`` are computed chunk by chunk in the forward pass by
    autograd, whatever ``forward_function`` does; backward multiplies them by the upstream gradient,
    and only then are they rounded to 16 bits.

    Memory: the gradients themselves, a 32nd more for their sums, and what ``forward_function``
    keeps of one chunk. For cross entropy that is three float32 blocks [chunk, V], where the
    standard way has three of [N, V]; docs/losses.md has the arithmetic.

    Args of ``apply``:
        X: hidden states [..., D].
        weight: [V, D], in the dtype of ``X``.
        labels: [..., *any shape], with the leading dimensions of ``X``.
        forward_function: as above. Its ``linear`` can be called and has ``weight``, ``bias``,
            ``in_features`` and ``out_features``; logits come out in float32 for 16-bit ``X``,
            straight from float32 sums.
        bias: [V] or None.
        reduction: what ``forward_function`` computes, "mean" or "sum". Means of the chunks are
            weighted by their numbers of labels other than ``ignore_index`` (of all labels, if these
            are floating), so that the result is the mean over all; it is nan if there are none.
        chunk_size: tokens per chunk; the last chunk may be smaller. None chooses 32 to 1024, by
            what the gradient of the weight takes in any case. Larger ones are faster.
        ignore_index: the label that a "mean" does not count.

    Raises:
        RuntimeError: ``forward_function`` depends on other tensors that require gradients, which
            would not get any.
    """

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        weight: Tensor,
        labels: Tensor,
        forward_function: Callable[..., Tensor],
        bias: Tensor | None = None,
        reduction: str = "mean",
        chunk_size: int | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        _checks.check_choice("reduction", reduction, _REDUCTIONS)
        if labels.shape[: X.dim() - 1] != X.shape[:-1]:
            raise RuntimeError(
                f"labels has shape {tuple(labels.shape)}, expected one that begins with "
                f"{tuple(X.shape[:-1])}, the leading dimensions of X"
            )
        cast_to = _arguments.autocast_dtype(X.device)
        wanted = ctx.needs_input_grad
        rows = _cast(X, cast_to).reshape(-1, X.shape[-1]).detach()
        labels = labels.reshape(len(rows), *labels.shape[X.dim() - 1 :])
        head = Head(
            _cast(weight, cast_to),
            None if bias is None else _cast(bias, cast_to),
            upcast=True,
            weight_grad=weight.dtype if wanted[1] else None,
            bias_grad=bias.dtype if bias is not None and wanted[4] else None,
        )
        itemsize = head.logits_dtype.itemsize
        size = _arguments.parse_chunk_size(chunk_size)
        size = choose_chunk_size(len(rows), head.weight, itemsize, size)
        total = rows.new_zeros((), dtype=head.logits_dtype)
        shares = _shares(labels, size, ignore_index) if reduction == "mean" else None
        grad_rows = GradientSum(rows.shape, X.dtype, X.device) if wanted[0] else None
        for i, begin in enumerate(range(0, len(rows), size)):
            share = 1.0 if shares is None else shares[i]
            if share == 0:
                continue  # no mean of no labels, and 0 times its gradient may be nan
            part = slice(begin, begin + size)
            chunk = Chunk(head, rows[part], wanted[0])
            value, gradient = _differentiate(forward_function, chunk, labels[part], share)
            total += value
            chunk.write_gradient(grad_rows, begin, gradient)

        keep_gradients(ctx, total, (grad_rows, *head.take_gradients()))
        ctx.shape = X.shape
        return total if shares is None or any(shares) else total.fill_(torch.nan)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = scale_kept_gradients(ctx, grad)
        return None if x is None else x.view(ctx.shape), weight, None, None, bias, None, None, None


class _Linear:
    """What forward_function may call and look at, like a torch.nn.Linear."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self.weight, self.bias = chunk.head.weight, chunk.head.bias
        self.out_features, self.in_features = self.weight.shape

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._chunk.logits(hidden)


def _differentiate(
    function: Callable[..., Tensor], chunk: Chunk, labels: Tensor, share: float
) -> tuple[Tensor, Tensor | None]:
    """share * function(...), and what of its gradient with respect to the rows does not come
    through their logits."""
    with torch.enable_grad():
        number = node_number(chunk.rows.device)
        value = function(chunk.rows, _Linear(chunk), labels)
        _check(value)
        value = value * share
        inputs = chunk.leaves
        if not value.requires_grad:
            return value, None
        _refuse_captured(value, inputs, number)
        gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return value.detach(), gradients[0] if chunk.rows_grad else None


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else _arguments.autocast_to(tensor, dtype)


def _shares(labels: Tensor, size: int, ignore_index: int) -> list[float]:
    """Each chunk's share of all counted labels; zeros if there are none."""
    counted = torch.ones_like(labels) if labels.is_floating_point() else labels != ignore_index
    per_token = counted.reshape(len(labels), -1).sum(1, dtype=torch.float64)
    counts = [part.sum() for part in per_token.split(size)]
    shares: list[float] = (torch.stack(counts) / per_token.sum().clamp(min=1)).tolist()
    return shares


def _check(value: object) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(
            f"forward_function returned {got}, expected a scalar tensor; "
            "memeff.chunked_linear_apply takes functions with results per token"
        )


def _refuse_captured(value: Tensor, inputs: list[Tensor], before: int) -> None:
    try:
        captured = captured_leaves(value, inputs, before)
    except CapturedResult as node:
        raise RuntimeError(_captured_message(f"a result of {node}")) from None
    if captured:
        raise RuntimeError(_captured_message(f"a tensor of shape {tuple(captured[0].shape)}"))


def _captured_message(what: str) -> str:
    return (
        f"forward_function depends on {what} that requires grad, expected none beside hidden and "
        "linear: a torch.autograd.Function has no gradient for it; memeff.chunked_linear_apply has"
    )
