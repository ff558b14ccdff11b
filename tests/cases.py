"""Test cases: what to compute (Case), on which tensors (Inputs), and three ways to compute it.

`run_memeff` calls the library; `run_plain` is eager PyTorch built on
torch.nn.functional.cross_entropy, with no line in common with the package (not even
memeff.reference, which is itself under test); on float64 copies of the inputs it is the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import Comparison, Result, assert_all_hold, compare_results

import memeff
from memeff._options import LossOptions, Options
from memeff.ops import option_names

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Strides. Equal rows of w would make every logit of a token equal and its dX zero but for rounding.
WEIGHT_LAYOUTS = ("contiguous", "transposed", "sliced", "padded", "expanded_features")
INPUT_LAYOUTS = (*WEIGHT_LAYOUTS, "expanded_tokens")


@dataclass(frozen=True)
class Case:
    """One call. Leading dimensions `lead` stand for the tokens; [] is a single unbatched row."""

    lead: tuple[int, ...]
    features: int
    vocab: int
    dtype: torch.dtype = torch.float32
    reduction: str = "mean"
    bias: bool = False
    class_weights: bool = False
    label_smoothing: float = 0.0
    probabilities: bool = False
    ignored: float = 0.0  # share of the tokens
    ignore_index: int | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    token_weight: bool = False
    num_items: int | None = None
    shift: int = 0
    spread: float = 3.0  # standard deviation of the logits
    target_dtype: torch.dtype = torch.int64
    input_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    memory_budget: int | str | None = None
    chunk_size: int | None = None
    accum_dtype: torch.dtype | None = None
    differentiate: tuple[str, ...] = ("dx", "dw", "db")
    seed: int = 0

    @property
    def kept_ignore_index(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index

    def __str__(self) -> str:
        """Only what differs from the defaults, for test ids and failure messages."""
        parts = ["x".join(map(str, (*self.lead, self.features, self.vocab)))]
        for name, default in Case((1,), 1, 1).__dict__.items():
            value = getattr(self, name)
            if name not in ("lead", "features", "vocab") and value != default:
                parts.append(f"{name}={value}".replace("torch.", ""))
        return "-".join(parts)


@dataclass
class Inputs:
    """x [*lead, D], w [V, D], y [*lead] or [*lead, V], b [V], class_weights [V], token_weight
    [*lead], and the upstream gradient of the loss.
    """

    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    b: torch.Tensor | None
    class_weights: torch.Tensor | None
    token_weight: torch.Tensor | None
    upstream: torch.Tensor

    def to(self, device: str) -> Inputs:
        """The same tensors on `device`, with the same strides where it is another one."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Inputs(*(move(getattr(self, name)) for name in self.__dataclass_fields__))

    def in_float64(self) -> Inputs:
        def double(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

        return Inputs(*(double(getattr(self, name)) for name in self.__dataclass_fields__))


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides; the expanded layouts repeat the first row or column."""
    if layout == "contiguous" or tensor.dim() < 2:
        return tensor
    if layout == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # every second entry of a wider row, so the last stride is 2
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "padded":  # a gap between rows, the first off the allocation's alignment
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
        wide[..., 3:] = tensor
        return wide[..., 3:]
    if layout == "expanded_features":
        return tensor[..., :1].expand(tensor.shape)
    if layout == "expanded_tokens":
        return tensor[..., :1, :].expand(tensor.shape)
    raise ValueError(f"layout {layout!r}: expected one of {INPUT_LAYOUTS}")


# Each option alone, then together; the one list that tests go through. Keys are fields of Case.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignored": {"ignored": 0.3},
    "ignore_index_in_range": {"ignore_index": 3},
    "bias": {"bias": True},
    "class_weights": {"class_weights": True, "ignored": 0.2},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_one": {"label_smoothing": 1.0},
    "smoothing_class_weights": {"label_smoothing": 0.2, "class_weights": True, "ignored": 0.2},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.37},
    "negative_scale": {"logit_scale": -1.5},
    "z_loss": {"z_loss": 1e-2, "ignored": 0.2},
    "z_loss_class_weights": {"z_loss": 1e-2, "class_weights": True, "ignored": 0.3},
    "token_weight": {"token_weight": True, "ignored": 0.2},
    "int32_targets": {"target_dtype": torch.int32, "ignored": 0.2},
    "bias_softcap_scale": {"bias": True, "softcap": 4.0, "logit_scale": 1.7},
    "softcap_smoothing": {"softcap": 4.0, "label_smoothing": 0.1, "class_weights": True},
    "probabilities": {"probabilities": True},
    "probabilities_all": {
        "probabilities": True, "bias": True, "class_weights": True, "label_smoothing": 0.1,
        "softcap": 6.0, "logit_scale": 0.8, "z_loss": 1e-3, "token_weight": True,
    },
    "everything": {
        "bias": True, "class_weights": True, "label_smoothing": 0.1, "softcap": 6.0,
        "logit_scale": 1.3, "z_loss": 1e-2, "token_weight": True, "ignored": 0.3,
        "ignore_index": -7,
    },
}  # fmt: skip


def op_options(op: Any, **given: Any) -> dict[str, Any]:
    """The keyword arguments of an op: of ``given`` those that it has, and else the defaults; of the
    flags that say which gradients are wanted, all."""
    defaults = dict.fromkeys(("input_grad", "weight_grad", "bias_grad"), True) | given
    names = option_names(op)
    return {n: defaults[n] if n in defaults else Options().of_operators(n) for n in names}


def make_inputs(case: Case) -> Inputs:
    """Random tensors for `case`, the same for the same seed."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * std).to(case.dtype)

    x = lay_out(normal(*case.lead, case.features), case.input_layout)
    w = normal(case.vocab, case.features, std=case.spread / math.sqrt(max(1, case.features)))
    w = lay_out(w, case.weight_layout)
    if case.probabilities:
        y = torch.randn((*case.lead, case.vocab), generator=g, dtype=torch.float64).softmax(-1)
        y = y.to(case.dtype)
    else:
        y = torch.randint(case.vocab, case.lead, generator=g, dtype=case.target_dtype)
        # An ignore_index inside [0, V) ignores tokens by itself; others are set on purpose.
        y[torch.rand(case.lead, generator=g) < case.ignored] = case.kept_ignore_index
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    lead = list(case.lead)
    if case.shift:
        lead[-1] -= case.shift
    upstream_shape = lead if case.reduction == "none" else []
    return Inputs(
        x=x,
        w=w,
        y=y,
        b=normal(case.vocab) if case.bias else None,
        class_weights=torch.rand(case.vocab, generator=g, dtype=wide) + 0.1
        if case.class_weights
        else None,
        token_weight=torch.rand(case.lead, generator=g, dtype=wide) + 0.1
        if case.token_weight
        else None,
        # Neither 1 nor uniform: peers got exactly that wrong.
        upstream=torch.randn(upstream_shape, generator=g, dtype=wide) + 2.0,
    )


def _differentiated(
    case: Case, loss: torch.Tensor, inputs: Inputs, leaves: dict[str, Any]
) -> Result:
    names = [name for name in case.differentiate if leaves.get(name) is not None]
    if not names:
        return Result(loss.detach())
    upstream = inputs.upstream.to(loss.dtype)
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names], upstream)
    return Result(loss.detach(), **dict(zip(names, gradients, strict=True)))


