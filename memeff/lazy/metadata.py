"""Rows for what plain logits say about themselves: shape, dtype, device, requires_grad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff.lazy.state import State
from memeff.lazy.table import TABLE, Row, Rule, property_row, row


@property_row("shape")
def shape(state: State) -> torch.Size:
    return state.shape


@property_row("dtype")
def dtype(state: State) -> torch.dtype:
    return state.dtype


@property_row("ndim")
def ndim(state: State) -> int:
    return state.ndim


@property_row("requires_grad")
def requires_grad(state: State) -> bool:
    return state.requires_grad


@property_row("is_leaf")
def is_leaf(state: State) -> bool:
    return not state.requires_grad


@property_row("grad_fn")
def grad_fn(state: State) -> Any:
    return NotImplemented if state.requires_grad else None


@property_row("itemsize")
def itemsize(state: State) -> int:
    return state.dtype.itemsize


@property_row("nbytes")
def nbytes(state: State) -> int:
    return state.shape.numel() * state.dtype.itemsize


@row("size", silent=True)
def size(state: State, dim: int | None = None) -> Any:
    return state.shape if dim is None else state.shape[dim]


@row("dim", "ndimension", silent=True)
def dim(state: State) -> int:
    return state.ndim


@row("numel", "nelement", silent=True)
def numel(state: State) -> int:
    return state.shape.numel()


@row("__len__", silent=True)
def length(state: State) -> int:
    return state.shape[0]


@row("element_size", silent=True)
def element_size(state: State) -> int:
    return state.dtype.itemsize


@row("is_floating_point", silent=True)
def is_floating_point(state: State) -> bool:
    return True


@row("is_complex", "is_conj", "is_neg", "is_inference", silent=True)
def is_not(state: State) -> bool:
    return False


@row("is_contiguous", silent=True)
def is_contiguous(state: State) -> bool:
    return state.is_contiguous


def _same_of_hidden(read: Any) -> Rule:
    return lambda state: read(state.hidden)


def _enter_those_of_hidden_states() -> None:
    """What hidden states and logits have in common."""
    for name in (
        "device", "layout", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse",
        "is_quantized", "is_nested", "is_mkldnn", "is_sparse_csr",
    ):  # fmt: skip
        read = getattr(Tensor, name).__get__
        TABLE[read] = Row(name, _same_of_hidden(read), silent=True)
    TABLE[Tensor.get_device] = Row("get_device", _same_of_hidden(Tensor.get_device), silent=True)


_enter_those_of_hidden_states()
