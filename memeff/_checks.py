"""Checks of single arguments, before anything is computed.

Every message names the argument, its value and what was expected. Wrong ranks, shapes, dtypes and
devices raise RuntimeError (as torch does), wrong Python types TypeError, bad values ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
SMALL_INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16)

_MOST = 2**63 - 1  # of the integers that operators take


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a torch.Tensor that the ops can take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        if value.layout is not torch.strided or value.is_nested:
            _refuse_layout(name, value)
        return
    # By name: importing torch.distributed.tensor costs more than the whole check.
    if any(base.__name__ == "DTensor" for base in kind.__mro__):
        raise TypeError(
            f"{name} is a DTensor, expected a plain tensor with all of its rows. A vocabulary that "
            "tensor parallelism distributes (a linear_weight that is Shard(0)) is taken by "
            "linear_cross_entropy, linear_token_statistics, linear_logprobs and linear_loss only: "
            f"pass {name}.full_tensor(), through which gradients flow. A parameter that FSDP "
            "shards is whole inside of its module's forward: call the function there, or use "
            "memeff.patch. A rank's own shard alone gives a wrong loss"
        )

    if value.layout is not torch.strided or value.is_nested:
        _refuse_layout(name, value)
    for method in ("dequantize", "to_dense", "to_tensor"):  # of quantised, sparse, masked ones
        if getattr(kind, method, None) is not getattr(Tensor, method, None):
            raise TypeError(
                f"{name} is a {kind.__qualname__}, expected a plain tensor: pass {name}.{method}()"
            )


def check_floats(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor of floats that arithmetic takes."""
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in DTYPES:
        raise RuntimeError(
            f"{name} has dtype {value.dtype}, expected one of {', '.join(map(str, DTYPES))}"
            f"{dequantised(name, value)}"
        )


def dequantised(name: str, tensor: Tensor) -> str:
    """The way out for what holds numbers in less than 16 bits."""
    if tensor.is_quantized:
        return f"; pass {name}.dequantize()"
    small = tensor.element_size() == 1 and tensor.dtype != torch.bool
    return "; of a quantised tensor, pass the dequantised one" if small else ""


def _refuse_layout(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, expected a plain one: pass torch.cat({name}.unbind()), "
            "the rows of all its parts"
        )
    raise TypeError(
        f"{name} has the layout {value.layout}, expected a dense tensor: pass {name}.to_dense()"
    )


def check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__} {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{_item(value)}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def check_int(name: str, value: object, expected: str, least: int | None = None) -> int:
    """``value``, an int that operators can take, not below ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"{name} must be an int, {expected}, got {type(value).__name__}{_item(value)}"
        )
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}, expected {expected}")
    if not -_MOST - 1 <= value <= _MOST:
        raise ValueError(f"{name} is {value}, expected {expected}, in 64 bits")
    return value  # type: ignore[return-value]


def _item(value: object) -> str:
    """The way out for a tensor or a number of numpy."""
    return ", call .item()" if hasattr(value, "item") else ""
