"""``State``: lazy logits as a function of hidden states and the head's weights.

    z = cap(scale * (hidden W^T + b)),   cap(u) = softcap * tanh(u / softcap), or u without one

and what code made of z along the classes: z itself, log_softmax(z), softmax(z), or the products of
softmax(z) with either, of which only sums have a use. `factor` multiplies all but z itself, whose
factors are in scale and softcap.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from memeff.lazy.source import Computation, Source, grad_mode, version_of, without_autocast

T = TypeVar("T")

LOGITS = "logits"
LOG_SOFTMAX = "log_softmax"
SOFTMAX = "softmax"
SOFTMAX_TIMES_LOGITS = "softmax * logits"
SOFTMAX_TIMES_LOG_SOFTMAX = "softmax * log_softmax"

# What makes other logits, so that statistics of these say nothing about them.
_OF_THE_LOGITS = frozenset(("source", "hidden", "scale", "softcap"))


class State:
    """One value of lazy logits; never changed, `replace` makes another.

    A plain class without slots or a frozen dataclass's tricks: torch.compile traces and rebuilds
    it.
    """

    def __init__(self, source: Source, hidden: Tensor, dtype: torch.dtype, grad: bool) -> None:
        self.source = source
        self.hidden = hidden  # [*lead, D]
        self.version = version_of(hidden)
        self.dtype = dtype  # that of the plain logits, not of the computation
        self.grad = grad  # whether the plain logits would be part of a graph
        self.kind = LOGITS
        self.scale = 1.0
        self.softcap: float | None = None
        self.factor = 1.0
        # Where the classes are among the dimensions; the others are lead, in its order.
        self.class_axis = hidden.dim() - 1
        # Per-token statistics of z that have been computed, for all states with the same z.
        self.known: dict[str, Tensor] = {}
        # Entries that code has got, as (classes [*lead, K], values [*lead, K]).
        self.given: list[tuple[Tensor, Tensor]] = []

    def replace(self, **changes: Any) -> State:
        """A state with other attributes."""
        other = State.__new__(State)
        other.__dict__.update(self.__dict__, **changes)
        other.given = []
        if "hidden" in changes:
            self.check_hidden()
            other.version = version_of(other.hidden)
        if not _OF_THE_LOGITS.isdisjoint(changes):
            other.known = {}
        return other

    def replace_hidden(self, hidden: Tensor) -> State:
        """The same function of other hidden states; the classes are the last dimension."""
        return self.replace(hidden=hidden, class_axis=hidden.dim() - 1)

    @property
    def vocab(self) -> int:
        return self.source.vocab

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    @property
    def lead(self) -> torch.Size:
        """The dimensions without the classes."""
        return self.hidden.shape[:-1]

    @property
    def shape(self) -> torch.Size:
        lead, axis = self.lead, self.class_axis
        return torch.Size((*lead[:axis], self.vocab, *lead[axis:]))

    @property
    def classes_last(self) -> bool:
        return self.class_axis == self.ndim - 1

    @property
    def is_contiguous(self) -> bool:
        # The head's hidden states are contiguous, as plain logits are; slices of both are alike.
        return self.classes_last and self.hidden.is_contiguous()

    @property
    def requires_grad(self) -> bool:
        return self.grad and (self.hidden.requires_grad or self.source.requires_grad)

    def is_class_axis(self, dim: object) -> bool:
        """Whether `dim`, as code wrote it, is the dimension of the classes, and the last one."""
        if isinstance(dim, (tuple, list)) and len(dim) == 1:
            dim = dim[0]
        return (
            isinstance(dim, int)
            and not isinstance(dim, bool)
            and self.classes_last
            and dim in (-1, self.ndim - 1)
        )

    def times(self, number: float) -> State | None:
        """The state times a number.

        number * cap(scale u) = cap'(number * scale u) with softcap' = |number| * softcap.
        """
        if number == 0 or not -math.inf < number < math.inf:  # 0 * inf, and scales memeff refuses
            return None
        if self.kind != LOGITS:
            return self.replace(factor=self.factor * number)
        softcap = None if self.softcap is None else self.softcap * abs(number)
        return self.replace(scale=self.scale * number, softcap=softcap)

    def run(self, compute: Computation[T], *, grad: bool | None = None) -> T:
        """compute(hidden, weight, bias), as part of a graph if these logits are, or if `grad`."""
        self.check_hidden()
        if grad is None:
            grad = self.grad and torch.is_grad_enabled()
        with grad_mode(grad), without_autocast(self.hidden.device):
            return self.source.run(self.hidden, compute)

    def check_hidden(self) -> None:
        """Raise RuntimeError if the hidden states are not those that the head saw."""
        if self.version is None or torch.compiler.is_compiling():
            return
        if self.version != self.hidden._version:
            raise RuntimeError(
                "hidden states were modified in place between the call of a head and a use of its "
                "lazy logits, which can no longer be computed; call .dense() on the logits before"
            )
