"""The tensors of a call: checked, and in the dtype of autocast.

Targets are checked against [0, V) by the operators, which read them anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memeff._checks import (
    DTYPES,
    INDEX_DTYPES,
    SMALL_INDEX_DTYPES,
    check_floats,
    check_number,
    check_tensor,
    dequantised,
)

# What the arguments of most functions are called; errors name them.
HEAD = ("input", "linear_weight", "linear_bias")
_SHARDED = (
    ". A weight that FSDP or ZeRO shards is whole inside of its module's forward: call the "
    "function there, or use memeff.patch"
)


def check_head(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    names: tuple[str, str, str] = HEAD,
    *,
    positions: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [..., D], linear_weight [V, D] and linear_bias [V] of one dtype and device.

    They are returned as an enabled autocast wants them: cast like those of a linear layer.
    ``positions`` allows linear_weight [V, d1, ..., dK, D] and linear_bias [V, d1, ..., dK].
    """
    of_input, of_weight, of_bias = names
    check_floats(of_input, input)
    check_tensor(of_weight, linear_weight)
    if linear_bias is not None:
        check_tensor(of_bias, linear_bias)
    if input.dim() < 1:
        raise RuntimeError(f"{of_input} has 0 dimensions, expected [..., D] with at least 1")
    if linear_weight.dim() < 2 or (linear_weight.dim() > 2 and not positions):
        expected = "[V, D] or [V, d1, ..., dK, D], at least 2 dimensions" if positions else "[V, D]"
        raise RuntimeError(
            f"{of_weight} has shape {tuple(linear_weight.shape)}, expected {expected}"
            f"{_SHARDED if linear_weight.dim() == 1 else ''}"
        )
    features = input.shape[-1]
    if linear_weight.shape[-1] != features:
        raise RuntimeError(
            f"{of_weight} has shape {tuple(linear_weight.shape)}, expected {features} features "
            f"in its last dimension, as in {of_input} with shape {tuple(input.shape)}"
        )
    classes = linear_weight.shape[:-1]
    if len(classes) > 1 and input.dim() < 2:
        raise RuntimeError(
            f"{of_input} has shape {tuple(input.shape)}, expected a batch of rows [N, {features}]: "
            f"{of_weight} with shape {tuple(linear_weight.shape)} is K-dimensional"
        )
    if linear_bias is not None and linear_bias.shape != classes:
        raise RuntimeError(
            f"{of_bias} has shape {tuple(linear_bias.shape)}, expected {tuple(classes)}, "
            "one value per class"
        )
    cast_to = autocast_dtype(input.device)
    if cast_to is not None:
        input = _autocast(input, cast_to)
        linear_weight = _autocast(linear_weight, cast_to)
        linear_bias = None if linear_bias is None else _autocast(linear_bias, cast_to)
    for name, tensor in ((of_weight, linear_weight), (of_bias, linear_bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            raise RuntimeError(
                f"{name} has dtype {tensor.dtype}, expected that of {of_input}, {input.dtype}"
                f"{dequantised(name, tensor)}"
            )
        check_device(name, tensor, input, of_input)
    return input, linear_weight, linear_bias


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that an enabled autocast wants matrix products in on ``device``, else None."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; integers and float64 stay as they are, as in torch."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def check_device(name: str, tensor: Tensor, input: Tensor, of_input: str = "input") -> None:
    if tensor.device != input.device:
        raise RuntimeError(
            f"{name} is on {tensor.device}, expected the device of {of_input}, {input.device}"
        )


def check_loss_target(input: Tensor, linear_weight: Tensor, target: Tensor) -> bool:
    """Whether the target holds class probabilities [..., V, d1, ..., dK], in the shape of torch's
    logits; else it holds class indices [..., d1, ..., dK]."""
    check_tensor("target", target)
    leading, classes = input.shape[:-1], linear_weight.shape[:-1]
    indices_shape = leading + classes[1:]
    several = target.dim() == len(leading) + len(classes)
    probabilities = several and target.shape == leading + classes
    # torch also takes one row without a batch dimension together with a target of shape [1].
    one_row = len(leading) == 0 and target.shape == (1,)
    if probabilities and one_row and not target.is_floating_point():
        probabilities = False
    if not (probabilities or one_row or target.shape == indices_shape):
        raise RuntimeError(
            f"target has shape {tuple(target.shape)}, expected {tuple(indices_shape)} with class "
            f"indices or {tuple(leading + classes)} with class probabilities for input "
            f"{tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)}"
        )
    if not probabilities:
        _check_indices(target)
    elif target.dtype not in DTYPES:
        raise RuntimeError(
            f"target has dtype {target.dtype}, expected a floating dtype, as its shape "
            f"{tuple(target.shape)} is that of class probabilities"
        )
    check_device("target", target, input)
    return probabilities


def check_statistics_target(input: Tensor, linear_weight: Tensor, target: Tensor) -> None:
    """Class indices [..., d1, ..., dK], or with one dimension more for several per token."""
    check_tensor("target", target)
    tokens = input.shape[:-1] + linear_weight.shape[1:-1]
    if target.shape[: len(tokens)] != tokens or target.dim() > len(tokens) + 1:
        raise RuntimeError(
            f"target has shape {tuple(target.shape)}, expected {tuple(tokens)} with one class "
            f"index per token of input {tuple(input.shape)} and position of linear_weight "
            f"{tuple(linear_weight.shape)}, or one dimension more with several"
        )
    _check_indices(target)
    check_device("target", target, input)


def _check_indices(target: Tensor) -> None:
    if target.dtype not in INDEX_DTYPES and target.dtype not in SMALL_INDEX_DTYPES:
        raise RuntimeError(
            f"target has dtype {target.dtype}, expected torch.int64 or torch.int32, as its shape "
            f"{tuple(target.shape)} is that of class indices"
        )


def check_temperature(temperature: Any, input: Tensor) -> None:
    """A number, or one per token [...]; the values of a tensor are up to the operator."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature)
        if not 0.0 < temperature <= sys.float_info.max:
            raise ValueError(f"temperature is {temperature}, expected a finite value > 0")
        return
    check_tensor("temperature", temperature)
    tokens = input.shape[:-1]
    if temperature.shape != tokens:
        raise RuntimeError(
            f"temperature has shape {tuple(temperature.shape)}, expected a number or a tensor with "
            f"one per token, {tuple(tokens)}; .expand() makes one of temperatures per sequence"
        )
    if temperature.dtype not in DTYPES:
        raise RuntimeError(
            f"temperature has dtype {temperature.dtype}, expected a floating dtype such as "
            "torch.float32"
        )
    if temperature.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "temperature requires grad, expected one that does not: detach it, or pass "
            "its reciprocal as logit_scale, a tensor of shape ()"
        )
    check_device("temperature", temperature, input)


def check_classes(linear_weight: Tensor) -> None:
    """At least one class: statistics of no logits do not exist."""
    if linear_weight.shape[0] == 0:
        raise RuntimeError(
            f"linear_weight has shape {tuple(linear_weight.shape)}, expected at least one class: "
            f"statistics of no logits do not exist{_SHARDED}"
        )


def check_weights(
    name: str, weights: Tensor, shape: tuple[int, ...], per: str, input: Tensor
) -> None:
    """Factors of the loss, one per class or token."""
    check_tensor(name, weights)
    if weights.shape != shape:
        raise RuntimeError(
            f"{name} has shape {tuple(weights.shape)}, expected {tuple(shape)}, one value per {per}"
        )
    if weights.dtype not in DTYPES:
        raise RuntimeError(
            f"{name} has dtype {weights.dtype}, expected a floating dtype such as torch.float32 or "
            "that of input"
        )
    check_device(name, weights, input)


def check_per_token(
    tensors: Mapping[str, Any],
    input: Tensor,
    of_input: str = "input",
    positions: tuple[int, ...] = (),
) -> None:
    """Tensors [..., d1, ..., dK, *any shape]: leading dimensions of ``input``, then positions."""
    tokens = (*input.shape[:-1], *positions)
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.shape[: len(tokens)] != tokens:
            of_weight = " and the positions of linear_weight" if positions else ""
            raise RuntimeError(
                f"{name} has shape {tuple(tensor.shape)}, expected one that begins with "
                f"{tokens}, the leading dimensions of {of_input}{of_weight}"
            )


def parse_num_items(num_items: Any, device: torch.device) -> Tensor:
    """A denominator as a 0-d tensor on ``device``.

    0 becomes 1: a batch in which nothing counts has the loss 0 and does not stop training. Negative
    numbers and nan are errors wherever they can be seen without waiting for the device.
    """
    if isinstance(num_items, Tensor):
        check_tensor("num_items", num_items)
        if num_items.numel() != 1 or num_items.is_complex() or num_items.dtype == torch.bool:
            raise RuntimeError(
                f"num_items has shape {tuple(num_items.shape)} and dtype {num_items.dtype}, "
                "expected one real number"
            )
        items = num_items.detach().reshape(())
        looks = items.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and type(items) is Tensor:
            _check_num_items(items.item())
        items = items.to(device)
        return items.masked_fill(items == 0, 1)
    if not isinstance(num_items, (int, float, torch.SymInt)) and hasattr(num_items, "item"):
        if getattr(num_items, "size", 1) != 1:
            raise RuntimeError(f"num_items has shape {num_items.shape}, expected one real number")
        num_items = num_items.item()  # a number of numpy
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float, torch.SymInt)):
        raise TypeError(
            f"num_items must be a number or a tensor with one, got {type(num_items).__name__}"
        )
    number: Any = num_items
    _check_num_items(number)
    return torch.full((), float(number) if number > 0 else 1.0, dtype=torch.float64, device=device)


def _check_num_items(num_items: float) -> None:
    if not 0 <= num_items <= sys.float_info.max:
        raise ValueError(
            f"num_items is {num_items}, expected the number of items to divide the loss by, >= 0"
        )