def _leaves(case: Case, inputs: Inputs) -> dict[str, torch.Tensor | None]:
    """Fresh leaves with the strides of the inputs; `case.differentiate` require gradients."""
    leaves: dict[str, torch.Tensor | None] = {}
    for name, tensor in (("dx", inputs.x), ("dw", inputs.w), ("db", inputs.b)):
        leaves[name] = (
            None if tensor is None else tensor.detach().requires_grad_(name in case.differentiate)
        )
    return leaves


def plain_loss(
    case: Case, inputs: Inputs, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None
) -> torch.Tensor:
    """Eager PyTorch with the float32 upcast; float64 in float64."""
    z = F.linear(x, w, b)
    z = z if z.dtype == torch.float64 else z.float()
    y, token_weight = inputs.y, inputs.token_weight
    if case.shift:
        z, y = z[..., : -case.shift, :], y[..., case.shift :]
        token_weight = None if token_weight is None else token_weight[..., case.shift :]
    z = z * case.logit_scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    lead = z.shape[:-1]
    rows = z.reshape(-1, case.vocab)
    class_weights = None if inputs.class_weights is None else inputs.class_weights.to(z.dtype)
    if case.probabilities:
        targets = y.reshape(-1, case.vocab).to(z.dtype)
        counted = torch.ones(len(rows), dtype=torch.bool, device=z.device)
        denominator = torch.tensor(len(rows), dtype=z.dtype, device=z.device)
    else:
        targets = y.reshape(-1).long()
        counted = targets != case.kept_ignore_index
        w_y = z.new_ones(case.vocab) if class_weights is None else class_weights
        denominator = w_y[targets.where(counted, 0)].where(counted, 0).sum()
    ignoring = {} if case.probabilities else {"ignore_index": case.kept_ignore_index}
    ce = F.cross_entropy(
        rows,
        targets,
        class_weights,
        reduction="none",
        label_smoothing=case.label_smoothing,
        **ignoring,
    )
    z_term = (case.z_loss * torch.logsumexp(rows, -1) ** 2).where(counted, 0)
    if token_weight is not None:
        flat = token_weight.reshape(-1).to(z.dtype)
        ce, z_term = ce * flat, z_term * flat
    if case.reduction == "none":
        return (ce + z_term).view(lead)
    if case.reduction == "sum":
        return (ce + z_term).sum()
    if case.num_items is not None:
        return (ce + z_term).sum() / case.num_items
    mean = ce.sum() / denominator
    return mean + z_term.sum() / counted.sum() if case.z_loss else mean


