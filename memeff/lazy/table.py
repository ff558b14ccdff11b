"""The table of operations: torch function -> row.

A row's rule gets the state and the call's other arguments, as code wrote them, and returns

    another State, or a tuple     the call changes the logits in a way that a state can express
    its own State                 the call returns its own argument
    anything else                 a result computed from the state, without logits
    NotImplemented                its condition is not met: the logits are computed

so that torch itself answers whatever a rule does not know, errors included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., Any]


class Row:
    """A rule, and how calls of its functions are read.

    Args:
        name: of the function, for the report.
        aliases: the plain result may be a view of the plain argument.
        commutes: the lazy argument may be the second one.
        several: the second argument may be lazy, too; the rule gets its state.
        writes: the call writes into its argument what this function returns.
        silent: not for the report, as it is about metadata.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        *,
        aliases: bool = False,
        commutes: bool = False,
        several: bool = False,
        writes: Callable[..., Any] | None = None,
        silent: bool = False,
    ) -> None:
        self.name, self.rule = name, rule
        self.aliases, self.commutes, self.several = aliases, commutes, several
        self.writes, self.silent = writes, silent
        parameters = list(inspect.signature(rule).parameters.values())
        positional = [p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters]
        variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.most_args = 1000 if variable else sum(positional)
        self.least_args = sum(
            p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters
        )
        self.names = tuple(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)

    def reads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the rule has a parameter for every argument, and gets those it needs."""
        if not kwargs:
            return self.least_args <= len(args) <= self.most_args
        if len(args) > self.most_args or any(name not in self.names[1:] for name in kwargs):
            return False
        taken = self.names[: len(args)]
        needed = self.names[len(args) : self.least_args]
        return all(n in kwargs for n in needed) and not any(n in kwargs for n in taken)


TABLE: dict[Any, Row] = {}


def row(*names: str, **options: Any) -> Callable[[Rule], Rule]:
    """Enter the decorated rule for the functions of these names in Tensor, torch and
    torch.nn.functional."""

    def enter(rule: Rule) -> Rule:
        for name in names:
            for home in (Tensor, torch, torch.nn.functional):
                if hasattr(home, name):
                    TABLE[getattr(home, name)] = Row(name, rule, **options)
        return rule

    return enter


def property_row(name: str) -> Callable[[Rule], Rule]:
    """Enter the decorated rule for reading a property of Tensor."""

    def enter(rule: Rule) -> Rule:
        TABLE[getattr(Tensor, name).__get__] = Row(name, rule, silent=True)
        return rule

    return enter
