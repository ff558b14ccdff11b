"""``patch`` and ``unpatch``: a model's heads get lazy logits, or lose them again."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from memeff._checks import DTYPES, check_flag
from memeff._linear_map import foreign_hook
from memeff.lazy.head import LazyHead, lazy_class, plain_class
from memeff.lazy.report import Report
from memeff.lazy.source import roots
from memeff.lazy.tensor_parallel import TensorParallelHead, is_tensor_parallel

Head = str | nn.Module


def patch(
    model: nn.Module, head: Head | Sequence[Head] | None = None, strict: bool = False
) -> Report:
    """Let the head of a model return logits that are not computed until somebody looks at them.

    Nothing else of the model or of the code that trains it changes. ``F.cross_entropy`` of such
    logits runs `memeff.linear_cross_entropy`; log-probabilities of tokens, ``logsumexp``,
    ``argmax``, ``topk`` and entropies run `memeff.linear_token_statistics`; scaling, soft
    caps, casts, views and slices are remembered. Anything else computes the logits, once, as the
    plain head would, and continues with them. Shapes, dtypes and devices are those of plain
    logits. While gradients are recorded they are an object that is no torch.Tensor, else a
    subclass of Tensor.

    Args:
        model: any module, also a wrapped or compiled one.
        head: the linear layer that makes the logits, a submodule or its name, or several of them.
            None means ``model.get_output_embeddings()`` where the model has it, else the only
            nn.Linear with as many outputs as the largest nn.Embedding has rows.
        strict: raise a RuntimeError where something needs the logits, instead of computing them.

    Returns:
        The model's `memeff.lazy.report.Report`: what ran without logits, and which lines
        computed them. A second call returns the same one and adds heads to it. A head that cannot
        be lazy (quantised, another forward, hooks that may look at the logits) is left as it is,
        with a warning and an entry in the report.

    Raises:
        TypeError: ``model`` is no module, ``head`` neither a module nor a name, ``strict`` no bool.
        ValueError: no head is found, or several, or ``head`` is not in the model.
        RuntimeError: with ``strict``, a head cannot be lazy.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_flag("strict", strict)
    inner = _unwrap(model)
    linears = [linear for found in _heads(inner, head) for linear in _linears(found)]
    report = _report_of(inner, linears)
    report.strict = strict
    names = {module: name for name, module in inner.named_modules()}
    for linear in linears:
        _patch_linear(linear, names.get(linear, "head") or "the model", report)
        roots[linear] = weakref.ref(inner)
    inner.__dict__["_memeff_report"] = report
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: all heads of the model return plain logits again.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: the class of a head was changed after ``patch``, by fully_shard for example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner = _unwrap(model)
    for name, module in inner.named_modules():
        if isinstance(module, LazyHead):
            plain = plain_class(type(module))
            if plain is None:
                raise RuntimeError(
                    f"the class of {name} became {type(module).__name__} after memeff.patch; "
                    "unpatch the model before it is wrapped"
                )
            roots.pop(module, None)
            for name in ("memeff_report", "memeff_name", "memeff_layouts"):
                module.__dict__.pop(name, None)
            module.__class__ = plain  # type: ignore[assignment]
    inner.__dict__.pop("_memeff_report", None)


def _report_of(model: nn.Module, linears: list[nn.Module]) -> Report:
    """The model's report; or that of a head that was patched before something wrapped the model, as
    PEFT does."""
    reports = [linear.memeff_report for linear in linears if isinstance(linear, LazyHead)]
    report: Report = model.__dict__.get("_memeff_report") or next(iter(reports), None) or Report()
    return report


def _patch_linear(linear: nn.Module, name: str, report: Report) -> None:
    if isinstance(linear, LazyHead):
        linear.__dict__["memeff_report"] = report
        return
    reason = _why_not(linear)
    if reason is not None or not isinstance(linear, nn.Linear):
        if report.strict:
            raise RuntimeError(f"memeff.patch: {name} cannot be lazy: {reason}")
        report.stays_dense(name, str(reason))
        return
    base = TensorParallelHead if is_tensor_parallel(linear) else LazyHead
    linear.__class__ = lazy_class(base, type(linear))
    linear.__dict__["memeff_report"] = report
    linear.__dict__["memeff_name"] = name
    report.left_dense.pop(name, None)
    if name not in report.heads:  # as it is if another module has taken the place of a head
        report.heads.append(name)
    if base is TensorParallelHead and name not in report.eager_only:
        report.eager_only.append(name)


def _why_not(linear: nn.Module) -> str | None:
    """Why a module cannot become a lazy head; None if it can."""
    kind = type(linear)
    if not isinstance(linear, nn.Linear):
        return f"it is a {kind.__name__}, expected an nn.Linear"
    if kind.forward is not nn.Linear.forward:
        return f"{kind.__name__} has a forward of its own, expected that of nn.Linear"
    if "forward" in linear.__dict__ and not is_tensor_parallel(linear):
        return "its forward was replaced (by accelerate's offloading, for example)"
    weight = linear.weight
    sharded = hasattr(weight, "full_tensor")
    if type(weight) not in (nn.Parameter, torch.Tensor) and not sharded:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"its weight has dtype {weight.dtype}"
    if getattr(linear, "parametrizations", None):
        return "its weight is parametrized"
    hook = foreign_hook(linear)
    return None if hook is None else f"the hook {hook} may look at its logits"


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile and DistributedDataParallel."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # importing it takes seconds
    while True:
        if dynamo is not None and isinstance(model, dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def _heads(model: nn.Module, head: Any) -> Iterable[nn.Module]:
    if head is None:
        return [_find_head(model)]
    if isinstance(head, (str, nn.Module)) or not isinstance(head, Iterable):
        head = [head]
    found: list[nn.Module] = []
    modules = dict(model.named_modules())
    for one in head:
        if isinstance(one, str):
            if one not in modules:
                raise ValueError(f"head is {one!r}, expected the name of a submodule of the model")
            found.append(modules[one])
        elif isinstance(one, nn.Module):
            if one not in modules.values():
                raise ValueError(
                    f"head is a {type(one).__name__} that is not part of the model, expected one "
                    "of its submodules or the name of one"
                )
            found.append(one)
        else:
            raise TypeError(
                f"head must be a module, a name, or a list of these, got {type(one).__name__}"
            )
    if not found:
        raise ValueError("head is an empty list, expected a module or a name in it")
    return found


def _find_head(model: nn.Module) -> nn.Module:
    output = getattr(model, "get_output_embeddings", None)
    found = output() if callable(output) else None
    if isinstance(found, nn.Module):
        return found
    if type(model) is nn.Linear:
        return model
    vocab = max(
        (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None
    )
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == vocab
    }
    if len(candidates) != 1:
        listed = f"candidates: {', '.join(candidates)}" if candidates else "no candidates"
        raise ValueError(
            f"memeff.patch found no single head in {type(model).__name__} (nn.Linear with {vocab} "
            f"outputs, as many as the largest nn.Embedding has rows; {listed}); pass it: "
            'memeff.patch(model, head="lm_head")'
        )
    return next(iter(candidates.values()))


def _linears(head: nn.Module) -> list[nn.Module]:
    """The linear layers that the logits of a head come from: one, or those that PEFT put there."""
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
        copies = cast("nn.ModuleDict", head.modules_to_save)
        return [cast("nn.Module", head.original_module), *copies.values()]
    base = getattr(head, "base_layer", None)
    if not isinstance(base, nn.Module):
        return [head]
    adapters = cast("dict[str, nn.Module]", getattr(head, "lora_B", None) or {})
    return [base, *adapters.values()]
