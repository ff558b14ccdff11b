"""The token statistics operators of torch.ops.memeff.*: fake kernels and autograd, as in ops.py.

The forward op keeps no more than a few numbers per token; backward is the second op, which computes
the scores again, slice by slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memeff import ops

# Arguments of the forward op: input, linear_weight, target, linear_bias, then scalars.
_DIFFERENTIABLE = (0, 1, 3)
_NUM_TENSORS = 4


def _forward_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    skip_ignored: bool,
    entropy: bool,
    argmax: bool,
    top_k: int,
    *_: Any,
) -> tuple[Tensor, ...]:
    tokens = input.shape[0]
    targets = 0 if target is None else target.shape[1]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        input.new_empty((tokens, targets), dtype=dtype),
        input.new_empty((tokens,), dtype=torch.float64),
        input.new_empty((tokens if entropy else 0,), dtype=torch.float64),
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
    *scalars: Any,
) -> tuple[Tensor, ...]:
    return ops.gradients_like(input, linear_weight, linear_bias, scalars[-5:-2])


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    # After the gradients of logprob, lse and entropy, and the values of lse and entropy.
    return _gradients_fake(*arguments[5:])


def _loss_gradients_fake(handle: int, *arguments: Any) -> tuple[Tensor, ...]:
    return _gradients_fake(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, entropy, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # None for what no gradient reaches
    scalars = inputs[_NUM_TENSORS:]
    ctx.computed = scalars[-5:-2]
    ctx.scalars = (*scalars[:3], *scalars[-5:])
    ctx.save_for_backward(lse, entropy, *inputs[:_NUM_TENSORS])


def _refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "second derivatives of memeff.linear_token_statistics (a backward through its gradients, "
        'as with create_graph=True) are not implemented; backend="reference" has them'
    )


class StatisticsOperators:
    """The operators of one library, completed; see :class:`memeff.ops.Operators`."""

    def __init__(self, name: str) -> None:
        operators = getattr(torch.ops, name)
        self._forward = operators.linear_token_statistics_forward.default
        self._recompute = operators.linear_token_statistics_backward.default
        # Called by memeff/fused_loss.py, whose own autograd.Function has its gradients.
        self.linear_loss_gradients = operators.linear_loss_gradients.default
        self._num_arguments = len(self._forward._schema.arguments)
        forward, recompute = self._forward.name(), self._recompute.name()
        torch.library.register_fake(forward, _forward_fake)
        torch.library.register_fake(recompute, _backward_fake)
        torch.library.register_fake(self.linear_loss_gradients.name(), _loss_gradients_fake)
        torch.library.register_autograd(forward, self._backward, setup_context=_setup_context)
        torch.library.register_autograd(recompute, _refuse_second_derivative)
        self._in_transform = {
            self._forward: ops.function_of(self._forward, _setup_context, self._backward),
            self._recompute: ops.function_of(
                self._recompute, ops.save_nothing, _refuse_second_derivative
            ),
        }

    def linear_token_statistics_forward(self, *arguments: Any) -> Sequence[Tensor]:
        """Call the forward op, also inside transforms of torch.func."""
        results: Sequence[Tensor] = ops.call(self._forward, self._in_transform, arguments)
        return results

    def _backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * self._num_arguments
        upstream = gradients[:3]  # of logprob, lse, entropy
        if all(gradient is None for gradient in upstream):
            return tuple(result)
        needed = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        ops.check_flags(self._forward.name(), needed, ctx.computed)
        arguments = (*upstream, *ctx.saved_tensors, *ctx.scalars)
        computed = ops.call(self._recompute, self._in_transform, arguments)
        for position, need, gradient in zip(_DIFFERENTIABLE, needed, computed, strict=True):
            if need:
                result[position] = gradient
        return tuple(result)


_memeff = StatisticsOperators("memeff")
LIBRARIES = {"cpu": _memeff, "cuda": _memeff}
