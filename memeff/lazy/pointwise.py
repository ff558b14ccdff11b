"""Rows for functions of each logit by itself: scale, soft cap, bias, dtype, copies.

z * t, z / t, -z        scale and softcap (memeff.lazy.state.State.times)
tanh(z)                 a soft cap of 1
z + b, b [V]            a bias of the head
z + z'                  one head over both hidden states (LoRA)
float(), to(), ...      the dtype that code sees; kernels compute in float32 in any case
clone(), contiguous()   the same logits
exp(log_softmax)        softmax
softmax * z, softmax * log_softmax      for their sums, the entropies
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff.lazy.source import BiasedSource, SummedSource
from memeff.lazy.state import (
    LOG_SOFTMAX,
    LOGITS,
    SOFTMAX,
    SOFTMAX_TIMES_LOG_SOFTMAX,
    SOFTMAX_TIMES_LOGITS,
    State,
)
from memeff.lazy.table import row


def number_in(value: object) -> float | None:
    """A constant: a Python number, or a 0-d tensor on the CPU that needs no gradient."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if (
        type(value) is Tensor
        and value.dim() == 0
        and value.device.type == "cpu"
        and value.is_floating_point()
        and not value.requires_grad
        and not torch.compiler.is_compiling()  # which cannot read it
    ):
        return value.item()
    return None


def or_not(state: State | None) -> Any:
    """A state, or NotImplemented for None."""
    return NotImplemented if state is None else state


@row("mul", "multiply", "__mul__", "__rmul__", commutes=True, several=True)
def multiply(state: State, other: object) -> Any:
    if isinstance(other, State):
        return or_not(_entropy_term(state, other) or _entropy_term(other, state))
    number = number_in(other)
    return NotImplemented if number is None else or_not(state.times(number))


@row("div", "divide", "true_divide", "__truediv__")
def divide(state: State, other: object) -> Any:
    number = number_in(other)
    return or_not(state.times(1.0 / number)) if number else NotImplemented


@row("neg", "negative", "__neg__")
def negate(state: State) -> Any:
    return state.times(-1.0)


@row("tanh")
def tanh(state: State) -> Any:
    if state.kind != LOGITS or state.softcap is not None:
        return NotImplemented
    return state.replace(softcap=1.0)


row("mul_", "multiply_", "__imul__", writes=torch.mul)(multiply)
row("div_", "divide_", "true_divide_", "__itruediv__", writes=torch.div)(divide)
row("neg_", "negative_", writes=torch.neg)(negate)
row("tanh_", writes=torch.tanh)(tanh)


@row("exp")
def exp(state: State) -> Any:
    if state.kind != LOG_SOFTMAX or state.factor != 1.0:
        return NotImplemented
    return state.replace(kind=SOFTMAX)


def _entropy_term(probabilities: State, other: State) -> State | None:
    """softmax(z) * z or softmax(z) * log_softmax(z) of the same z."""
    products = {LOGITS: SOFTMAX_TIMES_LOGITS, LOG_SOFTMAX: SOFTMAX_TIMES_LOG_SOFTMAX}
    if probabilities.kind != SOFTMAX or other.kind not in products:
        return None
    if probabilities.known is not other.known or probabilities.class_axis != other.class_axis:
        return None
    if probabilities.grad != other.grad:  # the gradient is that of one factor only
        return None
    return probabilities.replace(
        kind=products[other.kind],
        factor=probabilities.factor * other.factor,
        dtype=torch.promote_types(probabilities.dtype, other.dtype),
    )


@row("add", "__add__", "__radd__", commutes=True, several=True)
def add(state: State, other: object) -> Any:
    plain = state.kind == LOGITS and state.softcap is None and state.scale == 1.0
    if not plain or not state.classes_last or state.source.sharded:
        return NotImplemented
    if isinstance(other, State):
        return or_not(_added_head(state, other))
    if not isinstance(other, Tensor) or not other.is_floating_point():
        return NotImplemented
    one_per_class = 1 <= other.dim() <= state.ndim and other.shape[-1] == state.vocab
    if not one_per_class or other.numel() != state.vocab:
        return NotImplemented
    return state.replace(
        source=BiasedSource(state.source, other.reshape(-1)),
        dtype=torch.promote_types(state.dtype, other.dtype),
        grad=state.grad or (other.requires_grad and torch.is_grad_enabled()),
    )


def _added_head(state: State, other: State) -> State | None:
    if other.kind != LOGITS or other.softcap is not None or other.source.has_bias:
        return None
    if other.shape != state.shape or not other.classes_last or other.grad != state.grad:
        return None
    if other.source.dtype != state.source.dtype or other.source.sharded:
        return None
    return state.replace(
        source=SummedSource(state.source, other.source),
        hidden=torch.cat([state.hidden, other.hidden * other.scale], -1),
        dtype=torch.promote_types(state.dtype, other.dtype),
    )


def to_dtype(state: State, dtype: torch.dtype) -> Any:
    if dtype == state.dtype:
        return state
    return state.replace(dtype=dtype) if dtype.is_floating_point else NotImplemented


@row("float")
def to_float32(state: State) -> Any:
    return to_dtype(state, torch.float32)


@row("double")
def to_float64(state: State) -> Any:
    return to_dtype(state, torch.float64)


@row("half")
def to_float16(state: State) -> Any:
    return to_dtype(state, torch.float16)


@row("bfloat16")
def to_bfloat16(state: State) -> Any:
    return to_dtype(state, torch.bfloat16)


@row("to", "type_as")
def to(
    state: State,
    *targets: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    copy: bool = False,
) -> Any:
    if len(targets) > 2:  # non_blocking and copy by position
        return NotImplemented
    for target in targets:
        if isinstance(target, torch.dtype):
            dtype = target
        elif isinstance(target, Tensor):
            dtype, device = target.dtype, target.device
        elif isinstance(target, (str, torch.device)):
            device = target
        elif target is not None:
            return NotImplemented
    if device is not None and not _is_on(state.hidden, torch.device(device)):
        return NotImplemented
    moved = to_dtype(state, state.dtype if dtype is None else dtype)
    return state.replace() if copy and moved is state else moved


@row("type")
def type_(state: State, dtype: Any = None, non_blocking: bool = False) -> Any:
    return to_dtype(state, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@row("cpu")
def cpu(state: State) -> Any:
    return state if state.hidden.is_cpu else NotImplemented


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    if device.index is not None or device.type != tensor.device.type:
        return device == tensor.device
    return torch.empty(0, device=device).device == tensor.device  # the current one of this type


@row("clone")
def clone(state: State, *, memory_format: torch.memory_format = torch.preserve_format) -> State:
    return state.replace()


@row("contiguous")
def contiguous(state: State) -> State:
    return state if state.is_contiguous else state.replace()


@row("detach", aliases=True)
def detach(state: State) -> State:
    return state.replace(hidden=state.hidden.detach(), grad=False)
