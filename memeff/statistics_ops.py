"""The token statistics operators of torch.ops.memeff.*: fake kernels and autograd, as in ops.py.

The forward op keeps no more than a few numbers per token; backward is the second op, which computes
the scores again, slice by slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    _, lse, entropy, _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # None for what no gradient reaches
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(lse, entropy, *inputs)


def _refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "second derivatives of memeff.linear_token_statistics (a backward through its gradients, "
        'as with create_graph=True) are not implemented; backend="reference" has them'
    )


def _forward_flops(arguments: dict[str, Any]) -> int:
    return _flops.product(arguments["input"], arguments["linear_weight"])


class StatisticsOperators:
    """The operators of one library, completed; see `memeff.ops.Operators`."""

    def __init__(self, name: str) -> None:
        operators = getattr(torch.ops, name)
        self._forward = operators.linear_token_statistics_forward.default
        self._recompute = operators.linear_token_statistics_backward.default
        # Called by memeff/fused_loss.py, whose own autograd.Function has its gradients.
        self.linear_loss_gradients = operators.linear_loss_gradients.default
        self.statistics_options = ops.options_of_calls(self._forward)
        self.loss_options = ops.options_of_calls(self.linear_loss_gradients)
        self._recompute_options = ops.option_names(self._recompute)
        forward, recompute = self._forward.name(), self._recompute.name()
        torch.library.register_fake(forward, empty_statistics)
        torch.library.register_fake(recompute, _backward_fake)
        torch.library.register_fake(self.linear_loss_gradients.name(), _gradients_fake)
        torch.library.register_autograd(forward, self._backward, setup_context=_setup_context)
        torch.library.register_autograd(recompute, _refuse_second_derivative)
        _flops.register(self._forward, _forward_flops)
        _flops.register(self._recompute, ops.recompute_flops)
        _flops.register(self.linear_loss_gradients, ops.recompute_flops)
        self._functions = {
            self._forward: ops.function_of(self._forward, _setup_context, self._backward),
            self._recompute: ops.function_of(
                self._recompute, ops.save_nothing, _refuse_second_derivative
            ),
        }

    def linear_token_statistics_forward(
        self, *tensors: Tensor | None, **options: Any
    ) -> Sequence[Tensor]:
        """Call the forward op, also inside transforms of torch.func."""
        results: Sequence[Tensor] = ops.call(self._forward, self._functions, tensors, options)
        return results

    def _backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = gradients[:4]  # of logprob, lse, entropy, logit_sum
        if all(gradient is None for gradient in upstream):
            return tuple(None for _ in ctx.needs_input_grad)
        positions = ops.differentiable_positions(self._forward)
        needed = [ctx.needs_input_grad[position] for position in positions]
        ops.check_flags(self._forward.name(), needed, ops.wanted_gradients(ctx.options))
        options = {name: ctx.options[name] for name in self._recompute_options}
        tensors = (*upstream, *ctx.saved_tensors)
        computed = ops.call(self._recompute, self._functions, tensors, options)
        return ops.in_place_of_inputs(ctx, positions, computed)


_memeff = StatisticsOperators("memeff")
LIBRARIES = {"cpu": _memeff, "cuda": _memeff}
