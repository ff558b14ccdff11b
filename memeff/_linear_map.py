"""What a module that makes logits computes, read from the module: a linear map, or an error.

Its weight and bias are not the whole truth where a subclass has a forward of its own, where hooks
change what goes in or comes out, or where they compute the weight (legacy ``weight_norm`` and
``spectral_norm``, pruning). The checks run at every call, as hooks and adapters come and go; for an
nn.Linear they look at its class and at a few dicts.

LoRA layers of PEFT are linear maps of more features:

    W x + b + sum_i s_i (B_i A_i x + b_i) = [W, B_1, ...] [x; s_1 A_1 x; ...] + b + sum_i s_i b_i

so that the product B A, which has the size of W, is not formed, nor W rounded to hold it. Their
dropout acts on the x in front of A_i, and needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["LinearMap", "foreign_hook", "plain_forwards", "read"]

# Forwards that compute input @ weight.T + bias (memeff.lazy adds its own).
plain_forwards: set[Any] = {nn.Linear.forward}
# Packages whose hooks on a module gather its weights; any others may change what it computes.
_GATHERING_PACKAGES = ("torch.distributed.", "deepspeed.")
_WAY_OUT = (
    "Compute what it does to the hidden states before the loss, and pass a weight that holds the "
    "rest as linear_weight; or give its logits to memeff.chunked_linear_apply's function"
)


class Adapter(NamedTuple):
    """scale (up down(dropout(x)) + bias), of rank r."""

    down: Any  # an nn.Linear: dropout(x) [..., D] -> [..., r]
    dropout: nn.Module
    up: Tensor  # [V, r]
    bias: Tensor | None
    scale: float


class LinearMap(NamedTuple):
    """x -> weight x + bias + adapters."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    adapters: tuple[Adapter, ...] = ()

    def extend(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, weight and bias of one product that includes the adapters."""
        if not self.adapters:
            return input, self.weight, self.bias
        dtype = self.weight.dtype
        inputs, weights, bias = [input], [self.weight], self.bias
        for adapter in self.adapters:
            cast = input.to(adapter.down.weight.dtype)
            features = adapter.down(adapter.dropout(cast)) * adapter.scale
            inputs.append(features.to(input.dtype))
            weights.append(adapter.up.to(dtype))
            if adapter.bias is not None:
                added = (adapter.bias * adapter.scale).to(dtype)
                bias = added if bias is None else bias + added
        return torch.cat(inputs, -1), torch.cat(weights, 1), bias


def read(module: nn.Module, name: str) -> LinearMap:
    """The map of an nn.Linear, of an nn.Embedding that is tied to one, or of PEFT's layers.

    Raises:
        TypeError: the module is of another kind.
        ValueError: it computes more than its weight and bias, or others, because of its hooks or of
            a forward that replaced its own. The messages begin with ``name``.
    """
    _check_global_hooks(name)
    kind = type(module)
    if isinstance(module, nn.Embedding):
        return _read_embedding(module, name)
    _check_hooks(module, name)
    if kind.forward in plain_forwards:
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        return LinearMap(weight, bias)
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    found = f"{owner.__module__}.{owner.__qualname__}"
    if found == "peft.tuners.lora.layer.Linear":
        return _read_lora(module, name)
    if found == "peft.utils.other.AuxiliaryTrainingWrapper" and hasattr(module, "modules_to_save"):
        return _read_saved(module, name)
    if isinstance(module, nn.Linear):
        raise TypeError(
            f"{name} is a {kind.__name__}, whose forward is not that of nn.Linear: only a weight "
            f"and a bias would be read, expected an nn.Linear or a LoRA layer of PEFT. {_WAY_OUT}. "
            "For a LoRA layer: torch.cat([x, scale * A(x)], -1) and torch.cat([W, B], 1)"
        )
    raise TypeError(
        f"{name} must be an nn.Linear, an nn.Embedding or a LoRA layer of PEFT, got "
        f"{kind.__name__}; a tensor [V, D] goes by linear_weight"
    )


# The dicts of hooks that a module has, and torch.nn.modules.module for all modules ("_global...").
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooks(owner: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The module that each hook is from, and its name."""
    for kind in _HOOKS:
        for hook in getattr(owner, prefix + kind).values():
            function = getattr(hook, "func", hook)  # of a functools.partial
            package = getattr(function, "__module__", None) or ""
            title = getattr(function, "__qualname__", None) or type(function).__name__
            yield package, f"{package}.{title}"


def foreign_hook(module: nn.Module) -> str | None:
    """A hook on the module that does not gather its weights, but may read or change what it takes
    and returns."""
    for package, title in _hooks(module):
        if not package.startswith(_GATHERING_PACKAGES):
            return title
    return None


def _check_global_hooks(name: str) -> None:
    """Hooks of all modules may change what the head computes, too. torch's own (those of its FLOP
    counter and memory trackers) only look."""
    for package, title in _hooks(torch_module, "_global"):
        if package.split(".")[0] != "torch":
            raise ValueError(
                f"{name} has the hook {title} of all modules (such as "
                "torch.nn.modules.module.register_module_forward_hook adds), which is not called "
                "where only a weight and a bias are read, expected none: remove it, or register it "
                "with the modules that it is meant for"
            )


def _check_hooks(module: nn.Module, name: str) -> None:
    hook = foreign_hook(module)
    if hook is not None:
        raise ValueError(
            f"{name} has the hook {hook}, which is not called where only a weight and a bias are "
            "read, expected no hooks: remove it. In place of torch.nn.utils.weight_norm and "
            "spectral_norm take those of torch.nn.utils.parametrizations; torch.nn.utils.prune has "
            f"remove(). {_WAY_OUT}"
        )
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        raise ValueError(
            f"{name} has a forward or __call__ that replaces that of {type(module).__name__} (as "
            "accelerate's offloading does), and that is not called where only a weight and a bias "
            f"are read, expected none. {_WAY_OUT}"
        )


def _read_embedding(module: nn.Embedding, name: str) -> LinearMap:
    """Its weight: the head that is tied to it does not run its forward. But hooks may compute the
    weight."""
    for package, title in _hooks(module):
        if package.startswith("torch.nn.utils."):
            raise ValueError(
                f"{name} has the hook {title}, which computes its weight at each of its calls, "
                "expected none: take the same function of torch.nn.utils.parametrizations, or "
                "torch.nn.utils.prune.remove()"
            )
    return LinearMap(module.weight, None)


def _read_lora(module: Any, name: str) -> LinearMap:
    if module.disable_adapters and module.merged:
        module.unmerge()  # as its forward does
    base = read(module.base_layer, f"{name}.base_layer")
    if module.disable_adapters or module.merged:
        return base
    adapters = list(base.adapters)
    bias = base.bias
    for active in module.active_adapters:
        if active not in module.lora_A:
            continue
        if active in getattr(module, "lora_variant", {}):
            variant = type(module.lora_variant[active]).__name__
            raise TypeError(
                f"{name} has the adapter {active!r} of the kind {variant}, expected LoRA without a "
                f"variant (such as DoRA). {_WAY_OUT}"
            )
        up = read(module.lora_B[active], f"{name}.lora_B[{active!r}]")
        down, dropout = module.lora_A[active], module.lora_dropout[active]
        adapters.append(Adapter(down, dropout, up.weight, up.bias, module.scaling[active]))
    return LinearMap(base.weight, bias, tuple(adapters))


def _read_saved(module: Any, name: str) -> LinearMap:
    """PEFT's copy of a layer that is trained as a whole, or the layer itself."""
    active = module.active_adapters
    if module.disable_adapters or any(one not in module._adapters for one in active) or not active:
        return read(module.original_module, f"{name}.original_module")
    return read(module.modules_to_save[active[0]], f"{name}.modules_to_save[{active[0]!r}]")
