"""Rows for views and selections: what moves tokens about moves hidden states.

The classes stay whole. Where they are the last dimension, a view, slice, index or mask of the
others is the same of the hidden states; permutations may also move the classes. Anything that cuts
or mixes the classes computes the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memeff.lazy.state import State
from memeff.lazy.table import row


def _dims(dims: Sequence[Any]) -> tuple[int, ...]:
    """(2, 3) of f(2, 3) and of f((2, 3))."""
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        return tuple(dims[0])
    return tuple(dims)


def _lead_dim(state: State, dim: int) -> int | None:
    """Dimension of the hidden states that a dimension of the logits is; None for the classes."""
    if not -state.ndim <= dim < state.ndim:
        return None
    dim %= state.ndim
    return dim if state.classes_last and dim != state.class_axis else None


@row("view", "reshape", aliases=True)
def view(state: State, *sizes: Any, shape: Sequence[int] | None = None) -> Any:
    sizes = _dims(sizes if shape is None else shape)
    if not sizes or isinstance(sizes[0], torch.dtype) or not state.classes_last:
        return NotImplemented
    *lead, last = sizes
    if last == -1 and -1 not in lead:
        last = state.vocab
    if last != state.vocab or not lead:
        return NotImplemented
    if 0 in lead if -1 in lead else math.prod(lead) != state.lead.numel():
        return NotImplemented  # the first: ambiguous
    # A view of plain logits that does not exist raises an error in torch; a copy does as well here.
    return state.replace_hidden(state.hidden.reshape(*lead, state.hidden.shape[-1]))


@row("flatten", aliases=True)
def flatten(state: State, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = _lead_dim(state, start_dim), _lead_dim(state, end_dim)
    if start is None or end is None:
        return NotImplemented
    return state.replace_hidden(state.hidden.flatten(start, end))


@row("unflatten", aliases=True)
def unflatten(state: State, dim: int, sizes: Sequence[int]) -> Any:
    lead = _lead_dim(state, dim)
    if lead is None:
        return NotImplemented
    return state.replace_hidden(state.hidden.unflatten(lead, sizes))


@row("squeeze", aliases=True)
def squeeze(state: State, dim: int) -> Any:
    lead = _lead_dim(state, dim) if isinstance(dim, int) else None
    return NotImplemented if lead is None else state.replace_hidden(state.hidden.squeeze(lead))


@row("unsqueeze", aliases=True)
def unsqueeze(state: State, dim: int) -> Any:
    if not state.classes_last or not 0 <= dim % (state.ndim + 1) < state.ndim:
        return NotImplemented
    return state.replace_hidden(state.hidden.unsqueeze(dim % (state.ndim + 1)))


@row("narrow", aliases=True)
def narrow(state: State, dim: int, start: int, length: int) -> Any:
    lead = _lead_dim(state, dim)
    if lead is None:
        return NotImplemented
    return state.replace_hidden(state.hidden.narrow(lead, start, length))


@row("select", aliases=True)
def select(state: State, dim: int, index: int) -> Any:
    lead = _lead_dim(state, dim)
    return (
        NotImplemented if lead is None else state.replace_hidden(state.hidden.select(lead, index))
    )


@row("index_select", aliases=True)
def index_select(state: State, dim: int, index: Tensor) -> Any:
    lead = _lead_dim(state, dim)
    if lead is None:
        return NotImplemented
    return state.replace_hidden(state.hidden.index_select(lead, index))


@row("split", aliases=True)
def split(state: State, split_size: Any, dim: int = 0) -> Any:
    lead = _lead_dim(state, dim)
    if lead is None:
        return NotImplemented
    return tuple(state.replace_hidden(part) for part in state.hidden.split(split_size, lead))


@row("chunk", aliases=True)
def chunk(state: State, chunks: int, dim: int = 0) -> Any:
    lead = _lead_dim(state, dim)
    if lead is None:
        return NotImplemented
    return tuple(state.replace_hidden(part) for part in state.hidden.chunk(chunks, lead))


@row("unbind", aliases=True)
def unbind(state: State, dim: int = 0) -> Any:
    lead = _lead_dim(state, dim)
    if lead is None:
        return NotImplemented
    return tuple(state.replace_hidden(part) for part in state.hidden.unbind(lead))


@row("__getitem__", aliases=True)
def getitem(state: State, index: Any) -> Any:
    indices = index if isinstance(index, tuple) else (index,)
    if not state.classes_last or not all(_selects(i) for i in indices):
        return NotImplemented
    consumed = sum(_consumed(i) for i in indices)
    if any(i is Ellipsis for i in indices) or consumed == state.ndim:
        # The last index is that of the classes.
        if not (isinstance(indices[-1], slice) and indices[-1] == slice(None)):
            return NotImplemented
    elif consumed > state.ndim:
        return NotImplemented
    if any(isinstance(i, (Tensor, list)) for i in indices):
        # Advanced indices that are not adjacent move to the front; so they do for hidden states.
        separated = [isinstance(i, (Tensor, list, int)) for i in indices]
        if separated[-1] and len(indices) == state.ndim:
            return NotImplemented
    return state.replace_hidden(state.hidden[index])


def _selects(index: object) -> bool:
    """Whether an index is of a kind whose meaning is known here."""
    if isinstance(index, Tensor):
        return type(index) is Tensor and index.dtype in (torch.bool, torch.int64, torch.int32)
    if isinstance(index, list):
        return all(isinstance(i, int) and not isinstance(i, bool) for i in index)
    return (
        index is None
        or index is Ellipsis
        or (isinstance(index, (int, slice)) and not isinstance(index, bool))
    )


def _consumed(index: object) -> int:
    """How many dimensions an index takes."""
    if index is None or index is Ellipsis:
        return 0
    return index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1


@row("transpose", "swapaxes", "swapdims", aliases=True)
def transpose(state: State, dim0: int, dim1: int) -> Any:
    n = state.ndim
    if not (-n <= dim0 < n and -n <= dim1 < n):
        return NotImplemented
    order = list(range(n))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _reorder(state, order)


@row("permute", aliases=True)
def permute(state: State, *order: int, dims: Sequence[int] | None = None) -> Any:
    order = tuple(dim % state.ndim for dim in _dims(order if dims is None else dims))
    if sorted(order) != list(range(state.ndim)):
        return NotImplemented
    return _reorder(state, order)


@row("movedim", "moveaxis", aliases=True)
def movedim(state: State, source: int, destination: int) -> Any:
    n = state.ndim
    if not (isinstance(source, int) and isinstance(destination, int)):
        return NotImplemented
    if not (-n <= source < n and -n <= destination < n):
        return NotImplemented
    order = [dim for dim in range(n) if dim != source % n]
    order.insert(destination % n, source % n)
    return _reorder(state, order)


def _reorder(state: State, order: Sequence[int]) -> State:
    """Dimension i of the result is order[i] of the state."""
    axis = state.class_axis
    lead = [dim - (dim > axis) for dim in order if dim != axis]
    hidden = state.hidden
    if lead != sorted(lead):
        hidden = hidden.permute(*lead, state.ndim - 1)
    return state.replace(hidden=hidden, class_axis=order.index(axis))
