"""A linear layer applied to one chunk of rows at a time, in plain PyTorch: products and their sums.

Used by :func:`memeff.chunked_linear_apply` and :class:`memeff.MemoryEfficientLinear`, which hand
whole rows of logits to a user's function and therefore cannot use the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of W that are converted to float32 at a time, in elements: a few MiB.
_CONVERTED_ELEMENTS = 1 << 21
# Without a budget: logits of a chunk, with what a function like cross entropy keeps beside them.
_PREFERRED_CHUNK_BYTES = 512 << 20
_LEAST_CHUNK, _MOST_CHUNK = 256, 1024
# Logits, one intermediate result of the same size, its gradient, and that of the logits.
_BLOCKS_PER_CHUNK = 4


def choose_chunk_size(tokens: int, vocab: int, itemsize: int, chunk_size: int, budget: int) -> int:
    """Tokens per chunk: as asked for, as many as the budget holds, or a few hundred."""
    if chunk_size > 0:
        return chunk_size
    per_token = max(1, _BLOCKS_PER_CHUNK * vocab * itemsize)
    if budget >= 0:
        chunk = budget // per_token
        if chunk < 1 <= tokens:
            raise ValueError(
                f"memory_budget is {budget} bytes, expected at least {per_token}: logits of one "
                f"token over {vocab} classes and {_BLOCKS_PER_CHUNK - 1} results of their size"
            )
        return max(1, min(chunk, tokens))
    return min(max(_PREFERRED_CHUNK_BYTES // per_token, _LEAST_CHUNK), _MOST_CHUNK)


class Head:
    """W [V, D] and b [V] of one call, and the sums of their gradients over the chunks.

    Logits come from float32 sums and are not rounded to 16 bits when ``upcast`` is set. Gradients
    with respect to 16-bit weights are summed in float32 over the chunks and rounded once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, upcast: bool, chunks: int) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.weight_grad = weight.requires_grad
        self.bias_grad = bias is not None and bias.requires_grad
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.logits_dtype = wide if upcast else weight.dtype
        self._sum_dtype = wide if chunks > 1 else weight.dtype
        self._weight_sum: Tensor | None = None
        self._bias_sum: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [c, D] -> hidden W^T + b [c, V]."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.logits_dtype == self.weight.dtype:
                return torch.nn.functional.linear(hidden, self.weight, self.bias)
            if hidden.is_cuda:
                logits = torch.mm(hidden, self.weight.t(), out_dtype=self.logits_dtype)
            else:
                # The CPU has no product of 16-bit factors with a float32 result.
                wide = hidden.to(self.logits_dtype)
                logits = hidden.new_empty((len(hidden), len(self.weight)), dtype=self.logits_dtype)
                for begin, end in self._slices():
                    rows = self.weight[begin:end].to(self.logits_dtype)
                    torch.mm(wide, rows.t(), out=logits[:, begin:end])
            return logits if self.bias is None else logits.add_(self.bias)

    def add_gradients(
        self, grad_logits: Tensor, hidden: Tensor, hidden_grad: bool
    ) -> Tensor | None:
        """Adds to the sums of W and b; returns the gradient of ``hidden`` if it is wanted."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.bias_grad:
                total = grad_logits.sum(0, dtype=self._sum_dtype)
                self._bias_sum = total if self._bias_sum is None else self._bias_sum.add_(total)
            gradient = grad_logits.to(self.weight.dtype)
            if self.weight_grad:
                self._add_weight_gradient(gradient, hidden)
            return torch.mm(gradient, self.weight) if hidden_grad else None

    def _add_weight_gradient(self, grad_logits: Tensor, hidden: Tensor) -> None:
        if self._weight_sum is None:
            self._weight_sum = self.weight.new_zeros(self.weight.shape, dtype=self._sum_dtype)
        if self._sum_dtype == self.weight.dtype:
            self._weight_sum.addmm_(grad_logits.t(), hidden)
            return
        for begin, end in self._slices():  # so that no second [V, D] is needed
            part = grad_logits[:, begin:end].t()
            if hidden.is_cuda:
                product = torch.mm(part, hidden, out_dtype=self._sum_dtype)
            else:
                product = torch.mm(part, hidden)
            self._weight_sum[begin:end].add_(product)

    def take_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The sums in the dtype of W (zeros where no chunk contributed); then begins anew."""
        weight_sum, bias_sum = self._weight_sum, self._bias_sum
        self.drop_gradients()
        dtype = self.weight.dtype
        if self.weight_grad and weight_sum is None:
            weight_sum = torch.zeros_like(self.weight)
        if self.bias_grad and bias_sum is None:
            bias_sum = self.weight.new_zeros(len(self.weight))
        return (
            None if weight_sum is None else weight_sum.to(dtype),
            None if bias_sum is None else bias_sum.to(dtype),
        )

    def drop_gradients(self) -> None:
        self._weight_sum = self._bias_sum = None

    def _slices(self) -> list[tuple[int, int]]:
        vocab, features = self.weight.shape
        rows = max(1, _CONVERTED_ELEMENTS // max(1, features))
        return [(begin, min(begin + rows, vocab)) for begin in range(0, vocab, rows)]
