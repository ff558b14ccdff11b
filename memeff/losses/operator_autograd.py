"""Autograd of an operator that Python implements: that of the others is in csrc/bindings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memeff._gradients import refuse_vmap

__all__ = ["call", "check_flags", "function_of"]

Function = type[torch.autograd.Function]


def call(op: Any, function: Function, tensors: Sequence[Tensor | None], options: Any) -> Any:
    """Call an op, or where gradients are recorded the autograd.Function of the same formula.

    What register_autograd generates refuses to run in transforms such as torch.func.grad: it is
    left out, also where nothing is recorded. A compiler traces the op itself.
    """
    if torch.compiler.is_compiling():
        return op(*tensors, **options)
    if torch.is_grad_enabled():
        return function.apply(*tensors, options)
    return _below_autograd(op, tensors, options)


def _below_autograd(op: Any, tensors: Sequence[Any], options: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*tensors, **options)


def function_of(op: Any, setup_context: Any, backward: Any) -> Function:
    """An autograd.Function that runs `op`: its tensors, then a dict of its options."""

    def forward(*arguments: Any) -> Any:
        return _below_autograd(op, arguments[:-1], arguments[-1])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, options = inputs
        setup_context(ctx, tuple(tensors), options, output)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "vmap": staticmethod(refuse_vmap),
    }
    return type(op.name().replace("::", "_"), (torch.autograd.Function,), members)


def check_flags(op: str, needed: Sequence[bool], computed: Sequence[bool]) -> None:
    """Raise an error if a gradient is needed that the forward op was told not to prepare."""
    names = ("input", "linear_weight", "linear_bias")
    for name, need, prepared in zip(names, needed, computed, strict=True):
        if need and not prepared:
            raise RuntimeError(
                f"{op} was told not to prepare the gradient of {name}, but it requires grad; "
                "expected the flags to say what requires grad"
            )
