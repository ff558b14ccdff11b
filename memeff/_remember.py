"""``remember``: calls repeat their options, and what follows from these is computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["remember"]

P = ParamSpec("P")
R = TypeVar("R")


def remember(function: Callable[P, R]) -> Callable[P, R]:
    """Keeps the results for the last 64 combinations of arguments, which callers must not change.

    A compiler traces the function itself; arguments that are not hashable go to it, too. An error
    is not kept.
    """
    before: Callable[..., R] = functools.lru_cache(maxsize=64, typed=True)(function)

    @functools.wraps(function)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            try:
                return before(*args, **kwargs)
            except TypeError:  # not hashable, or an error of the function's own
                pass
        return function(*args, **kwargs)

    return remembering
