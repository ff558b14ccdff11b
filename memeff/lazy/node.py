"""``Node``: a state of lazy logits, and the plain calls that lead to it.

A node remembers the call that made it, so that logits are computed as plain code would have, value
for value and with the same graph: the head's product first, then the calls, in the order and in
the gradient mode in which code made them. The result is kept; whatever uses the node from then on
uses it.

Plain logits alias: what code writes into a view, the other views show. `Storage` counts the writes
that stand for one plain tensor's memory, so that a value from before a write is never taken for one
from after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memeff.lazy.source import grad_mode, is_autocast_enabled
from memeff.lazy.state import State


class Storage:
    """Stands for the memory of a plain tensor and all its views."""

    def __init__(self) -> None:
        self.writes = 0
        self.rewritten = 0  # the last write whose result is another state: no logits that exist


class Node:
    """One value of lazy logits. Without `function` it is what the head returned."""

    def __init__(
        self,
        state: State,
        function: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        part: int | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.state = state
        # function(*args, **kwargs) is the plain value, with nodes in args for plain logits; part:
        # which of several results.
        self.function, self.args, self.kwargs, self.part = function, args, kwargs or {}, part
        self.storage = Storage() if storage is None else storage
        self.version = self.storage.writes
        self.sources = [arg for arg in args if isinstance(arg, Node)]
        self.writes = [source.storage.writes for source in self.sources]
        # Autocast upcasts some functions: replayed under the same.
        self.autocast = function is not None and is_autocast_enabled(state.hidden.device)
        self._dense: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        """Whether the logits of this value, or of one that it was made from, exist."""
        if self._dense is not None:
            return True
        # A loop: every call asks several times, and a generator would be a call of its own.
        for source in self.sources:  # noqa: SIM110
            if source.is_dense:
                return True
        return False

    def inputs(self) -> list[Tensor]:
        """What its value is computed from next to weights: hidden states; or logits that exist."""
        if self.is_dense:
            return [self.dense()]
        if self.function is None:
            return [self.state.hidden]
        return [tensor for source in self.sources for tensor in source.inputs()]

    def dense(self) -> Tensor:
        """The plain logits, computed at the first call."""
        if self._dense is None:
            with grad_mode(self.state.grad):
                self._dense = self._head_product() if self.function is None else self._replay()
            # Code compares logits with the k-th largest that it got: equal ones have to be equal.
            # They differ in the last bits, of which autograd need not know.
            if self.version == self.storage.writes:  # else they are from before a write
                for classes, values in self.state.given:
                    self._dense.data.scatter_(-1, classes, values.detach())
        return self._dense

    def _head_product(self) -> Tensor:
        return self.state.run(F.linear, grad=self.state.grad)

    def _replay(self) -> Tensor:
        assert self.function is not None
        for source, writes in zip(self.sources, self.writes, strict=True):
            copied = source.storage is not self.storage
            if copied and source.is_dense and source.storage.writes != writes:
                raise _stale()
        args = [arg.dense() if isinstance(arg, Node) else arg for arg in self.args]
        with torch.autocast(self.state.hidden.device.type, enabled=self.autocast):
            result = self.function(*args, **self.kwargs)
        value: Tensor = result if self.part is None else result[self.part]
        return value


def _stale() -> RuntimeError:
    return RuntimeError(
        "these lazy logits were made from others that were modified in place before anybody "
        "looked at these, so that their values are lost; call .dense() on them before that"
    )
