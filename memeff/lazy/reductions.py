"""Rows for functions along the classes: softmax and what is read of it.

    log_softmax, softmax            another kind of state
    gather                          log p_y, and what it is part of
    logsumexp                       lse
    argmax, max, topk               the largest entries, of a state that grows with z
    sum, mean                       sum_v z_v = (sum_v W_v) h;  sum_v log p_v = sum_v z_v - V lse;
                                    sum_v p_v log p_v = -H;  sum_v p_v z_v = lse - H

The numbers come from memeff.linear_token_statistics, differentiable where they are in torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memeff.lazy.source import is_autocast_enabled
from memeff.lazy.state import (
    LOG_SOFTMAX,
    LOGITS,
    SOFTMAX,
    SOFTMAX_TIMES_LOG_SOFTMAX,
    SOFTMAX_TIMES_LOGITS,
    State,
)
from memeff.lazy.table import row
from memeff.statistics import LogitStatistics
from memeff.token_statistics import linear_token_statistics

# Targets per token up to which statistics are cheaper than logits.
MOST_TARGETS = 64
# linear_token_statistics ignores a class; torch's functions do not.
_IGNORES_NOTHING = -(2**63)


def dtype_under_autocast(state: State, function: Any, dim: int = -1) -> torch.dtype:
    """The dtype of function(logits, dim), which autocast may upcast."""
    device = state.hidden.device
    if not is_autocast_enabled(device):
        return state.dtype
    result: Tensor = function(state.hidden.new_zeros((1, 1), dtype=state.dtype), dim)
    return result.dtype


def statistics(state: State, target: Tensor | None = None, **wanted: Any) -> LogitStatistics:
    """Statistics of z; the lse and entropy are kept for other functions of the same z."""
    wanted = {"entropy": False, "argmax": False, **wanted}

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LogitStatistics:
        return linear_token_statistics(
            hidden,
            weight,
            target,
            linear_bias=bias,
            ignore_index=_IGNORES_NOTHING,
            softcap=state.softcap,
            logit_scale=state.scale,
            **wanted,
        )

    result = state.run(compute)
    _keep(state, "lse", result.lse)
    if result.entropy is not None:
        _keep(state, "entropy", result.entropy)
    return result


def _keep(state: State, name: str, value: Tensor) -> None:
    before = state.known.get(name)
    if before is not None and before.requires_grad and not value.requires_grad:
        return
    # Checkpointed code has to save the same tensors when it runs again.
    if not torch.compiler.is_compiling() and not _saved_tensors_are_hooked():
        state.known[name] = value


def _saved_tensors_are_hooked() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _known(state: State, name: str) -> Tensor:
    """lse or entropy, computed unless it is known, and as part of a graph if that is wanted."""
    value = state.known.get(name)
    wants_grad = state.requires_grad and torch.is_grad_enabled()
    if value is not None and (value.requires_grad or not wants_grad):
        return value if wants_grad else value.detach()
    found: Tensor = getattr(statistics(state, entropy=name == "entropy"), name)
    return found


@row("log_softmax")
def log_softmax(
    state: State, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if state.kind != LOGITS or not state.is_class_axis(dim):
        return NotImplemented
    return _softmax_of(state, LOG_SOFTMAX, torch.log_softmax, dtype)


@row("softmax")
def softmax(
    state: State, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if state.kind != LOGITS or not state.is_class_axis(dim):
        return NotImplemented
    return _softmax_of(state, SOFTMAX, torch.softmax, dtype)


def _softmax_of(state: State, kind: str, function: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        dtype = dtype_under_autocast(state, function)
    return state.replace(kind=kind, dtype=dtype) if dtype.is_floating_point else NotImplemented


def _entries(state: State, classes: Tensor) -> Tensor:
    """Entries of the state at classes [*lead, K], differentiable.

    All that code gets of single entries is computed here, so that equal entries are equal bits.
    """
    try:
        found = statistics(state, classes)
    except IndexError as error:  # torch.gather's
        wrong = classes[(classes < 0) | (classes >= state.vocab)][0].item()
        raise RuntimeError(
            f"index {wrong} is out of bounds for dimension {state.ndim - 1} with size {state.vocab}"
        ) from error
    assert found.logprob is not None
    if state.kind == LOGITS:
        value = found.logprob + found.lse.unsqueeze(-1)
    else:
        logprob = found.logprob if state.kind == LOG_SOFTMAX else found.logprob.exp()
        value = logprob * state.factor
    value = value.to(state.dtype)
    if not torch.compiler.is_compiling():
        state.given.append((classes, value.detach()))
    return value


@row("gather")
def gather(state: State, dim: int, index: Tensor) -> Any:
    if not state.is_class_axis(dim) or state.kind not in (LOGITS, LOG_SOFTMAX, SOFTMAX):
        return NotImplemented
    fits = index.dim() == state.ndim and index.shape[:-1] == state.lead
    if not fits or index.dtype != torch.int64 or index.shape[-1] > MOST_TARGETS:
        return NotImplemented
    if index.device != state.hidden.device:
        return NotImplemented
    return _entries(state, index)


@row("take_along_dim")
def take_along_dim(state: State, indices: Tensor, dim: int | None = None) -> Any:
    return NotImplemented if dim is None else gather(state, dim, indices)


@row("logsumexp")
def logsumexp(state: State, dim: Any, keepdim: bool = False) -> Any:
    if state.kind != LOGITS or not state.is_class_axis(dim):
        return NotImplemented
    lse = _known(state, "lse").to(dtype_under_autocast(state, torch.logsumexp))
    return lse.unsqueeze(-1) if keepdim else lse


def _grows_with_logits(state: State) -> bool:
    return state.kind in (LOGITS, LOG_SOFTMAX, SOFTMAX) and state.factor > 0


@row("argmax")
def argmax(state: State, dim: int | None = None, keepdim: bool = False) -> Any:
    if not state.is_class_axis(dim) or not _grows_with_logits(state):
        return NotImplemented
    with torch.no_grad():
        index = statistics(state, argmax=True).argmax
    assert index is not None
    return index.unsqueeze(-1) if keepdim else index


class ValuesAndIndices(NamedTuple):
    """As torch.return_types.max and topk, which a compiler cannot make."""

    values: Tensor
    indices: Tensor


@row("max")
def maximum(state: State, dim: int | None = None, keepdim: bool = False) -> Any:
    if not state.is_class_axis(dim) or not _grows_with_logits(state):
        return NotImplemented
    values, indices = _top(state, 1)
    if not keepdim:
        values, indices = values.squeeze(-1), indices.squeeze(-1)
    return ValuesAndIndices(values, indices)


@row("topk")
def topk(state: State, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not state.is_class_axis(dim) or not _grows_with_logits(state) or not largest:
        return NotImplemented
    if not 0 < k <= min(MOST_TARGETS, state.vocab):
        return NotImplemented
    return ValuesAndIndices(*_top(state, k))


def _top(state: State, k: int) -> tuple[Tensor, Tensor]:
    """Values, differentiable, and indices of the k largest entries."""
    with torch.no_grad():
        found = statistics(state, argmax=k == 1, top_k=0 if k == 1 else k)
    classes = found.argmax.unsqueeze(-1) if found.argmax is not None else found.top_ids
    assert classes is not None
    return _entries(state, classes), classes


@row("sum")
def total(
    state: State, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    return _summed(state, torch.sum, dim, keepdim, dtype)


@row("mean")
def mean(
    state: State, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    return _summed(state, torch.mean, dim, keepdim, dtype)


def _summed(state: State, function: Any, dim: Any, keepdim: bool, dtype: torch.dtype | None) -> Any:
    """torch.sum or torch.mean over the classes, or over everything."""
    everything = dim is None and not keepdim
    if dtype is not None and not dtype.is_floating_point:  # torch rounds each logit before
        return NotImplemented
    value = _sum(state) if everything or state.is_class_axis(dim) else None
    if value is None:
        return NotImplemented
    if function is torch.mean:
        value = value / state.vocab
    if everything:
        value = function(value)
    value = value.to(dtype or dtype_under_autocast(state, function))
    return value.unsqueeze(-1) if keepdim else value


def _sum(state: State) -> Tensor | None:
    """The sum over the classes, in at least float32."""
    if state.kind == SOFTMAX_TIMES_LOG_SOFTMAX:
        return -state.factor * _known(state, "entropy")
    if state.kind == SOFTMAX_TIMES_LOGITS:
        entropy = _known(state, "entropy")
        return state.factor * (_known(state, "lse") - entropy)
    if state.kind == LOGITS:
        return _logit_sum(state)
    if state.kind == LOG_SOFTMAX:
        logits = _logit_sum(state)
        if logits is None:
            return None
        return state.factor * (logits - state.vocab * _known(state, "lse"))
    return None


def _logit_sum(state: State) -> Tensor | None:
    """sum_v z_v, without a soft cap from the sum of the weight's rows."""
    if state.softcap is not None or state.source.sharded:
        return statistics(state, logit_sum=True).logit_sum

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        value = hidden.to(wide) @ weight.sum(0, dtype=wide)
        return value if bias is None else value + bias.sum(dtype=wide)

    return state.run(compute) * state.scale
