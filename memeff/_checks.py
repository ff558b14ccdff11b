"""Checks of the arguments of ``linear_cross_entropy``, all before anything is computed.

Every message names the argument, its value and what was expected. Wrong ranks, shapes, dtypes and
devices raise RuntimeError (as torch does), wrong Python types TypeError, bad values ValueError.
Targets are checked against [0, V) by the op, which reads them anyway.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
SMALL_INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16)
REDUCTIONS = ("mean", "sum", "none")


class Geometry(NamedTuple):
    """What the shapes of a call mean; see :func:`check_shapes`."""

    leading: torch.Size  # of input, before D
    positions: torch.Size  # d1..dK of a K-dimensional linear_weight, else empty
    vocab: int
    probabilities: bool  # class-probability targets instead of indices


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a torch.Tensor that the ops can take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        return
    # By name: importing torch.distributed.tensor costs more than the whole check.
    if any(base.__name__ == "DTensor" for base in kind.__mro__):
        raise TypeError(
            f"{name} is a DTensor, expected a plain tensor with all of its rows. A vocabulary that "
            "tensor parallelism distributes (Shard(0)) is not supported by this function: pass "
            f"{name}.full_tensor(), through which gradients flow. A parameter that FSDP shards is "
            "whole inside of its module's forward: call the function there, or use memeff.patch. "
            "A rank's own shard alone gives a wrong loss"
        )


def check_dtypes(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
) -> None:
    """Check the floating dtypes and the devices of everything except the target."""
    if input.dtype not in DTYPES:
        raise RuntimeError(
            f"input has dtype {input.dtype}, expected one of {', '.join(map(str, DTYPES))}"
        )
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(
                f"{name} has dtype {tensor.dtype}, expected that of input, {input.dtype}"
            )
    for name, tensor in (("weight", weight), ("token_weight", token_weight)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise RuntimeError(
                f"{name} has dtype {tensor.dtype}, expected a floating dtype such as "
                "torch.float32 or that of input"
            )


def check_device(device: torch.device, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.device != device:
        raise RuntimeError(f"{name} is on {tensor.device}, expected the device of input, {device}")


def check_shapes(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
) -> Geometry:
    """Check all shapes and the dtype of the target.

    input [..., D], linear_weight [V, d1, ..., dK, D] with K >= 0, linear_bias [V, d1, ..., dK],
    weight [V], target and token_weight [..., d1, ..., dK] or a floating target in the shape of the
    logits, [..., V, d1, ..., dK].
    """
    if input.dim() < 1:
        raise RuntimeError("input has 0 dimensions, expected [..., D] with at least 1")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"linear_weight has shape {tuple(linear_weight.shape)}, expected [V, D] or "
            "[V, d1, ..., dK, D], at least 2 dimensions"
        )
    features = input.shape[-1]
    if linear_weight.shape[-1] != features:
        raise RuntimeError(
            f"linear_weight has shape {tuple(linear_weight.shape)}, expected {features} features "
            f"in its last dimension, as in input with shape {tuple(input.shape)}"
        )
    leading, classes = input.shape[:-1], linear_weight.shape[:-1]
    vocab, positions = classes[0], classes[1:]
    if positions and len(leading) == 0:
        raise RuntimeError(
            f"input has shape {tuple(input.shape)}, expected a batch of rows [N, {features}]: "
            f"linear_weight with shape {tuple(linear_weight.shape)} is K-dimensional"
        )
    if linear_bias is not None and linear_bias.shape != classes:
        raise RuntimeError(
            f"linear_bias has shape {tuple(linear_bias.shape)}, expected {tuple(classes)}, "
            "one value per class"
        )
    if weight is not None and weight.shape != (vocab,):
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)}, expected ({vocab},), one value per class"
        )

    indices_shape = leading + positions
    # As in torch, a target in the shape of the logits holds probabilities.
    probabilities = target.shape == leading + classes
    # torch also takes one row without a batch dimension together with a target of shape [1].
    if probabilities and len(leading) == 0 and vocab == 1 and not target.is_floating_point():
        probabilities = False
    one_row = len(leading) == 0 and target.shape == (1,)
    if not (probabilities or one_row or target.shape == indices_shape):
        raise RuntimeError(
            f"target has shape {tuple(target.shape)}, expected {tuple(indices_shape)} with class "
            f"indices or {tuple(leading + classes)} with class probabilities for input "
            f"{tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)}"
        )
    if probabilities:
        if target.dtype not in DTYPES:
            raise RuntimeError(
                f"target has dtype {target.dtype}, expected a floating dtype, as its shape "
                f"{tuple(target.shape)} is that of class probabilities"
            )
    elif target.dtype not in INDEX_DTYPES and target.dtype not in SMALL_INDEX_DTYPES:
        raise RuntimeError(
            f"target has dtype {target.dtype}, expected torch.int64 or torch.int32, as its shape "
            f"{tuple(target.shape)} is that of class indices"
        )
    if token_weight is not None and token_weight.shape != indices_shape:
        raise RuntimeError(
            f"token_weight has shape {tuple(token_weight.shape)}, expected {tuple(indices_shape)}, "
            "one value per token"
        )
    return Geometry(leading, positions, vocab, probabilities)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_numbers(
    label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float
) -> None:
    """Check the ranges of the coefficients of the loss; NaN is outside of every range."""
    check_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a value in [0, 1]")
    if softcap is not None:
        check_number("softcap", softcap)
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap is {softcap}, expected a finite value > 0, or None for none")
    check_number("logit_scale", logit_scale)
    # (Not math.isfinite: torch.compile traces no symbolic numbers through it.)
    if logit_scale == 0.0 or not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}, expected a finite value other than 0")
    check_number("z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss}, expected a finite coefficient >= 0")


def check_skip_mass(skip_mass: float) -> None:
    check_number("skip_mass", skip_mass)
    if not 0.0 <= skip_mass < 1.0:
        raise ValueError(f"skip_mass is {skip_mass}, expected a probability in [0, 1)")


def check_ignore_index(ignore_index: int | None, probabilities: bool) -> None:
    if ignore_index is None:
        return
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int or None, got {type(ignore_index).__name__}")
    if probabilities:
        raise RuntimeError(
            f"ignore_index is {ignore_index}, expected None: target holds class probabilities, "
            "which have no index to ignore"
        )


def check_shift(shift: bool | int, leading: torch.Size) -> None:
    if not isinstance(shift, int):
        raise TypeError(f"shift must be a bool or an int, got {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift is {shift}, expected the number of positions ahead, >= 0")
    if shift and len(leading) == 0:
        raise ValueError(
            f"shift is {shift}, expected 0 for an input of one row: there is no time dimension"
        )


def check_differentiability(
    target: Tensor, weight: Tensor | None, token_weight: Tensor | None, probabilities: bool
) -> bool:
    """Whether only the reference computes a wanted gradient; an error where nothing does."""
    if not torch.is_grad_enabled():
        return False
    if token_weight is not None and token_weight.requires_grad:
        raise RuntimeError(
            "token_weight requires grad, expected one that does not: detach it, or multiply the "
            'result of reduction="none" by it'
        )
    weight_grad = weight is not None and weight.requires_grad
    if weight_grad and not probabilities:
        raise RuntimeError(
            "weight requires grad, expected one that does not: as in torch, the loss of class "
            "indices is not differentiable with respect to the class weights"
        )
    return weight_grad or target.requires_grad
