"""The device of the tensors is current while an operator runs, whichever the caller's is.

On a GPU a plan, a workspace and launches belong to the current device. Here the operators of the
emulated build meet a device type with two devices that only reports which is current.
"""

from __future__ import annotations

import types
from typing import Any

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(
    emulated.missing() is not None, reason=f"no emulator: {emulated.missing()}"
)

TOKENS, FEATURES, VOCAB = 3, 8, 5
SHAPES = {
    "input": (TOKENS, FEATURES),
    "linear_weight": (VOCAB, FEATURES),
    "gradient": (VOCAB, FEATURES),
    "scale": (1,),
    "grad_loss": (1,),
}
# Values of options; others get NEUTRAL.
VALUES = {"reduction": "mean", "input_grad": True, "logit_scale": 1.0, "memory_budget": -1}
NEUTRAL = {"str": "", "bool": False, "float": 0.0, "int": 0, "SymInt": 0}
OPERATORS = (
    "linear_cross_entropy_forward",
    "linear_cross_entropy_backward",
    "linear_token_statistics_forward",
    "linear_token_statistics_backward",
    "linear_loss_gradients",
    "scale_gradient",
    "scale_gradient_",
)


@pytest.fixture(autouse=True)
def _device_module() -> None:
    """torch asks a Python module of the device type to initialise and seed it."""
    emulated.load()
    if not hasattr(torch, "privateuseone"):
        module = types.ModuleType("torch.privateuseone")
        module._lazy_init = lambda: None  # type: ignore[attr-defined]
        module.is_available = lambda: False  # type: ignore[attr-defined]
        module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
        module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
        torch._register_device_module("privateuseone", module)


def arguments(
    schema: torch.FunctionSchema, device: torch.device
) -> tuple[list[Any], dict[str, Any]]:
    """For any operator: a tensor for each that it must have, and neutral options."""
    positional: list[Any] = []
    options: dict[str, Any] = {}
    for argument in schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only:
            options[argument.name] = VALUES.get(argument.name, NEUTRAL.get(kind))
        elif argument.name == "target":
            positional.append(torch.empty(TOKENS, dtype=torch.int64, device=device))
        elif "Optional" in kind:
            positional.append(None)
        else:
            shape = SHAPES.get(argument.name, (TOKENS,))
            positional.append(torch.empty(shape, dtype=torch.float64, device=device))
    return positional, options


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("index", [0, 1])
def test_the_tensors_device_is_current(name: str, index: int) -> None:
    op = getattr(torch.ops.memeff_emulated, name).default
    positional, options = arguments(op._schema, torch.device("privateuseone", index))
    with pytest.raises(ValueError, match=f"current device {index}"):
        op(*positional, **options)
    # And no longer afterwards.
    assert torch.empty(0, device="privateuseone").device.index == 0


def test_every_operator_is_here() -> None:
    library = "memeff_emulated::"
    names = torch._C._dispatch_get_all_op_names()
    defined = {name.removeprefix(library) for name in names if name.startswith(library)}
    assert defined == {*OPERATORS, "differentiate_chunk"}  # the latter is Python's
