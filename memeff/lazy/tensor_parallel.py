"""Heads whose rows tensor parallelism distributes over ranks: their logits stay lazy, too.

Such a head has a weight that is a DTensor, Shard(0). What is around its forward makes a DTensor of
the hidden states and, of the product, what the model's code expects: hooks (torch's
``parallelize_module`` with ColwiseParallel) or another ``forward`` (the tensor-parallel plans of
transformers). Where code expects whole logits on every rank, lazy ones take the place of all that:
loss and statistics are those of a vocabulary that ranks share (`memeff.VocabParallel`), and nobody
gathers weight or logits.

All ranks must use their logits alike: what only one of them looks at waits for the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memeff._dtensor import is_dtensor
from memeff.lazy.carriers import carrier_of
from memeff.lazy.head import LazyHead, dtype_of
from memeff.lazy.node import Node
from memeff.lazy.source import Computation, HeadSource, unshard_owner
from memeff.lazy.state import State

__all__ = ["TensorParallelHead", "is_tensor_parallel"]

T = TypeVar("T")
_HOOKS = "torch.distributed.tensor."
_FORWARDS = "transformers.distributed."


def is_tensor_parallel(linear: nn.Module) -> bool:
    """Whether torch or transformers made this linear layer one of a tensor-parallel model."""
    if not is_dtensor(getattr(linear, "weight", None)):
        return False
    forward = linear.__dict__.get("forward")
    around = [forward] if forward else [*linear._forward_pre_hooks.values()]
    prefix = _FORWARDS if forward else _HOOKS
    return any((getattr(f, "__module__", None) or "").startswith(prefix) for f in around)


class Layouts(NamedTuple):
    input_shard: int | None  # the dimension of which hidden states are this rank's part, or None
    why_plain: str | None  # why logits cannot be lazy; None if they can


class TensorParallelHead(LazyHead):
    """A lazy head with some of the rows."""

    forward: Any = nn.Linear.forward  # what hooks or another forward are around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Lazy logits where the plain ones would be whole on every rank."""
        compiling = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        if compiling or len(args) != 1 or kwargs:
            return super().__call__(*args, **kwargs)
        reason = self._why_plain()
        if reason is not None:
            self.memeff_report.stays_dense(self.memeff_name, reason)
            return super().__call__(*args)
        weight: Any = self.weight
        bias = self.bias
        hidden = _gathered(args[0], weight.device_mesh, self._layouts().input_shard)
        dtype = dtype_of(hidden, weight, bias)
        if dtype is None or self._must_be_dense(hidden, weight):
            return super().__call__(*args)
        source = ShardedSource(self, dtype, self.memeff_report)
        state = State(source, hidden.to(dtype).contiguous(), dtype, torch.is_grad_enabled())
        return carrier_of(Node(state))

    def _why_plain(self) -> str | None:
        from torch.distributed.tensor import Shard

        weight: Any = self.weight
        if hasattr(self, "unshard"):
            return "FSDP shards it as a unit of its own, in addition to tensor parallelism"
        if not is_dtensor(weight) or weight.device_mesh.ndim != 1:
            return "its weight is not sharded over one dimension of a mesh when it is called"
        if tuple(weight.placements) != (Shard(0),):
            return f"its weight has placements {tuple(weight.placements)}, expected Shard(0)"
        return self._layouts().why_plain

    def _layouts(self) -> Layouts:
        """How hidden states come and logits are returned: what one token shows, once."""
        known: Layouts | None = self.__dict__.get("memeff_layouts")
        if known is not None:
            return known
        weight: Any = self.weight
        one = torch.zeros((1, 1, self.in_features), dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            logits = super().__call__(one)
        found = _read_layouts(logits, weight.device_mesh.size(), self.out_features)
        self.__dict__["memeff_layouts"] = found
        return found


def _read_layouts(logits: Any, ranks: int, vocab: int) -> Layouts:
    if is_dtensor(logits):
        return Layouts(None, "its logits are a DTensor (use_local_output=False)")
    *lead, classes = logits.shape
    if classes != vocab:
        return Layouts(
            None,
            f"every rank gets {classes} of {vocab} logits; with output_layouts=Replicate() they "
            "are lazy, and not gathered either",
        )
    return Layouts(lead.index(ranks) if ranks > 1 and ranks in lead else None, None)


def _gathered(hidden: Any, mesh: Any, shard: int | None) -> Tensor:
    """Hidden states that every rank has, of a DTensor or of this rank's part along a dimension."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not is_dtensor(hidden):
        if shard is None:
            return hidden
        hidden = DTensor.from_local(hidden, mesh, [Shard(shard)], run_check=False)
    replicated = hidden.redistribute(placements=[Replicate()])
    # memeff sums the gradient over the ranks.
    whole: Tensor = replicated.to_local(grad_placements=[Replicate()])
    return whole


class ShardedSource(HeadSource):
    """The rows of a head on this rank; computations get its weight and bias as DTensors."""

    sharded = True

    def parameters(self) -> list[Tensor]:
        tensors: list[Any] = super().parameters()
        return [tensor.to_local() for tensor in tensors]

    def run(self, hidden: Tensor, compute: Computation[T]) -> T:
        weight, bias = self.weight, self.bias
        if self.head.weight is not weight:  # FSDP has sharded it again
            unshard_owner(self.head)
            weight, bias = self.head.weight, self.head.bias
        else:
            self.check_unchanged()
        weight = weight.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        if compute is F.linear:
            return _whole_logits(hidden.to(self.dtype), weight, bias)  # type: ignore[return-value]
        return compute(hidden.to(self.dtype), weight, bias)


def _whole_logits(hidden: Tensor, weight: Any, bias: Any) -> Tensor:
    """The plain logits: of every rank's rows, gathered."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()]
    replicated = DTensor.from_local(hidden, weight.device_mesh, everywhere, run_check=False)
    logits: Any = F.linear(replicated, weight, bias)
    whole: Tensor = logits.redistribute(placements=everywhere).to_local()
    return whole
