"""A head, plain and lazy, and the comparison of what a function makes of either's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tolerances import assert_close_as_plain
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import memeff
from memeff.lazy.report import Report

VOCAB = 67
FEATURES = 24


def make_head(
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    vocab: int = VOCAB,
    spread: float = 2.0,
) -> nn.Linear:
    head = nn.Linear(FEATURES, vocab, bias=bias)
    nn.init.normal_(head.weight, std=spread / FEATURES**0.5)
    return head.to(dtype)


class Uncast(Tensor):
    """Logits that stay float64 whatever dtype code asks for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("float", "double", "half", "bfloat16", "to", "type", "type_as"):
            return args[0]
        kwargs = {k: v for k, v in (kwargs or {}).items() if not isinstance(v, torch.dtype)}
        return super().__torch_function__(func, types, args, kwargs)


class Side:
    """Hidden states and a head of one kind: "lazy", "plain" or "exact" (plain, in float64)."""

    def __init__(self, kind: str, hidden: Tensor, head: nn.Linear, strict: bool) -> None:
        exact = kind == "exact"
        self.hidden = hidden.detach().to(torch.float64 if exact else hidden.dtype)
        self.hidden.requires_grad_(hidden.requires_grad)
        self.head = nn.Linear(FEATURES, head.out_features, bias=head.bias is not None)
        self.head.to(self.hidden.dtype).load_state_dict(head.state_dict())
        self.report: Report | None = None
        if kind == "lazy":
            self.report = memeff.patch(self.head, strict=strict)

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"dx": self.hidden, "dw": self.head.weight, "db": self.head.bias}
        return {name: leaf for name, leaf in named.items() if leaf is not None}


class Comparison:
    """`function` of lazy logits against plain ones, and against float64.

    Values and gradients follow tests/tolerances.py; shapes, dtypes and requires_grad of results are
    equal to those of plain logits.
    """

    def __init__(
        self,
        lead: tuple[int, ...] = (3, 5),
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        vocab: int = VOCAB,
        strict: bool = True,
        hidden: Tensor | None = None,
    ) -> None:
        if hidden is None:
            hidden = torch.randn(*lead, FEATURES).to(dtype)
        hidden.requires_grad_()
        head = make_head(dtype, bias=bias, vocab=vocab)
        self.lazy, self.plain, self.exact = (
            Side(kind, hidden, head, strict) for kind in ("lazy", "plain", "exact")
        )

    @property
    def report(self) -> Report:
        assert self.lazy.report is not None
        return self.lazy.report

    def check(self, function: Callable[[Any], Any]) -> None:
        lazy = tree_leaves(function(self.lazy.head(self.lazy.hidden)))
        plain = tree_leaves(function(self.plain.head(self.plain.hidden)))
        exact = tree_leaves(function(self.exact.head(self.exact.hidden).as_subclass(Uncast)))
        exact = [result.as_subclass(Tensor) for result in exact]
        assert len(lazy) == len(plain)
        differentiable = []
        for ours, theirs, truth in zip(lazy, plain, exact, strict=True):
            assert isinstance(ours, Tensor), type(ours)
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert ours.device == theirs.device
            assert ours.requires_grad == theirs.requires_grad
            if ours.is_floating_point():
                if ours.dtype == torch.float64 != self.lazy.hidden.dtype:
                    ours = ours.float()  # no more exact than the head
                assert_close_as_plain("value", ours, theirs, truth.double(), gradient=False)
            else:
                assert torch.equal(ours, truth)
            if theirs.requires_grad:
                differentiable.append((ours, theirs, truth))
        if differentiable:
            self._check_gradients(differentiable)

    def _check_gradients(self, outputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        upstream = [torch.randn(o.shape) + 0.5 for o, _, _ in outputs]  # neither 1 nor uniform
        gradients = []
        for position, side in enumerate((self.lazy, self.plain, self.exact)):
            results = [output[position] for output in outputs]
            gradients.append(
                torch.autograd.grad(
                    results,
                    list(side.leaves.values()),
                    # Those of the lazy side, which are rounded to its dtype.
                    [
                        g.to(o[0].dtype).to(r)
                        for g, o, r in zip(upstream, outputs, results, strict=True)
                    ],
                )
            )
        for name, ours, plain, exact in zip(self.lazy.leaves, *gradients, strict=True):
            assert ours.dtype == plain.dtype
            assert_close_as_plain(name, ours, plain, exact)
