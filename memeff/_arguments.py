"""From what a caller may write to what the ops take: memory sizes, denominators, backends."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from memeff import _library
from memeff._checks import check_choice, check_device

# Backends with kernels, and the type of the devices whose tensors they take.
DEVICE_TYPES = {"cpu": "cpu", "cuda": "cuda"}
_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_REMEDIES = {"cuda": " (type: python -m memeff.diagnostics)"}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

NO_MEMORY_BUDGET = -1


def parse_memory_budget(memory_budget: int | str | None) -> int:
    """Bytes of ``memory_budget``: an int, or a number with B, KB, MB, GB (powers of 1000) or KiB,
    MiB, GiB (powers of 1024); -1 for None."""
    if memory_budget is None:
        return NO_MEMORY_BUDGET
    if isinstance(memory_budget, str):
        match = _SIZE.fullmatch(memory_budget)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"memory_budget is {memory_budget!r}, expected bytes as an int or a string such as "
                '"64MiB" or "1.5GB"'
            )
        return int(float(match[1]) * unit)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, torch.SymInt)):
        raise TypeError(
            f"memory_budget must be an int, a str or None, got {type(memory_budget).__name__}"
        )
    if memory_budget < 0:
        raise ValueError(f"memory_budget is {memory_budget}, expected a number of bytes >= 0")
    return memory_budget


def merge_torch_options(
    options: Any,
    chunk_size: int | None,
    accum_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> tuple[int | None, torch.dtype | None]:
    """(chunk_size, accum_dtype) with what a torch.nn.LinearCrossEntropyOptions says about them.

    Its other fields need no counterpart: the planner replaces the heuristics of
    ``chunking_method``, every ``acc_policy`` is met because sums are never rougher than torch's,
    and the graph may always be retained.
    """
    if options is None:
        return chunk_size, accum_dtype
    if not hasattr(options, "batch_chunk_size"):
        raise TypeError(
            "options must be a torch.nn.LinearCrossEntropyOptions or None, got "
            f"{type(options).__name__}"
        )
    check_accum_dtype(options.acc_dtype, dtype, "options.acc_dtype")
    return (
        _only_one("chunk_size", chunk_size, "batch_chunk_size", options.batch_chunk_size),
        _only_one("accum_dtype", accum_dtype, "acc_dtype", options.acc_dtype),
    )


def _only_one(name: str, value: Any, torch_name: str, torch_value: Any) -> Any:
    if value is not None and torch_value is not None:
        raise ValueError(
            f"{name} is {value} and options.{torch_name} is {torch_value}, expected only one of "
            "them"
        )
    return torch_value if value is None else value


def parse_chunk_size(chunk_size: int | None) -> int:
    """Tokens per chunk, 0 when the planner may choose."""
    if chunk_size is None:
        return 0
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, torch.SymInt)):
        raise TypeError(f"chunk_size must be an int or None, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected a number of tokens >= 1")
    return chunk_size


def check_accum_dtype(
    accum_dtype: torch.dtype | None, dtype: torch.dtype, name: str = "accum_dtype"
) -> None:
    """Check a dtype of sums of gradients of ``dtype``."""
    if accum_dtype is None:
        return
    if not isinstance(accum_dtype, torch.dtype):
        raise TypeError(
            f"{name} must be a torch.dtype or None, got {type(accum_dtype).__name__} "
            f"{accum_dtype!r}"
        )
    plain = torch.promote_types(dtype, torch.float32)
    if accum_dtype != plain:
        raise ValueError(
            f"{name} is {accum_dtype}, expected {plain} or None (the planner's choice) for "
            f"input of dtype {dtype}"
        )


def parse_num_items(
    num_items: int | Tensor | None, reduction: str, device: torch.device
) -> Tensor | None:
    """The denominator of the mean as a 0-d tensor on ``device``."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f'num_items is given with reduction={reduction!r}, expected reduction="mean", '
            "whose denominator it is"
        )
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.is_complex() or num_items.dtype == torch.bool:
            raise RuntimeError(
                f"num_items has shape {tuple(num_items.shape)} and dtype {num_items.dtype}, "
                "expected a 0-d tensor with a number, or an int"
            )
        check_device(device, "num_items", num_items)
        # A value on the host can be looked at; on a device that would wait for it.
        if type(num_items) is Tensor and device.type == "cpu" and not torch.compiler.is_compiling():
            _check_positive(num_items.item())
        return num_items
    if isinstance(num_items, bool) or not isinstance(num_items, (int, torch.SymInt)):
        raise TypeError(f"num_items must be an int or a 0-d tensor, got {type(num_items).__name__}")
    _check_positive(num_items)
    return torch.full((), num_items, dtype=torch.int64, device=device)


def _check_positive(num_items: float) -> None:
    if num_items <= 0:
        raise ValueError(
            f"num_items is {num_items}, expected the number of items to divide the loss by, > 0"
        )


def resolve_backend(backend: str, device: torch.device, needs_reference: bool) -> str:
    """The backend that computes: one of DEVICE_TYPES, or "reference".

    ``needs_reference``: a gradient is wanted that only the reference has (class probabilities or
    class weights that require grad); "auto" then takes it.
    """
    check_choice("backend", backend, ("auto", *DEVICE_TYPES, "reference"))
    if backend == "reference":
        return backend
    # Tensors without data are computed by fake kernels, which all backends share.
    device_type = "cpu" if device.type == "meta" and backend == "auto" else device.type
    resolved = device_type if backend == "auto" else backend
    if resolved not in DEVICE_TYPES or (
        resolved == "cuda" and not _library.load().build_info()["cuda"]
    ):
        raise RuntimeError(
            f"input is on {device} and backend is {backend!r}: this build of memeff has no kernels "
            f"for {resolved}{_REMEDIES.get(resolved, '')}. backend='reference' runs plain PyTorch "
            "on any device (and stores the logits)"
        )
    if device_type not in (DEVICE_TYPES[resolved], "meta"):
        raise RuntimeError(
            f"input is on {device}, expected a {DEVICE_TYPES[resolved]} tensor for "
            f"backend={backend!r}"
        )
    if needs_reference:
        if backend != "auto":
            raise RuntimeError(
                f"backend is {backend!r}, expected 'auto' or 'reference': target or weight "
                "requires grad, and only the reference (which stores the logits) computes "
                "gradients for them"
            )
        return "reference"
    return resolved


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that an enabled autocast wants matrix products in on ``device``, else None."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; integers and float64 stay as they are, as in torch."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor
