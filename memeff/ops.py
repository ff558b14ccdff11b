"""The operators torch.ops.memeff.*: loads them and adds what C++ leaves to Python.

csrc/bindings declares the schemas (tensors are positional, options keyword-only), the
implementations and autograd. Here are the fake (shape-only) kernels for meta tensors and
torch.compile, and the FLOPs.

The forward op computes gradients while it has the logits, for an upstream gradient of 1, whenever
the loss is a scalar; its backward then only scales them. For per-token losses, and for float16
(whose gradients must be scaled before they are rounded), backward is the second op, which
recomputes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memeff import _flops, _library


def gradients_in_forward(reduction: str, dtype: torch.dtype) -> bool:
    """Whether the forward op computes the gradients; the C++ op follows the same rule."""
    return reduction != "none" and dtype != torch.float16


def wanted_gradients(options: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Which gradients an op is told to compute: those of input, weight and bias."""
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
    """The operators of one library, torch.ops.<name>.*, completed by fake kernels.

    The extension's own library is "memeff"; a second build of the same operators for another device
    takes another name.
    """

    def __init__(self, name: str) -> None:
        operators = getattr(torch.ops, name)
        forward = operators.linear_cross_entropy_forward.default
        recompute = operators.linear_cross_entropy_backward.default
        self.linear_cross_entropy_forward = forward
        self.loss_options = options_of_calls(forward)
        torch.library.register_fake(forward.name(), _forward_fake)
        torch.library.register_fake(recompute.name(), _backward_fake)
        torch.library.register_fake(operators.scale_gradient.default.name(), _scale_fake)
        torch.library.register_fake(operators.scale_gradient_.default.name(), _scale_in_place_fake)
        _flops.register(forward, _forward_flops)
        _flops.register(recompute, recompute_flops)


def option_names(op: Any) -> tuple[str, ...]:
    """The keyword-only arguments of an op."""
    return tuple(argument.name for argument in op._schema.arguments if argument.kwarg_only)


def options_of_calls(op: Any) -> tuple[str, ...]:
    """Those of `memeff._options.Options`: apart from the gradients wanted and a handle."""
    others = ("input_grad", "weight_grad", "bias_grad", "handle")
    return tuple(name for name in option_names(op) if name not in others)


_library.load()
_memeff = Operators("memeff")
# The library that computes for a backend (memeff/_backends.py resolves their names).
LIBRARIES = {"cpu": _memeff, "cuda": _memeff}
