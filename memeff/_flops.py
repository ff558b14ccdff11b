"""Formulas for torch.utils.flop_counter: what FlopCounterMode, and MFU counters on it, see.

They count matrix products of N tokens, D features and V classes: 2 N D V for the logits, and as
much for each gradient of hidden states or weight. A loss with both is 6 N D V, or 8 N D V where its
backward pass computes the logits again. Ignored tokens, which the kernels leave out, count as in
the plain product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["product", "register", "wanted_products"]


def product(input: Tensor, linear_weight: Tensor) -> int:
    """FLOPs of input [N, D] times weight [V, D]."""
    return 2 * input.shape[0] * linear_weight.numel()


def wanted_products(options: dict[str, Any]) -> int:
    """How many products the gradients are that an op is asked for; a bias's is a sum."""
    return int(options["input_grad"]) + int(options["weight_grad"])


def register(op: Any, formula: Callable[[dict[str, Any]], int]) -> None:
    """Let FlopCounterMode call formula(arguments of the op by name)."""
    names = [argument.name for argument in op._schema.arguments]

    def flops(*args: Any, out_val: Any = None, **options: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **options})

    register_flop_formula(op.overloadpacket, get_raw=True)(flops)
