"""``Source``: where lazy logits get their weights from.

The weights are those that the head had when it was called. Where FSDP or ZeRO shard them they are
whole only inside the forward of the module that owns them: `run` then goes through the head's own
``__call__``, whose hooks gather the weights before and free them after, also in the backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memeff.lazy.report import Report

T = TypeVar("T")
# What runs on whole weights: hidden [..., D], weight [V, D], bias [V] or None.
Computation = Callable[[Tensor, Tensor, "Tensor | None"], T]

# Patched head -> root of its model. FSDP2 shards what no unit owns in the root.
roots: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


class Source:
    """Weights of a head, or of several that make one sum of logits."""

    dtype: torch.dtype  # of the computation: autocast's at the time of the call, or the weight's
    report: Report
    vocab: int
    requires_grad: bool
    has_bias: bool
    sharded = False  # whether ranks share the vocabulary: weights are DTensors then

    def parameters(self) -> list[Tensor]:
        """The weights as they were when the head was called; perhaps freed since then."""
        raise NotImplementedError

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        """compute(hidden, weight, bias) with whole weights of the computation's dtype."""
        raise NotImplementedError


class HeadSource(Source):
    """The weights of one head."""

    def __init__(self, head: nn.Linear, dtype: torch.dtype, report: Report) -> None:
        self.head = head
        self.dtype, self.report = dtype, report
        self.weight: Tensor = head.weight
        self.bias: Tensor | None = head.bias
        self.has_bias = self.bias is not None
        self.vocab = head.out_features  # ZeRO-3 empties the weight between calls
        self.requires_grad = self.weight.requires_grad or (
            self.bias is not None and self.bias.requires_grad
        )
        self.version = version_of(self.weight)
        self.bias_version = None if self.bias is None else version_of(self.bias)

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        def on_whole(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> T:
            whole = _whole(weight).to(self.dtype)
            return compute(
                hidden.to(self.dtype), whole, None if bias is None else _whole(bias).to(self.dtype)
            )

        head: Any = self.head
        if head._forward_pre_hooks:  # only those that gather (memeff.lazy.head)
            if hasattr(head, "unshard"):
                return _in_fsdp_unit(head, hidden, on_whole)
            result: T = head(hidden, memeff_compute=on_whole)  # ZeRO-3 replaces what it returns
            return result
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            return on_whole(hidden, weight, bias)
        if hasattr(head.weight, "full_tensor") and not hasattr(weight, "full_tensor"):
            unshard_owner(head)
            weight, bias = head.weight, head.bias
        elif type(weight) is not nn.Parameter and (unit := _fsdp1_unit(head)) is not None:
            return _in_fsdp_unit(unit, hidden, on_whole)
        else:
            self.check_unchanged()
        return on_whole(hidden, weight, bias)

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the weights are not what they were when the head was called."""
        _check_version("weight", self.weight, self.version)
        if self.bias is not None:
            _check_version("bias", self.bias, self.bias_version)
        storage = getattr(self.weight, "_local_tensor", self.weight).untyped_storage()
        if storage.size() == 0 and self.vocab > 0:
            raise RuntimeError(
                "the weight of a head was freed (by FSDP?) between the call of the head and a use "
                "of its lazy logits; compute the loss in the forward of the unit that has the "
                "head, or make the head a unit"
            )


class BiasedSource(Source):
    """Another source's weights with a bias that code added to the logits."""

    def __init__(self, source: Source, bias: Tensor) -> None:
        self.source, self.added = source, bias
        self.version = version_of(bias)
        self.dtype, self.report, self.vocab = source.dtype, source.report, source.vocab
        self.requires_grad = source.requires_grad or bias.requires_grad
        self.has_bias = True

    def parameters(self) -> list[Tensor]:
        return [*self.source.parameters(), self.added]

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        if not torch.compiler.is_compiling():
            _check_version("bias", self.added, self.version)
        # In the dtype of the computation: the plain logits are no more exact than that either.
        added = self.added.to(self.dtype)
        return self.source.run(
            hidden, lambda h, w, b: compute(h, w, added if b is None else b + added)
        )


class SummedSource(Source):
    """Two heads whose logits are added, as LoRA does: W x + B a = [W, B] [x; a]."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second = first, second
        self.dtype, self.report, self.vocab = first.dtype, first.report, first.vocab
        self.requires_grad = first.requires_grad or second.requires_grad
        self.has_bias = first.has_bias

    def parameters(self) -> list[Tensor]:
        return [*self.first.parameters(), *self.second.parameters()]

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        def with_first(hidden: Tensor, first: Tensor, bias: Tensor | None) -> T:
            def with_second(hidden: Tensor, second: Tensor, _: Tensor | None) -> T:
                return compute(hidden, torch.cat([first, second], -1), bias)

            return self.second.run(hidden, with_second)

        return self.first.run(hidden, with_first)


def _in_fsdp_unit(unit: Any, hidden: Tensor, compute: Computation[T]) -> T:
    """compute(hidden, weight, bias) inside the forward of the FSDP unit that has the head alone.

    FSDP registers hooks on the results, but may cast what it passes on. It would take the gradient
    of hidden states that it is passed for the last one of the unit, which may have other modules.
    """
    results: list[T] = []

    def keep(_: None, weight: Tensor, bias: Tensor | None) -> T:
        results.append(compute(hidden, weight, bias))
        return results[0]

    unit(None, memeff_compute=keep)
    return results[0]


def runs_once(head: nn.Module) -> bool:
    """Whether a second run of the head before the backward pass would cost its gradients.

    FSDP1 registers what reduces them on an autograd node, which it replaces when it casts.
    """
    if isinstance(head.weight, nn.Parameter):
        return False
    unit = _fsdp1_unit(head)
    return unit is not None and unit.mixed_precision.param_dtype is not None


def unshard_owner(head: nn.Module) -> None:
    """Gather the weight of a head that FSDP2 resharded after the forward of the unit it is in."""
    units: list[Any] = [m for m in _modules_above(head) if hasattr(m, "unshard")]
    if not units:
        raise RuntimeError(
            "the weight of a head was sharded between the call of the head and a use of "
            "its lazy logits, and no module of the model that was patched can unshard it"
        )
    units[-1].unshard()


def _fsdp1_unit(head: nn.Module) -> Any:
    """The FullyShardedDataParallel around a head alone, or None."""
    parent = [None, *_modules_above(head)][-1]
    return parent if hasattr(parent, "_fsdp_wrapped_module") else None


def _modules_above(head: nn.Module) -> list[nn.Module]:
    """The modules that contain a head, from the root of its model down to its parent."""

    def path(module: nn.Module) -> list[nn.Module] | None:
        if module is head:
            return []
        for child in module.children():
            below = path(child)
            if below is not None:
                return [module, *below]
        return None

    reference = roots.get(head)
    root = None if reference is None else reference()
    return (None if root is None else path(root)) or []


def version_of(tensor: Tensor) -> int | None:
    """The counter of in-place changes; None where there is none to compare."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def _check_version(what: str, tensor: Tensor, version: int | None) -> None:
    if version is not None and version != tensor._version:
        raise RuntimeError(
            f"the {what} of a head was modified in place (by an optimizer?) between the call of "
            "the head and a use of its lazy logits, which can no longer be computed; use them "
            f"before the {what} changes, or call .dense() on them before"
        )


def grad_mode(enabled: bool) -> Any:
    """A context with gradients on or off, which costs nothing where they already are."""
    if torch.is_grad_enabled() == enabled:
        return nullcontext()
    return torch.set_grad_enabled(enabled)


def without_autocast(device: torch.device) -> Any:
    """A context in which dtypes are what they are: the head's call has already cast."""
    if not is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether functions of tensors on the device are cast."""
    return (
        torch._C._is_any_autocast_enabled()
        and device.type != "meta"
        and (torch.is_autocast_enabled(device.type))
    )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
