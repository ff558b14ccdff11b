"""What is compared: ways to compute mean cross entropy of hidden states against a classifier.

Each is a function (x [N, D], w [V, D], y [N], softcap) -> loss [], differentiable in x and w.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]

# Name -> what it is, as `memeff-bench --help` lists them.
DESCRIPTIONS = {
    "standard": "F.cross_entropy((x @ w.T).float(), y), what model code does",
    "eager": "the same without the upcast to float32",
    "compile": "torch.compile of standard, compiled for exactly the shape",
    "torch-chunked": "torch's F.linear_cross_entropy with its options, torch >= 2.13",
    "cce": "Cut Cross Entropy, if installed (on the CPU: torch_compile)",
    "cce-exact": "the same without its filter, which drops small probabilities; GPUs only",
    "liger": "Liger's fused linear cross entropy, if installed; GPUs only",
    "quack": "QuACK's chunked_linear_cross_entropy, if installed; GPUs only",
    "memeff": "memeff.linear_cross_entropy with its defaults",
    "memeff@SIZE": "the same with memory_budget=SIZE: memeff@32MiB",
    "memeff~MASS": "the same with skip_mass=MASS: memeff~1e-3",
    "memeff=SCORES+PRODUCTS": "on these CUDA kernels, also after the above: memeff=sm90+sm90",
    "memeff-apply": "memeff.chunked_linear_apply of F.cross_entropy, the way of any function",
}

# Used by the default run, by type of device.
DEFAULT_VARIANTS = {
    "cpu": (
        "standard",
        "eager",
        "compile",
        "torch-chunked",
        "cce",
        "memeff",
        "memeff@32MiB",
    ),
    "cuda": (
        "standard",
        "eager",
        "compile",
        "torch-chunked",
        "cce",
        "cce-exact",
        "liger",
        "quack",
        "memeff",
        "memeff@512MiB",
        "memeff@256MiB",
        "memeff@32MiB",
    ),
}


class Unavailable(Exception):
    """This variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Variant:
    """A named way to compute the loss.

    bytes_per_logit: rough peak memory per element of the [N, V] logits, to keep the standard ways
    from being started on a machine they would not fit; 0 for those which store no logits. compiled:
    the first call at a shape compiles, which must not count as the variant's own time or memory.
    """

    name: str
    loss: LossFunction
    bytes_per_logit: int = 0
    compiled: bool = False


