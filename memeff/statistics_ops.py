"""The token statistics operators of torch.ops.memeff.*: fake kernels and FLOPs, as in ops.py.

The forward op keeps no more than a few numbers per token; backward is the second op, which computes
the scores again, slice by slice of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff import _flops, ops


def empty_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *_tensors: Tensor | None,
    entropy: bool,
    logit_sum: bool,
    argmax: bool,
    top_k: int,
    **_options: Any,
) -> tuple[Tensor, ...]:
    """What the forward op returns, not filled."""
    tokens = input.shape[0]
    targets = 0 if target is None else target.shape[1]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((tokens, targets), dtype=dtype),
        input.new_empty((tokens,), dtype=torch.float64),
        input.new_empty((tokens if entropy else 0,), dtype=torch.float64),
        input.new_empty((tokens if logit_sum else 0,), dtype=dtype),
        input.new_empty((tokens,), dtype=dtype),
        input.new_empty((tokens if argmax else 0,), dtype=torch.int64),
        input.new_empty((tokens, top_k), dtype=dtype),
        input.new_empty((tokens, top_k), dtype=torch.int64),
    )


def _gradients_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    *_: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    return ops.gradients_like(input, linear_weight, linear_bias, ops.wanted_gradients(options))


def _backward_fake(
    grad_logprob: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logit_sum: Tensor | None,
    lse: Tensor,
    known_entropy: Tensor,
    *operands: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _gradients_fake(*operands, **options)


def _forward_flops(arguments: dict[str, Any]) -> int:
    return _flops.product(arguments["input"], arguments["linear_weight"])


class StatisticsOperators:
    """The operators of one library, completed; see `memeff.ops.Operators`."""

    def __init__(self, name: str) -> None:
        operators = getattr(torch.ops, name)
        forward = operators.linear_token_statistics_forward.default
        recompute = operators.linear_token_statistics_backward.default
        self.linear_token_statistics_forward = forward
        # Called by memeff/fused_loss.py, whose own autograd.Function has its gradients.
        self.linear_loss_gradients = operators.linear_loss_gradients.default
        self.statistics_options = ops.options_of_calls(forward)
        self.loss_options = ops.options_of_calls(self.linear_loss_gradients)
        torch.library.register_fake(forward.name(), empty_statistics)
        torch.library.register_fake(recompute.name(), _backward_fake)
        torch.library.register_fake(self.linear_loss_gradients.name(), _gradients_fake)
        _flops.register(forward, _forward_flops)
        _flops.register(recompute, ops.recompute_flops)
        _flops.register(self.linear_loss_gradients, ops.recompute_flops)


_memeff = StatisticsOperators("memeff")
LIBRARIES = {"cpu": _memeff, "cuda": _memeff}
