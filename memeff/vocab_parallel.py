"""``VocabParallel``: a vocabulary that the ranks of a process group share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from memeff import _library
from memeff._checks import check_flag, check_int

__all__ = ["VocabParallel"]

T = TypeVar("T")


@dataclass(frozen=True)
class VocabParallel:
    """The rows of the classifier are distributed: each rank of a group has some consecutive ones.

    Every rank passes all tokens (the same ones) and its own rows of what has a row or an entry per
    class: ``linear_weight``, ``linear_bias``, ``weight``, class probabilities. ``target`` holds
    indices among all classes. Every rank gets the same loss and statistics, bit for bit, the
    gradients of its own rows, and the gradient of ``input`` summed over the ranks.

    Args:
        group: a torch.distributed.ProcessGroup, its name, or a DeviceMesh with one dimension; None
            for all ranks. Its backend must take the tensors of the call, as gloo does on the CPU
            and NCCL on GPUs.
        start: this rank's first class. None: the shards follow one another in the order of the
            ranks. Shards may have any sizes, also 0.
        reduce_input_grad: False leaves out the sum over the ranks: the gradient of ``input`` is
            then this rank's contribution, rounded to the dtype of ``input``, for those who sum it
            later. That of a ``logit_scale`` is summed in any case.
        reduce_dtype: of what the ranks add up for the gradient of ``input``. None: float32 (float64
            for float64 inputs). torch.bfloat16 halves the bytes, and rounds each rank's
            contribution and the sums.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError, ValueError: a group that is none, or that this rank does not belong to.
    """

    group: InitVar[Any] = None
    start: int | None = None
    reduce_input_grad: bool = True
    reduce_dtype: torch.dtype | None = None
    group_name: str = field(init=False)
    """torch.distributed's name of the group, by which the operators find it."""
    rank: int = field(init=False, repr=False, compare=False)
    """This process's, in the group."""
    ranks: int = field(init=False, repr=False, compare=False)

    def __post_init__(self, group: Any) -> None:
        ranks = process_group("VocabParallel", group)
        object.__setattr__(self, "group_name", str(ranks.group_name))
        object.__setattr__(self, "group", self.group_name)  # dataclasses.replace reads it
        object.__setattr__(self, "rank", torch.distributed.get_rank(ranks))
        object.__setattr__(self, "ranks", torch.distributed.get_world_size(ranks))
        if self.start is not None:
            check_int("start", self.start, "this rank's first class, >= 0, or None", least=0)
        check_flag("reduce_input_grad", self.reduce_input_grad)
        if self.reduce_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"reduce_dtype is {self.reduce_dtype}, expected torch.float32, torch.bfloat16 or "
                "None"
            )

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        return add_up(tensor, self.group_name)

    def gather(self, tensor: Tensor) -> Tensor:
        """[ranks, ...] what every rank gives."""
        return gather(tensor, self.group_name, self.ranks)

    def first_class(self, rows: int, device: torch.device) -> int | Tensor:
        """This rank's first class. Without ``start`` the ranks ask each other: all of them call,
        each with its number of classes."""
        if self.start is not None:
            return self.start
        sizes = self.gather(torch.full((), rows, dtype=torch.int64, device=device))
        return sizes[: self.rank].sum()

    def report_failure(self, error: Exception) -> None:
        """Lets the other ranks, which wait for this one, raise an error as well."""
        if torch.compiler.is_compiling():
            return
        # If they do not wait, the error of this rank is still the one to see.
        with contextlib.suppress(RuntimeError):
            _library.load().report_failure(self.group_name, f"{type(error).__name__}: {error}")


def agree(
    group_name: str, facts: dict[str, Any], classes: int, memory_budget: int
) -> tuple[int, int]:
    """For what is no operator of csrc: compares these facts of a call between the ranks of a group.
    The largest number of classes and the smallest budget (-1: none given) of any rank.

    Raises:
        RuntimeError: on every rank, if a fact differs, or if one has reported a failure.
    """
    text = ";".join(f"{name} is {value}" for name, value in facts.items())
    return _library.load().agree(group_name, text, classes, memory_budget)


def reporting(shared: VocabParallel | None, check: Callable[[], T]) -> T:
    """The result of checks. An error of one rank ends the call of all, which would otherwise wait
    for it until the group's timeout."""
    if shared is None:
        return check()
    try:
        return check()
    except Exception as error:
        shared.report_failure(error)
        raise


def add_up(tensor: Tensor, group_name: str) -> Tensor:
    """The sum over the ranks of a group, also in compiled code."""
    collectives = torch.ops._c10d_functional
    reduced = collectives.all_reduce(tensor, "sum", group_name)
    return cast("Tensor", collectives.wait_tensor(reduced))


def gather(tensor: Tensor, group_name: str, ranks: int) -> Tensor:
    """[ranks, ...] what every rank of a group gives, also in compiled code."""
    collectives = torch.ops._c10d_functional
    gathered = collectives.all_gather_into_tensor(tensor[None], ranks, group_name)
    return cast("Tensor", collectives.wait_tensor(gathered))


def parse_vocab_parallel(name: str, value: Any) -> VocabParallel | None:
    if value is not None and not isinstance(value, VocabParallel):
        raise TypeError(
            f"{name} must be a memeff.VocabParallel or None, got {type(value).__name__}"
            " (a process group goes into one: memeff.VocabParallel(group))"
        )
    return value


def process_group(user: str, group: Any) -> Any:
    """The process group that ``group`` stands for, None for that of all ranks."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            f"{user} needs torch.distributed, expected init_process_group to have been called"
        )
    if group is None:
        group = distributed.group.WORLD
    if hasattr(group, "get_group"):  # a DeviceMesh
        if group.ndim != 1:
            raise ValueError(
                f"group is a DeviceMesh with {group.ndim} dimensions, expected one: "
                "mesh['name of the dimension']"
            )
        group = group.get_group()
    if isinstance(group, str):
        by_name: Any = torch._C._distributed_c10d._resolve_process_group
        group = by_name(group)
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"group is {group!r}, expected a torch.distributed.ProcessGroup that this rank belongs "
            "to, a DeviceMesh with one dimension, or None"
        )
    return group
