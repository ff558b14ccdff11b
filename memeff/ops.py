"""The operators torch.ops.memeff.*: loads them and adds what C++ leaves to Python.

csrc/bindings declares the schemas (tensors are positional, options keyword-only) and the
implementations. Here are the fake (shape-only)
kernels for meta tensors and torch.compile, and autograd.

The forward op computes gradients while it has the logits, for an upstream gradient of 1, whenever
the loss is a scalar; its backward then only scales them. For per-token losses, and for float16
(whose gradients must be scaled before they are rounded), backward is the second op, which
recomputes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from memeff import _flops, _library
from memeff._gradients import is_last_backward

# Arguments that have gradients, in the order in which the backward ops return these.
DIFFERENTIABLE = ("input", "linear_weight", "linear_bias")


def gradients_in_forward(reduction: str, dtype: torch.dtype) -> bool:
    """Whether the forward op computes the gradients; the C++ op follows the same rule."""
    return reduction != "none" and dtype != torch.float16


def wanted_gradients(options: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Which gradients an op is told to compute, in the order of DIFFERENTIABLE."""
    return options["input_grad"], options["weight_grad"], options["bias_grad"]


def gradients_like(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradient buffers, of no elements where a gradient is not wanted."""
    input_grad, weight_grad, bias_grad = wanted
    bias_shape = linear_weight.shape[:1] if linear_bias is not None else (0,)
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        linear_weight.new_empty(linear_weight.shape if weight_grad else (0,)),
        linear_weight.new_empty(bias_shape if bias_grad else (0,)),
    )


def _forward_fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    *_: Tensor | None,
    reduction: str,
    return_statistics: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
    tokens = input.shape[0]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    wanted = wanted_gradients(options)
    if not gradients_in_forward(reduction, input.dtype):
        wanted = (False, False, False)
    return (
        input.new_empty((tokens,) if reduction == "none" else (), dtype=dtype),
        input.new_empty((tokens,), dtype=torch.float64),
        input.new_empty((4, tokens) if return_statistics else (0,), dtype=dtype),
        input.new_empty((tokens,) if return_statistics else (0,), dtype=torch.int64),
        *gradients_like(input, linear_weight, linear_bias, wanted),
    )


def _backward_fake(
    grad_loss: Tensor,
    lse: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    *_: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    return gradients_like(input, linear_weight, linear_bias, wanted_gradients(options))


def _scale_fake(gradient: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _scale_in_place_fake(gradient: Tensor, scale: Tensor) -> None:
    return None


def recompute_flops(arguments: dict[str, Any]) -> int:
    """FLOPs of an op that computes the logits and the gradients that are wanted."""
    products = 1 + _flops.wanted_products(arguments)
    return products * _flops.product(arguments["input"], arguments["linear_weight"])


def _forward_flops(arguments: dict[str, Any]) -> int:
    if gradients_in_forward(arguments["reduction"], arguments["input"].dtype):
        return recompute_flops(arguments)
    return _flops.product(arguments["input"], arguments["linear_weight"])


class Operators:
    """The operators of one library, torch.ops.<name>.*, completed by fake kernels and autograd.

    The extension's own library is "memeff"; a second build of the same operators for another device
    takes another name.
    """

    def __init__(self, name: str) -> None:
        operators = getattr(torch.ops, name)
        self._forward = operators.linear_cross_entropy_forward.default
        self._recompute = operators.linear_cross_entropy_backward.default
        self._scale = operators.scale_gradient.default
        self._scale_in_place = operators.scale_gradient_.default
        self.loss_options = options_of_calls(self._forward)
        self._recompute_options = option_names(self._recompute)

        forward, recompute = self._forward.name(), self._recompute.name()
        scale, scale_in_place = self._scale.name(), self._scale_in_place.name()
        torch.library.register_fake(forward, _forward_fake)
        torch.library.register_fake(recompute, _backward_fake)
        torch.library.register_fake(scale, _scale_fake)
        torch.library.register_fake(scale_in_place, _scale_in_place_fake)
        torch.library.register_autograd(forward, self._backward, setup_context=_setup_context)
        torch.library.register_autograd(recompute, _refuse_second_derivative)
        torch.library.register_autograd(scale, _refuse_second_derivative)

        _flops.register(self._forward, _forward_flops)
        _flops.register(self._recompute, recompute_flops)
        self._functions = {
            self._forward: function_of(self._forward, _setup_context, self._backward),
            self._recompute: function_of(self._recompute, save_nothing, _refuse_second_derivative),
            self._scale: function_of(self._scale, save_nothing, _refuse_second_derivative),
        }

    def linear_cross_entropy_forward(
        self, *tensors: Tensor | None, **options: Any
    ) -> Sequence[Tensor]:
        """Call the forward op, also inside transforms of torch.func."""
        results: Sequence[Tensor] = self._call(self._forward, tensors, options)
        return results

    def _call(self, op: Any, tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Any:
        return call(op, self._functions, tensors, options)

    def _backward(self, ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return tuple(None for _ in ctx.needs_input_grad)
        positions = differentiable_positions(self._forward)
        needed = [ctx.needs_input_grad[position] for position in positions]
        check_flags(self._forward.name(), needed, wanted_gradients(ctx.options))
        if ctx.scale_only:
            gradients = self._scaled(grad_loss, *ctx.saved_tensors)
        else:
            options = {name: ctx.options[name] for name in self._recompute_options}
            gradients = self._call(self._recompute, (grad_loss, *ctx.saved_tensors), options)
        return in_place_of_inputs(ctx, positions, gradients)

    def _scaled(self, grad_loss: Tensor, output: Tensor, *gradients: Tensor) -> list[Tensor]:
        """The saved gradients times the upstream one; in their own memory if this is their last
        use."""
        if torch.is_grad_enabled():
            # create_graph: these gradients must not look like constants to a second derivative.
            # Adding the empty sum ties them to this node, so that scale_gradient can refuse.
            grad_loss = grad_loss + output.flatten()[:0].sum()
        elif is_last_backward(grad_loss):
            for gradient in gradients:
                if gradient.numel():
                    self._scale_in_place(gradient, grad_loss)
            return list(gradients)
        return [self._call(self._scale, (gradient, grad_loss), {}) for gradient in gradients]


def option_names(op: Any) -> tuple[str, ...]:
    """The keyword-only arguments of an op."""
    return tuple(argument.name for argument in op._schema.arguments if argument.kwarg_only)


def options_of_calls(op: Any) -> tuple[str, ...]:
    """Those of `memeff._options.Options`: apart from the gradients wanted and a handle."""
    others = ("input_grad", "weight_grad", "bias_grad", "handle")
    return tuple(name for name in option_names(op) if name not in others)


@functools.cache
def differentiable_positions(op: Any) -> list[int]:
    """Where the arguments of DIFFERENTIABLE stand among those of a forward op."""
    names = [argument.name for argument in op._schema.arguments]
    return [names.index(name) for name in DIFFERENTIABLE]


def in_place_of_inputs(
    ctx: Any, positions: Sequence[int], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """What the backward of a forward op returns: one gradient, or None, per tensor argument."""
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for position, gradient in zip(positions, gradients, strict=True):
        if ctx.needs_input_grad[position]:
            result[position] = gradient
    return tuple(result)


def call(
    op: Any,
    functions: Mapping[Any, Any],
    tensors: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> Any:
    """Call an op, or where gradients are recorded the autograd.Function of the same formula.

    What register_autograd generates refuses to run in transforms such as torch.func.grad, and reads
    the schema anew for each of its arguments, which takes longer than a small call: it is left out,
    also where nothing is recorded. A compiler traces the op itself.
    """
    if torch.compiler.is_compiling():
        return op(*tensors, **options)
    if torch.is_grad_enabled():
        return functions[op].apply(*tensors, options)
    return _below_autograd(op, tensors, options)


def _below_autograd(op: Any, tensors: Sequence[Any], options: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*tensors, **options)


def check_flags(op: str, needed: Sequence[bool], computed: Sequence[bool]) -> None:
    """Raise an error if a gradient is needed that the forward op was told not to prepare."""
    names = ("input", "linear_weight", "linear_bias")
    for name, need, prepared in zip(names, needed, computed, strict=True):
        if need and not prepared:
            raise RuntimeError(
                f"{op} was told not to prepare the gradient of {name}, but it requires grad; "
                "expected the flags to say what requires grad"
            )


def _apply(cls: Any, *arguments: Any) -> Any:
    """torch.autograd.Function.apply without its look at the signature of forward, which has no
    defaults: it takes a tenth of a small call."""
    if torch._C._are_functorch_transforms_active():
        return super(cls, cls).apply(*arguments)
    return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(arguments))


def function_of(op: Any, setup_context: Any, backward: Any) -> type[torch.autograd.Function]:
    """An autograd.Function that runs `op`: its tensors, then a dict of its options."""

    def forward(*arguments: Any) -> Any:
        return _below_autograd(op, arguments[:-1], arguments[-1])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, options = inputs
        setup_context(ctx, tuple(tensors), options, output)

    members = {
        "apply": classmethod(_apply),
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "vmap": staticmethod(refuse_vmap),
    }
    return type(op.name().replace("::", "_"), (torch.autograd.Function,), members)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    _, lse, statistics, *others = output
    # Statistics, mostly empty, stand for this node where backward is itself recorded (_scaled). The
    # loss could not: code may write into it (loss += auxiliary, as transformers does).
    ctx.mark_non_differentiable(lse, *others)
    # Without this, backward would receive zeros in the shape of each gradient output.
    ctx.set_materialize_grads(False)
    ctx.options = keyword_only_inputs
    assert inputs[0] is not None
    ctx.scale_only = gradients_in_forward(keyword_only_inputs["reduction"], inputs[0].dtype)
    if ctx.scale_only:
        ctx.save_for_backward(statistics, *others[-3:])
    else:
        ctx.save_for_backward(lse, *inputs)


def refuse_vmap(*_: Any) -> None:
    raise RuntimeError(
        "torch.vmap over a function of memeff that records gradients is not implemented; these "
        "functions take leading dimensions themselves: pass all hidden states [B, ..., D] and "
        'targets [B, ...] at once, with reduction="none" for a loss per token, or loop over B'
    )


def save_nothing(ctx: Any, inputs: tuple[Any, ...], options: Any, output: Any) -> None:
    pass


def _refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "second derivatives of memeff.linear_cross_entropy (a backward through its gradients, as "
        'with create_graph=True) are not implemented; backend="reference" has them'
    )


_library.load()
_memeff = Operators("memeff")
# The library that computes for a backend (memeff/_backends.py resolves their names).
LIBRARIES = {"cpu": _memeff, "cuda": _memeff}