def run_plain(case: Case, inputs: Inputs) -> Result:
    """Loss and gradients from eager PyTorch."""
    leaves = _leaves(case, inputs)
    return _differentiated(
        case, plain_loss(case, inputs, leaves["dx"], leaves["dw"], leaves["db"]), inputs, leaves
    )


def run_memeff(case: Case, inputs: Inputs, **overrides: Any) -> Result:
    """Loss and gradients from memeff; `overrides` are passed on to linear_cross_entropy."""
    leaves = _leaves(case, inputs)
    arguments = {
        name: getattr(case, name) for name in LossOptions.__annotations__ if hasattr(case, name)
    } | {
        "linear_bias": leaves["db"],
        "weight": inputs.class_weights,
        "token_weight": inputs.token_weight,
        "num_items": case.num_items,
    }
    loss = memeff.linear_cross_entropy(
        leaves["dx"], leaves["dw"], inputs.y, **(arguments | overrides)
    )
    return _differentiated(case, loss, inputs, leaves)


def compare(
    case: Case, *, device: str = "cpu", **overrides: Any
) -> tuple[Result, list[Comparison]]:
    """Runs `case` three ways: memeff's result, and how it compares.

    memeff and plain PyTorch run on `device`, the float64 reference on the CPU.
    """
    cpu_inputs = make_inputs(case)
    inputs = cpu_inputs.to(device)
    ours = run_memeff(case, inputs, **overrides).cpu()
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert ours.loss.dtype == wide, f"loss is {ours.loss.dtype}, expected {wide}"
    for name in ("dx", "dw", "db"):
        gradient = getattr(ours, name)
        assert gradient is None or gradient.dtype == case.dtype, f"{name} is {gradient.dtype}"
    exact = run_plain(replace(case, dtype=torch.float64), cpu_inputs.in_float64())
    return ours, compare_results(ours, run_plain(case, inputs).cpu(), exact)


def check(case: Case, *, device: str = "cpu", **overrides: Any) -> Result:
    """Runs `case` three ways, applies the tolerance rule, returns memeff's result."""
    ours, comparisons = compare(case, device=device, **overrides)
    assert_all_hold(comparisons)
    return ours


def compact_budget(case: Case) -> int:
    """A memory budget in which `case` runs with compact sums of many chunks on this machine."""
    for budget in range(2**20, 2**28, 2**17):
        try:
            plan = memeff.plan(
                math.prod(case.lead),
                case.features,
                case.vocab,
                case.dtype,
                bias_grad=case.bias,
                label_smoothing=case.label_smoothing,
                memory_budget=budget,
            )
        except ValueError:  # too small
            continue
        if plan.accumulation == "compact":
            assert plan.num_chunks > 8, plan
            return budget
    raise AssertionError(f"no budget leads to compact sums for {case}")