def _softcapped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _standard(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """What model code does: logits upcast to float32 (float64 inputs stay), then cross entropy."""
    logits = x @ w.T
    upcast = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(_softcapped(upcast, softcap), y)


def _eager(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Without the upcast: everything in the inputs' type, faster and less exact."""
    return F.cross_entropy(_softcapped(x @ w.T, softcap), y)


def _make_standard(device: str, softcap: float | None) -> Variant:
    return Variant("standard", _standard, bytes_per_logit=16)


def _make_eager(device: str, softcap: float | None) -> Variant:
    return Variant("eager", _eager, bytes_per_logit=12)


def _make_compile(device: str, softcap: float | None) -> Variant:
    return Variant(
        "compile", torch.compile(_standard, dynamic=False), bytes_per_logit=12, compiled=True
    )


def _make_torch_chunked(device: str, softcap: float | None) -> Variant:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(
            f"torch {torch.__version__} has no chunked linear_cross_entropy (2.13 has)"
        )
    if softcap is not None:
        raise Unavailable("torch's linear_cross_entropy has no soft-cap")

    def loss(
        x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        return F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())

    return Variant("torch-chunked", loss)


def _require(package: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed ({install})")


def _import(module: str, package: str) -> Any:
    """A peer's module; Unavailable where it is not installed or does not import."""
    _require(module.partition(".")[0], f"pip install {package}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module} does not import: {error}") from error


def _require_gpu(package: str, device: str) -> None:
    if not device.startswith("cuda"):
        raise Unavailable(f"{package} runs on GPUs only")


def _make_cce(device: str, softcap: float | None) -> Variant:
    peer = _import("cut_cross_entropy", "cut-cross-entropy")
    implementation = "cce" if device.startswith("cuda") else "torch_compile"

    def loss(
        x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        return peer.linear_cross_entropy(x, w, y, softcap=softcap, impl=implementation)

    compiled = implementation == "torch_compile"
    return Variant("cce", loss, bytes_per_logit=12 if compiled else 0, compiled=compiled)


def _make_cce_exact(device: str, softcap: float | None) -> Variant:
    """Without its filter, which leaves small probabilities out of the gradients."""
    _require_gpu("cut_cross_entropy's own kernel", device)
    peer = _import("cut_cross_entropy", "cut-cross-entropy")

    def loss(
        x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        return peer.linear_cross_entropy(x, w, y, softcap=softcap, impl="cce", filter_eps=None)

    return Variant("cce-exact", loss)


def _make_quack(device: str, softcap: float | None) -> Variant:
    _require_gpu("quack", device)
    if softcap is not None:
        raise Unavailable("quack's linear_cross_entropy has no soft-cap")
    peer = _import("quack.linear_cross_entropy", "quack-kernels")

    def loss(
        x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        return peer.chunked_linear_cross_entropy(x, w, y)

    return Variant("quack", loss)


def _make_liger(device: str, softcap: float | None) -> Variant:
    _require_gpu("liger_kernel", device)
    peer = _import("liger_kernel.transformers", "liger-kernel")
    module = peer.LigerFusedLinearCrossEntropyLoss(softcap=softcap)

    def loss(
        x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        return module(w, x, y)

    return Variant("liger", loss)


def _make_memeff(name: str, softcap: float | None) -> Variant:
    import memeff  # here, so that the peers can be measured even where memeff was not built

    name_of_call, _, kernels = name.partition("=")
    _, _, budget = name_of_call.partition("@")
    _, _, mass = name_of_call.partition("~")
    options: dict[str, Any] = {"memory_budget": budget} if budget else {}
    if mass:
        options["skip_mass"] = float(mass)
    chosen = kernels.replace("+", ",") or _KERNELS_AT_START

    def loss(
        x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        # Left set, because a backward pass follows.
        if os.environ.get(_KERNELS_VARIABLE, "") != chosen:
            os.environ[_KERNELS_VARIABLE] = chosen
        return memeff.linear_cross_entropy(x, w, y, softcap=softcap, **options)

    return Variant(name, loss)


def _make_memeff_apply(device: str, softcap: float | None) -> Variant:
    import memeff

    def loss(
        x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        def summed(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(_softcapped(logits, softcap), y, reduction="sum")

        total = memeff.chunked_linear_apply(summed, x, w, y)
        assert isinstance(total, torch.Tensor)  # one result, as `summed` returns
        return total / len(y)

    return Variant("memeff-apply", loss)


_MAKERS: dict[str, Callable[[str, float | None], Variant]] = {
    "standard": _make_standard,
    "eager": _make_eager,
    "compile": _make_compile,
    "torch-chunked": _make_torch_chunked,
    "cce": _make_cce,
    "cce-exact": _make_cce_exact,
    "liger": _make_liger,
    "quack": _make_quack,
    "memeff-apply": _make_memeff_apply,
}

_MEMEFF = re.compile(r"memeff(@[^~=]+|~[\d.e-]+)?(=\w+\+\w+)?")
_KERNELS_VARIABLE = "MEMEFF_CUDA_KERNELS"
_KERNELS_AT_START = os.environ.get(_KERNELS_VARIABLE, "")


def check_names(names: list[str]) -> None:
    """ValueError naming the first unknown variant."""
    for name in names:
        if not _MEMEFF.fullmatch(name) and name not in _MAKERS:
            known = ", ".join(DESCRIPTIONS)
            raise ValueError(f"variants: {name!r} is unknown; expected some of {known}")


def make_variant(name: str, device: str = "cpu", softcap: float | None = None) -> Variant:
    """The variant called `name`; raises Unavailable (with the reason) where it cannot run."""
    check_names([name])
    if _MEMEFF.fullmatch(name):
        return _make_memeff(name, softcap)
    return _MAKERS[name](device, softcap)
