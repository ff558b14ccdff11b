"""``MemoryEfficientLinear``: a loss over a projection, written in terms of the projection:

    MemoryEfficientLinear.apply(hidden, linear.weight, labels, forward_function, linear.bias)

``forward_function(hidden_chunk, linear, labels_chunk)`` is written as for the whole batch. It
projects by ``linear(hidden_chunk)``, upcasts with ``.float()`` and returns a scalar:

    def forward_function(hidden, linear, labels):
        logits = linear(hidden).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))

An adapter over `memeff.chunked_linear_apply`, which takes functions of logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memeff._checks import check_callable, check_choice, check_tensor
from memeff._heads import Chunk
from memeff._options import parse_ignore_index
from memeff.chunked import apply_to_chunks

__all__ = ["MemoryEfficientLinear"]

_REDUCTIONS = ("mean", "sum")


class MemoryEfficientLinear:
    """``apply(X, weight, labels, forward_function, bias=None, reduction="mean", chunk_size=None,
    ignore_index=-100)`` returns what ``forward_function(X, linear, labels)`` does, in float32.

    Gradients of ``X``, ``weight``, ``bias`` and of parameters that ``forward_function`` closes over
    are computed chunk by chunk in the forward pass by autograd, whatever ``forward_function`` does;
    backward multiplies them by the upstream gradient, and only then are they rounded to 16 bits.

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
        TypeError, ValueError, RuntimeError: an argument, or a result of ``forward_function``, of
            the wrong type or shape; or ``forward_function`` closes over a result of other
            differentiable computations.
    """

    @staticmethod
    def apply(
        X: Tensor,
        weight: Tensor,
        labels: Tensor,
        forward_function: Callable[..., Tensor],
        bias: Tensor | None = None,
        reduction: str = "mean",
        chunk_size: int | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        check_choice("reduction", reduction, _REDUCTIONS)
        check_tensor("labels", labels)
        check_callable("forward_function", forward_function)
        ignore_index = parse_ignore_index("ignore_index", ignore_index)
        total = _count(labels, ignore_index) if reduction == "mean" else None

        def of_chunk(chunk: Chunk, labels: Tensor) -> Tensor:
            share = 1.0 if total is None else _count(labels, ignore_index) / max(total, 1)
            if share == 0:
                return (
                    chunk.token.to(chunk.head.logits_dtype) * 0
                )  # a mean of no labels would be nan
            value = forward_function(chunk.rows, _Linear(chunk), labels)
            if not isinstance(value, Tensor) or value.dim() != 0:
                got = getattr(value, "shape", type(value).__name__)
                raise RuntimeError(
                    f"forward_function returned {got}, expected a scalar tensor; "
                    "memeff.chunked_linear_apply takes functions with results per token"
                )
            return value * share

        loss = apply_to_chunks(
            of_chunk,
            X,
            weight,
            {"labels": labels},
            linear_bias=bias,
            chunk_size=chunk_size,
            recompute=False,
            names=("X", "weight", "bias"),
        )
        assert isinstance(loss, Tensor)
        return loss if total is None or total > 0 else loss + torch.nan


class _Linear:
    """What forward_function may call and look at, like a torch.nn.Linear."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self.weight, self.bias = chunk.head.weight, chunk.head.bias
        self.out_features, self.in_features = self.weight.shape

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._chunk.logits(hidden)


def _count(labels: Tensor, ignore_index: int) -> int:
    if labels.is_floating_point():
        return labels.numel()
    return int((labels != ignore_index).sum())
