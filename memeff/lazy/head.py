"""The head: an nn.Linear that returns lazy logits.

An existing module becomes one by a change of its class, so that names, ties, checkpoints and
optimizers stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memeff._backends import resolve_backend
from memeff._checks import DTYPES
from memeff._dtensor import is_dtensor
from memeff._gradients import has_tangent
from memeff._linear_map import foreign_hook, plain_forwards
from memeff._operands import autocast_dtype
from memeff.lazy.carriers import carrier_of
from memeff.lazy.node import Node
from memeff.lazy.report import Report
from memeff.lazy.source import Computation, HeadSource, runs_once
from memeff.lazy.state import State


class LazyHead(nn.Linear):
    """nn.Linear with lazy logits; before another subclass of it in a list of bases, too."""

    memeff_name: str
    memeff_report: Report

    def forward(self, input: Tensor, *, memeff_compute: Computation[Any] | None = None) -> Any:
        """Lazy logits of hidden states [..., D]; or what `memeff_compute` makes of the weights."""
        if memeff_compute is not None:
            return memeff_compute(input, self.weight, self.bias)
        weight, bias = self.weight, self.bias
        dtype = dtype_of(input, weight, bias)
        if dtype is None or self._must_be_dense(input, weight):
            return F.linear(input, weight, bias)
        source = HeadSource(self, dtype, self.memeff_report)
        state = State(source, input.to(dtype).contiguous(), dtype, torch.is_grad_enabled())
        return carrier_of(Node(state))

    def _must_be_dense(self, hidden: Tensor, weight: Tensor) -> bool:
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            return True
        if torch.compiler.is_compiling():
            return not _has_kernels(hidden.device)
        reason = self._reason(hidden, weight)
        if reason is not None:
            self.memeff_report.stays_dense(self.memeff_name, reason)
        return reason is not None

    def _reason(self, hidden: Tensor, weight: Tensor) -> str | None:
        """Why this call returns plain logits; None if it need not."""
        if not _has_kernels(hidden.device):
            return f"this build of memeff has no kernels for {hidden.device.type}"
        if type(hidden) is not Tensor and type(hidden) is not nn.Parameter:
            after = "; call memeff.patch after parallelize_module" if is_dtensor(hidden) else ""
            return f"its input is a {type(hidden).__name__}{after}"
        if hidden.device != weight.device and weight.numel() > 0:
            return f"its input is on {hidden.device}, its weight on {weight.device}"
        if torch._C._are_functorch_transforms_active():
            return "it runs in a transform of torch.func"
        if has_tangent(hidden) or has_tangent(weight) or has_tangent(self.bias):
            return "forward-mode AD goes through it"
        if "_is_replica" in self.__dict__:
            return "nn.DataParallel gathers tensors"
        if runs_once(self):
            return "FSDP1 with mixed_precision loses gradients of a unit that runs twice"
        hook = foreign_hook(self)
        return None if hook is None else f"the hook {hook} may look at its logits"


def dtype_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """That of the plain logits; None where torch would raise an error, or memeff would."""
    if not isinstance(hidden, Tensor) or hidden.dim() == 0:
        return None
    autocast = autocast_dtype(hidden.device)
    dtypes = {hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    if autocast is not None and torch.float64 not in dtypes:
        dtypes = {autocast}
    fits = hidden.shape[-1] == weight.shape[-1] or weight.numel() == 0
    if len(dtypes) > 1 or not fits or not dtypes.issubset(DTYPES):
        return None
    return dtypes.pop()


def _has_kernels(device: torch.device) -> bool:
    try:
        return device.type != "meta" and bool(resolve_backend("auto", device))
    except RuntimeError:
        return False


plain_forwards.add(LazyHead.forward)
# The first is there for a model that was pickled patched, and is unpatched in another process.
_classes: dict[tuple[type[LazyHead], type[nn.Module]], type[LazyHead]] = {
    (LazyHead, nn.Linear): LazyHead
}


def lazy_class(base: type[LazyHead], kind: type[nn.Linear]) -> type[LazyHead]:
    """The class with lazy logits for nn.Linear, or for a subclass that has its forward."""
    if kind is nn.Linear:
        _classes[base, kind] = base
    elif (base, kind) not in _classes:
        _classes[base, kind] = type(f"{base.__name__}_{kind.__name__}", (base, kind), {})
    return _classes[base, kind]


def plain_class(kind: type[LazyHead]) -> type[nn.Module] | None:
    """The class that `lazy_class` made `kind` for; None if it did not."""
    return next((plain for (_, plain), lazy in _classes.items() if lazy is kind), None)
