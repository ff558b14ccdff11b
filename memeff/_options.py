"""The options of a call: what users write, and the same checked and normalised.

An option is a key of `LossOptions`, with the type that users write, and a field of `Options` under
the name that the operators have for it, with its check and its default. From there it travels by
name: see `memeff._call.Call.keywords`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict, get_type_hints

import torch
from torch import Tensor

from memeff._backends import check_backend
from memeff._checks import check_choice, check_flag, check_int, check_number
from memeff._remember import remember
from memeff.vocab_parallel import VocabParallel, parse_vocab_parallel

if TYPE_CHECKING:
    # torch.nn.LinearCrossEntropyOptions, which torch has only from 2.13 on.
    TorchOptions = Any

__all__ = [
    "LossOptions",
    "Options",
    "StatisticsOptions",
    "check_accum_dtype",
    "check_torch_options",
    "merge_torch_options",
    "parse_options",
    "show_options",
]

REDUCTIONS = ("mean", "sum", "none")
IGNORE_INDEX = -100  # what None means
NO_MEMORY_BUDGET = -1

_LARGEST = sys.float_info.max
_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class LossOptions(TypedDict, total=False):
    """The options of `memeff.linear_cross_entropy` that a module keeps."""

    reduction: str
    ignore_index: int | None
    label_smoothing: float
    options: TorchOptions | None
    softcap: float | None
    logit_scale: float | Tensor
    z_loss: float
    shift: bool | int
    memory_budget: int | str | None
    chunk_size: int | None
    accum_dtype: torch.dtype | None
    skip_mass: float
    vocab_parallel: VocabParallel | None
    backend: str


class StatisticsOptions(TypedDict, total=False):
    """The options that functions of token statistics have in common."""

    ignore_index: int | None
    softcap: float | None
    logit_scale: float | Tensor
    temperature: float | Tensor
    shift: bool | int
    memory_budget: int | str | None
    chunk_size: int | None
    vocab_parallel: VocabParallel | None
    backend: str


def _number(expected: str, valid: Callable[[Any], bool], none: float | None = None) -> Any:
    """A number, `none` for None if that is allowed; nan is never valid."""

    def parse(name: str, value: Any) -> float:
        if value is None and none is not None:
            return none
        check_number(name, value)
        if not valid(value):
            raise ValueError(f"{name} is {value}, expected {expected}")
        return float(value)

    return parse


def _parse_choice(*choices: str) -> Callable[[str, Any], str]:
    def parse(name: str, value: Any) -> str:
        check_choice(name, value, choices)
        return str(value)

    return parse


def _parse_flag(name: str, value: Any) -> bool:
    check_flag(name, value)
    return bool(value)


def parse_ignore_index(name: str, value: Any) -> int:
    if value is None:
        return IGNORE_INDEX
    return check_int(name, value, "a class index or None")


def _parse_shift(name: str, value: Any) -> int:
    if isinstance(value, bool):
        return int(value)
    return check_int(name, value, "the number of positions ahead, >= 0", least=0)


def _parse_top_k(name: str, value: Any) -> int:
    return check_int(name, value, "a number of classes, >= 0", least=0)


def _parse_memory_budget(name: str, value: Any) -> int:
    """Bytes: an int, or a number with B, KB, MB, GB (powers of 1000) or KiB, MiB, GiB (powers of
    1024); -1 for None."""
    if value is None:
        return NO_MEMORY_BUDGET
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"{name} is {value!r}, expected bytes as an int or a string such as "
                '"64MiB" or "1.5GB"'
            )
        value = int(float(match[1]) * unit)
    return check_int(name, value, 'a number of bytes >= 0, a string such as "64MiB" or None', 0)


def _parse_chunk_size(name: str, value: Any) -> int:
    """Tokens per chunk, 0 when the planner may choose."""
    return 0 if value is None else check_int(name, value, "a number of tokens >= 1, or None", 1)


def _parse_accum_dtype(name: str, value: Any) -> torch.dtype | None:
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(
            f"{name} must be a torch.dtype or None, got {type(value).__name__} {value!r}"
        )
    return value


def _parse_backend(name: str, value: Any) -> str:
    check_backend(name, value)
    return str(value)


# (Comparisons only: torch.compile traces no symbolic number through math.isfinite, and a large int
# becomes no float.)
_parse_fraction = _number("a value in [0, 1]", lambda e: 0 <= e <= 1)
_parse_probability = _number("a probability in [0, 1)", lambda e: 0 <= e < 1)
_parse_coefficient = _number("a finite coefficient >= 0", lambda z: 0 <= z <= _LARGEST)
_parse_scale = _number(
    "a finite value other than 0", lambda s: s != 0 and -_LARGEST <= s <= _LARGEST
)
_parse_softcap = _number(
    "a finite value > 0, or None for none", lambda c: 0 < c <= _LARGEST, none=0.0
)


class Options(NamedTuple):
    """What a call does, as the operators take it: checked, with None resolved."""

    reduction: Annotated[str, _parse_choice(*REDUCTIONS)] = "mean"
    ignore_index: Annotated[int, parse_ignore_index] = IGNORE_INDEX
    label_smoothing: Annotated[float, _parse_fraction] = 0.0
    softcap: Annotated[float, _parse_softcap] = 0.0  # 0: none
    logit_scale: Annotated[float, _parse_scale] = 1.0
    z_loss: Annotated[float, _parse_coefficient] = 0.0
    shift: Annotated[int, _parse_shift] = 0
    return_statistics: Annotated[bool, _parse_flag] = False
    memory_budget: Annotated[int, _parse_memory_budget] = NO_MEMORY_BUDGET  # bytes, -1: none given
    chunk_size: Annotated[int, _parse_chunk_size] = 0  # tokens, 0: the planner's choice
    accum_dtype: Annotated[torch.dtype | None, _parse_accum_dtype] = None
    skip_mass: Annotated[float, _parse_probability] = 0.0
    vocab_parallel: Annotated[VocabParallel | None, parse_vocab_parallel] = None
    backend: Annotated[str, _parse_backend] = "auto"
    # Options of token statistics:
    entropy: Annotated[bool, _parse_flag] = False
    argmax: Annotated[bool, _parse_flag] = False
    logit_sum: Annotated[bool, _parse_flag] = False
    log_sum_sq_probs: Annotated[bool, _parse_flag] = False
    top_k: Annotated[int, _parse_top_k] = 0
    skip_ignored: Annotated[bool, _parse_flag] = False

    # Methods only: of a NamedTuple's properties torch.compile makes graph breaks in torch 2.10.

    def of_operators(self, name: str) -> Any:
        """An option by the name that the operators have for it, which take vocab_parallel apart."""
        shared = self.vocab_parallel
        if name == "vocab_group":
            return "" if shared is None else shared.group_name
        if name == "vocab_start":
            return -1 if shared is None or shared.start is None else shared.start
        if name == "reduce_input_grad":
            return shared is None or shared.reduce_input_grad
        if name == "reduce_dtype":
            return None if shared is None else shared.reduce_dtype
        return getattr(self, name)


_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Options, include_extras=True).items()
}


@remember  # checking takes a tenth of a small call
def parse_options(**given: Any) -> Options:
    """Checks each option by itself; what depends on the tensors is up to `memeff._call`.

    Raises:
        TypeError, ValueError: a wrong type or a bad value; the message names the option.
    """
    return Options(**{name: _PARSERS[name](name, value) for name, value in given.items()})


def show_options(function: Any, names: Iterable[str], *, of: Callable[..., Any]) -> None:
    """Makes help() and inspect show the ``**options`` of a function one by one, as ``of`` has
    them."""
    options = inspect.signature(of).parameters
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*own, *(options[n] for n in names)])


def check_accum_dtype(accum_dtype: Any, dtype: torch.dtype, name: str = "accum_dtype") -> None:
    """Check a dtype of sums of gradients of ``dtype``."""
    if _parse_accum_dtype(name, accum_dtype) is None:
        return
    plain = torch.promote_types(dtype, torch.float32)
    if accum_dtype != plain:
        raise ValueError(
            f"{name} is {accum_dtype}, expected {plain} or None (the planner's choice) for "
            f"input of dtype {dtype}"
        )


def check_torch_options(options: Any) -> None:
    if not hasattr(options, "batch_chunk_size"):
        raise TypeError(
            "options must be a torch.nn.LinearCrossEntropyOptions or None, got "
            f"{type(options).__name__}"
        )


def merge_torch_options(
    given: Mapping[str, Any], options: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """``given`` with what a torch.nn.LinearCrossEntropyOptions says.

    Its other fields need no counterpart: the planner replaces the heuristics of
    ``chunking_method``, every ``acc_policy`` is met because sums are never rougher than torch's,
    and the graph may always be retained.
    """
    check_torch_options(options)
    merged = dict(given)
    check_accum_dtype(options.acc_dtype, dtype, "options.acc_dtype")
    for name, torch_name in (("chunk_size", "batch_chunk_size"), ("accum_dtype", "acc_dtype")):
        value, torch_value = merged[name], getattr(options, torch_name)
        if value is not None and torch_value is not None:
            raise ValueError(
                f"{name} is {value} and options.{torch_name} is {torch_value}, expected only one "
                "of them"
            )
        merged[name] = torch_value if value is None else value
    return merged
