"""Pieces of autograd that plain PyTorch functions of this package share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Result = TypeVar("Result")
Backward = TypeVar("Backward", bound=Callable[..., Any])


class CapturedResult(Exception):
    """A function depends on a differentiable result (no leaf) that was computed outside of it."""


def first_derivatives_only(backward: Backward) -> Backward:
    """Decorates the backward of an autograd.Function whose result would look like a constant to a
    second derivative: with create_graph=True it raises an error."""

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives (create_graph=True) of memeff's chunked functions are not "
                "implemented"
            )
        return backward(ctx, *gradients)

    return checked  # type: ignore[return-value]


def is_batch(upstream: Tensor) -> bool:
    """Whether it stands for several upstream gradients, as with is_grads_batched."""
    batched = torch._C._functorch.is_batchedtensor(upstream)
    return batched or torch._C._functorch.is_legacy_batchedtensor(upstream)


def refuse_vmap(*_: Any) -> None:
    """What an autograd.Function does under torch.vmap."""
    raise RuntimeError(
        "torch.vmap over a function of memeff that records gradients is not implemented; these "
        "functions take leading dimensions themselves: pass all hidden states [B, ..., D] and "
        "targets [B, ...] at once, or loop over B"
    )


def is_last_backward(upstream: Tensor) -> bool:
    """Whether the saved tensors are freed after this backward, and may be overwritten: no
    retain_graph, no tracing, and one upstream gradient."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()
    return not keeps and not is_batch(upstream)


def outside_of_graphs(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, not to be traced by torch.compile: its graph breaks here.

    Without a compiler at work it is the function itself: torch.compiler.disable would import
    torch._dynamo, which takes seconds and 80 MB.
    """
    if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
        return torch.compiler.disable(function)
    return function


class Unchanged:
    """Tensors that backward reads again, where autograd's saved tensors do not hold them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Inference tensors have no counter, and cannot be changed outside of inference mode.
        self._versions = [
            (name, tensor, tensor._version)
            for name, tensor in tensors.items()
            if not tensor.is_inference()
        ]

    def check(self) -> None:
        """Raise the RuntimeError of a saved tensor if one was modified in place since."""
        for name, tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} of shape {tuple(tensor.shape)}, which gradient computation needs, has "
                    f"been modified by an inplace operation: it is at version {tensor._version}, "
                    f"expected version {version}. Run backward before an optimizer's step, or pass "
                    "a clone"
                )


def records_tangents() -> bool:
    """Whether forward-mode AD is on at all."""
    return forward_ad._current_level >= 0


def has_tangent(value: object) -> bool:
    """Whether forward-mode AD goes through a tensor (forward_ad.make_dual, torch.func.jvp)."""
    if not records_tangents() or not isinstance(value, Tensor):
        return False
    return forward_ad.unpack_dual(value).tangent is not None


def refuse_tangents(tensors: Mapping[str, object], way_out: str = "") -> None:
    """Raise NotImplementedError where one has a tangent, which would be lost."""
    for name, tensor in tensors.items():
        if has_tangent(tensor):
            raise NotImplementedError(
                f"{name} has a tangent of forward-mode AD (torch.autograd.forward_ad, "
                f"torch.func.jvp), which memeff's kernels do not have, expected none{way_out}"
            )


def captured_leaves(output: Tensor, own: Iterable[Tensor], before: int) -> list[Tensor]:
    """Leaves that ``output`` depends on, without ``own``: parameters that a function closes over.

    Nodes of the graph are numbered in the order of their creation; ``before`` is what
    `node_number` gave before the function ran.

    Raises:
        CapturedResult: it depends on a result computed before, whose graph is not ours to consume.
    """
    owned = {id(tensor) for tensor in own}
    leaves: dict[int, Tensor] = {}
    seen = set()
    stack: list[Any] = [output.grad_fn if output.grad_fn is not None else _node_of(output)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            if id(node.variable) not in owned:
                leaves[id(node.variable)] = node.variable
        elif node._sequence_nr() < before:
            raise CapturedResult(node.name())
        else:
            stack.extend(following for following, _ in node.next_functions)
    return list(leaves.values())


def add_gradient(sums: dict[Tensor, Tensor], leaf: Tensor, gradient: Tensor | None) -> None:
    """Adds the gradient of a captured leaf to what other chunks have contributed."""
    if gradient is None:
        return
    if leaf in sums:
        sums[leaf].add_(gradient)
    else:  # autograd may hand out one that is expanded, or somebody else's memory
        sums[leaf] = gradient.clone()


def node_number(device: torch.device) -> int:
    """The number of a node of the autograd graph that is created now."""
    with torch.enable_grad():
        node: Any = torch.empty(0, device=device, requires_grad=True).clone().grad_fn
    return node._sequence_nr()


def _node_of(leaf: Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(leaf).node
