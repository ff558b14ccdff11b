"""A linear layer applied to one chunk of rows at a time, in plain PyTorch: products and their sums.

Used by `memeff.chunked_linear_apply` and `memeff.MemoryEfficientLinear`, which hand
whole rows of logits to a user's function and therefore cannot use the kernels.

Nothing but the results is rounded on the CPU: 16-bit factors are multiplied in float32, slice by
slice of the vocabulary, because the CPU has no product of them with a float32 result. GPUs have;
there gradients with respect to logits are rounded to 16 bits before they are multiplied, as in the
backward pass of an ordinary 16-bit linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff._gradient_sums import GradientSum, row_slices
from memeff._gradients import first_derivatives_only

__all__ = ["BLOCKS_PER_CHUNK", "Chunk", "Head", "choose_chunk_size"]

# Logits, one intermediate result of the same size, its gradient, and that of the logits: cross
# entropy needs three of these at a time.
BLOCKS_PER_CHUNK = 4
# Without a budget the blocks of a chunk take half of what the gradient of the weight takes in any
# case, or a 128th of what those of all tokens would.
_SHARE_OF_GRADIENT = 2
_SHARE_OF_TOKENS = 128
# Fewer tokens per chunk cost time (each chunk passes over the whole weight and the sum of its
# gradient), more do not save any.
_LEAST_CHUNK, _MOST_CHUNK = 32, 1024


def choose_chunk_size(
    tokens: int, weight: Tensor, itemsize: int, chunk_size: int = 0, budget: int = -1
) -> int:
    """Tokens per chunk: as asked for, as many as the budget holds, or a few hundred.

    ``itemsize`` is that of the logits, of all of them if there are several per token and class.
    """
    if chunk_size > 0:
        return chunk_size
    vocab, features = weight.shape
    per_token = max(1, BLOCKS_PER_CHUNK * vocab * itemsize)
    if budget >= 0:
        chunk = budget // per_token
        if chunk < 1 <= tokens:
            raise ValueError(
                f"memory_budget is {budget} bytes, expected at least {per_token}: logits of one "
                f"token over {vocab} classes and {BLOCKS_PER_CHUNK - 1} results of their size"
            )
        return max(1, min(chunk, tokens))
    like_gradient = (
        features * weight.element_size() // (_SHARE_OF_GRADIENT * BLOCKS_PER_CHUNK * itemsize)
    )
    return min(max(like_gradient, tokens // _SHARE_OF_TOKENS, _LEAST_CHUNK), _MOST_CHUNK)


class Head:
    """W [V, D] and b [V] of one call, and the sums of their gradients over the chunks.

    Logits come from float32 sums and are not rounded to 16 bits when ``upcast`` is set.

    Args:
        weight_grad, bias_grad: dtypes of the gradients, None where none is wanted.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        upcast: bool,
        weight_grad: torch.dtype | None = None,
        bias_grad: torch.dtype | None = None,
    ) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.wants_gradient = weight_grad is not None or bias_grad is not None
        self._gradient_dtypes = weight_grad, bias_grad
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.logits_dtype = self.wide if upcast else weight.dtype
        self._sums: tuple[GradientSum | None, GradientSum | None] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [c, D] -> hidden W^T + b [c, V]."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.logits_dtype == self.weight.dtype:
                return torch.nn.functional.linear(hidden, self.weight, self.bias)
            if hidden.is_cuda:
                logits = torch.mm(hidden, self.weight.t(), out_dtype=self.logits_dtype)
            else:
                logits = hidden.new_empty((len(hidden), len(self.weight)), dtype=self.logits_dtype)
                hidden = hidden.to(self.logits_dtype)
                for begin, end in self._slices():
                    rows = self.weight[begin:end].to(self.logits_dtype)
                    torch.mm(hidden, rows.t(), out=logits[:, begin:end])
            return logits if self.bias is None else logits.add_(self.bias)

    def add_gradients(
        self, grad_logits: Tensor, hidden: Tensor, hidden_grad: bool
    ) -> Tensor | None:
        """Adds to the sums of W and b; returns the gradient of ``hidden`` if it is wanted, in
        float32 (float64) and not rounded."""
        if self._sums is None:
            self._sums = self._no_gradients()
        weight_sum, bias_sum = self._sums
        on_gpu = hidden.is_cuda and self.weight.dtype != self.wide
        grad_hidden = None
        with torch.autocast(hidden.device.type, enabled=False):
            if bias_sum is not None:
                bias_sum.add(grad_logits.sum(0, dtype=self.wide)[None])
            if on_gpu:
                grad_logits = grad_logits.to(hidden.dtype)
                if hidden_grad:
                    grad_hidden = torch.mm(grad_logits, self.weight, out_dtype=self.wide)
            elif hidden_grad:
                grad_hidden = hidden.new_zeros(hidden.shape, dtype=self.wide)
            rows = hidden if on_gpu else hidden.to(self.wide)
            for begin, end in self._slices():
                part = grad_logits[:, begin:end].to(rows.dtype)
                if grad_hidden is not None and not on_gpu:
                    grad_hidden.addmm_(part, self.weight[begin:end].to(self.wide))
                if weight_sum is not None:
                    weight_sum.add_product(begin, end, part.t(), rows)
        return grad_hidden

    def take_gradients(self) -> tuple[GradientSum | None, GradientSum | None]:
        """The sums, zeros where no chunk contributed; then begins anew."""
        sums = self._no_gradients() if self._sums is None else self._sums
        self.drop_gradients()
        return sums

    def drop_gradients(self) -> None:
        self._sums = None

    def _no_gradients(self) -> tuple[GradientSum | None, GradientSum | None]:
        shapes = self.weight.shape, self.weight.shape[:1]
        weight_sum, bias_sum = (
            None if dtype is None else GradientSum(shape, dtype, self.weight.device)
            for shape, dtype in zip(shapes, self._gradient_dtypes, strict=True)
        )
        return weight_sum, bias_sum

    def _slices(self) -> list[tuple[int, int]]:
        if self.weight.dtype == self.wide:
            return [(0, len(self.weight))]
        return row_slices(self.weight.shape, self.weight.device)


