"""``Source``: where lazy logits get their weights from.

The weights are those that the head had when it was called. Where FSDP or ZeRO shard them they are
whole only inside the forward of the module that owns them: `run` then goes through the head's own
``__call__``, whose hooks gather the weights before and free them after, also in the backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memeff.lazy.report import Report

T = TypeVar("T")
# What runs on whole weights: hidden [..., D], weight [V, D], bias [V] or None.
Computation = Callable[[Tensor, Tensor, "Tensor | None"], T]

# Patched head -> root of its model. FSDP2 shards what no unit owns in the root.
roots: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


class Source:
    """Weights of a head, or of several that make one sum of logits."""

    dtype: torch.dtype  # of the computation: autocast's at the time of the call, or the weight's
    report: Report
    vocab: int
    requires_grad: bool
    has_bias: bool

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        """compute(hidden, weight, bias) with whole weights of the computation's dtype."""
        raise NotImplementedError


class HeadSource(Source):
    """The weights of one head."""

    def __init__(self, head: nn.Linear, dtype: torch.dtype, report: Report) -> None:
        self.head = head
        self.dtype, self.report = dtype, report
        self.weight: Tensor = head.weight
        self.bias: Tensor | None = head.bias
        self.has_bias = self.bias is not None
        self.vocab = head.out_features  # ZeRO-3 empties the weight between calls
        self.requires_grad = self.weight.requires_grad or (
            self.bias is not None and self.bias.requires_grad
        )
        self.version = version_of(self.weight)

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        def on_whole(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> T:
            whole = _whole(weight).to(self.dtype)
            return compute(
                hidden.to(self.dtype), whole, None if bias is None else _whole(bias).to(self.dtype)
            )

        if not is_sharded(self.head, self.weight):
            if self.version is not None and self.version != self.weight._version:
                raise RuntimeError(
                    "the weight of a head was modified in place (by an optimizer?) between the "
                    "call of the head and the first use of its lazy logits, whose values are lost; "
                    "call .dense() on logits that have to outlive a change of the weight"
                )
            return on_whole(hidden, self.weight, self.bias)
        root = roots.get(self.head)
        owner: Any = None if root is None else root()
        if owner is not None and hasattr(owner, "unshard") and not hasattr(self.head, "unshard"):
            owner.unshard()  # FSDP2 resharded its root after forward; else this does nothing
        result: T = self.head(hidden, memeff_compute=on_whole)
        return result


class BiasedSource(Source):
    """Another source's weights with a bias that code added to the logits."""

    def __init__(self, source: Source, bias: Tensor) -> None:
        self.source, self.added = source, bias
        self.dtype, self.report, self.vocab = source.dtype, source.report, source.vocab
        self.requires_grad = source.requires_grad or bias.requires_grad
        self.has_bias = True

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        # In the dtype of the computation: the plain logits are no more exact than that either.
        added = self.added.to(self.dtype)
        return self.source.run(
            hidden, lambda h, w, b: compute(h, w, added if b is None else b + added)
        )


class SummedSource(Source):
    """Two heads whose logits are added, as LoRA does: W x + B a = [W, B] [x; a]."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second = first, second
        self.dtype, self.report, self.vocab = first.dtype, first.report, first.vocab
        self.requires_grad = first.requires_grad or second.requires_grad
        self.has_bias = first.has_bias

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        def with_first(hidden: Tensor, first: Tensor, bias: Tensor | None) -> T:
            def with_second(hidden: Tensor, second: Tensor, _: Tensor | None) -> T:
                return compute(hidden, torch.cat([first, second], -1), bias)

            return self.second.run(hidden, with_second)

        return self.first.run(hidden, with_first)


def is_sharded(head: nn.Module, weight: Tensor) -> bool:
    """Whether the head's weight is whole only inside its ``__call__``.

    Hooks of other kinds keep a head from being lazy (memeff.lazy.head), so any hook gathers.
    """
    return bool(head._forward_pre_hooks) or hasattr(weight, "full_tensor")


def version_of(tensor: Tensor) -> int | None:
    """The counter of in-place changes; None where there is none to compare."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def grad_mode(enabled: bool) -> Any:
    """A context with gradients on or off, which costs nothing where they already are."""
    if torch.is_grad_enabled() == enabled:
        return nullcontext()
    return torch.set_grad_enabled(enabled)


def without_autocast(device: torch.device) -> Any:
    """A context in which dtypes are what they are: the head's call has already cast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
