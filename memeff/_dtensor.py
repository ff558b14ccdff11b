"""DTensors as operands: a classifier whose rows tensor parallelism distributes, Shard(0), is a
vocabulary that ranks share (`memeff.VocabParallel`).

The operators take local tensors; gradients come back with the placements of what they belong to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memeff.vocab_parallel import VocabParallel

__all__ = ["is_dtensor", "local_operands"]

# Operands with a row or an entry per class, which are sharded as the weight is.
_PER_CLASS = ("linear_bias", "weight")


def is_dtensor(value: object) -> bool:
    # By name: importing torch.distributed.tensor costs more than all checks of a call.
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        return False
    return any(base.__name__ == "DTensor" for base in kind.__mro__)


def local_operands(
    operands: dict[str, Any], given: VocabParallel | None
) -> tuple[dict[str, Any], VocabParallel]:
    """The local tensors of one call, and the ranks that share its vocabulary.

    ``operands["linear_weight"]`` is a DTensor. Others may be plain tensors, which are then the same
    on every rank; hidden states that are sharded (sequence parallelism) are gathered.

    Raises:
        RuntimeError: placements that are no sharded vocabulary.
        ValueError: vocab_parallel is given, too, for another group.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    head: Any = operands["linear_weight"]
    dimension = _vocabulary_dimension(head)
    mesh = head.device_mesh
    shared = VocabParallel(mesh.get_group(dimension))
    if given is not None:
        # The mesh decides everything else than reduce_dtype.
        others = (given.group_name, given.start, given.reduce_input_grad)
        if others != (shared.group_name, None, True):
            raise ValueError(
                f"vocab_parallel is {given}, expected None or {shared}, with any reduce_dtype: "
                "linear_weight is a DTensor on that mesh"
            )
        shared = given
    everywhere = [Replicate()] * mesh.ndim
    by_class = list(head.placements)
    local = dict(operands)
    for name, value in operands.items():
        if value is None or not isinstance(value, Tensor):
            continue
        if not is_dtensor(value):
            if name in _PER_CLASS:
                raise RuntimeError(
                    f"{name} is a plain tensor and linear_weight a DTensor, expected a DTensor on "
                    "the same mesh for both, for example from "
                    "torch.distributed.tensor.distribute_tensor"
                )
            continue
        tensor: Any = value
        if tensor.device_mesh != mesh:
            raise RuntimeError(
                f"{name} is on {tensor.device_mesh}, expected the mesh of linear_weight, {mesh}"
            )
        placements = by_class if name in ("linear_weight", *_PER_CLASS) else everywhere
        if name == "target" and value.is_floating_point():
            classes = operands["input"].dim() - 1
            placements = [Shard(classes) if p == Shard(0) else p for p in by_class]
        of_gradient = list(placements)
        if tuple(tensor.placements) != tuple(placements):
            if name == "input" and _scatters(tensor, dimension, shared):
                # A reduce-scatter instead of the all-reduce, of which a rank needs its part alone.
                of_gradient[dimension] = Partial()
                shared = VocabParallel(
                    mesh.get_group(dimension),
                    reduce_input_grad=False,
                    reduce_dtype=shared.reduce_dtype,
                )
            tensor = tensor.redistribute(placements=placements)
        local[name] = tensor.to_local(grad_placements=of_gradient)
    return local, shared


def _scatters(hidden: Any, dimension: int, shared: VocabParallel) -> bool:
    """Whether what a rank contributes to the gradient of sharded hidden states may be added up as
    the operator returns it: rounded to nothing, or to what the ranks are asked to add up."""
    sharded: bool = hidden.placements[dimension].is_shard()
    return sharded and hidden.dtype in (torch.float64, shared.reduce_dtype or torch.float32)


def _vocabulary_dimension(head: Any) -> int:
    """The dimension of the mesh over which the rows of the classifier are sharded."""
    from torch.distributed.tensor import Shard

    mesh, sharded = head.device_mesh, []
    for dimension, placement in enumerate(head.placements):
        if placement == Shard(0) and type(placement) is Shard:
            sharded.append(dimension)
        elif mesh.size(dimension) > 1:
            sharded = []
            break
    if len(sharded) != 1:
        raise RuntimeError(
            f"linear_weight is a DTensor with placements {tuple(head.placements)} on {mesh}, "
            "expected Shard(0) on one dimension and a size of 1 of the others. A parameter that "
            "FSDP shards, alone or on top of tensor parallelism, is gathered inside of its "
            "module's forward: call the function there, or use memeff.patch; or pass "
            "linear_weight.full_tensor(), through which gradients flow"
        )
    return sharded[0]