class Chunk:
    """Rows [c, D] whose logits take part in a computation that autograd differentiates.

    Neither the weight nor the rows are tensors of its graph. The backward pass of the logits adds
    to the sums of the head, and keeps the gradient of the rows unrounded.
    """

    def __init__(self, head: Head, rows: Tensor, rows_grad: bool) -> None:
        self.head, self.rows_grad = head, rows_grad
        self.rows = rows.detach().requires_grad_(rows_grad)
        # What the logits hang on.
        wanted = rows_grad or head.wants_gradient
        self.token = head.weight.new_zeros(()).requires_grad_(wanted)
        self._gradient: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """Whose gradients `write_gradient` wants to know, where they require any."""
        return [leaf for leaf in (self.rows, self.token) if leaf.requires_grad]

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """Logits of the rows, or of what a function has made of them, [..., D] -> [..., V]."""
        if hidden is None or hidden is self.rows:
            own: Tensor = _Logits.apply(self.rows.detach(), self.token, self, True)
            return own
        rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        logits: Tensor = _Logits.apply(rows, self.token, self, False)
        return logits.view(*hidden.shape[:-1], len(self.head.weight))

    def add_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)

    def write_gradient(self, total: GradientSum | None, begin: int, other: Tensor | None) -> None:
        """The gradient of the rows into those of all; ``other`` did not come through logits."""
        self.add_gradient(None if other is None else other.to(self.head.wide))
        if total is not None and self._gradient is not None:
            rows = slice(begin, begin + len(self._gradient))
            total.write(rows, self._gradient)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token: Tensor, chunk: Chunk, own: bool) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.chunk, ctx.own = chunk, own
        return chunk.head.logits(hidden.to(chunk.head.weight.dtype))

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        head = ctx.chunk.head
        wanted = ctx.chunk.rows_grad if ctx.own else ctx.needs_input_grad[0]
        gradient = head.add_gradients(grad_logits, hidden.to(head.weight.dtype), wanted)
        if ctx.own:
            ctx.chunk.add_gradient(gradient)
            gradient = None
        return None if gradient is None else gradient.to(hidden.dtype), None, None, None
