"""Which backend computes a call."""

from __future__ import annotations

import torch

from memeff import _library
from memeff._checks import check_choice

# Backends with kernels, and the type of the devices whose tensors they take.
DEVICE_TYPES = {"cpu": "cpu", "cuda": "cuda"}
_REMEDIES = {"cuda": " (type: python -m memeff.diagnostics)"}


def check_backend(name: str, backend: object) -> None:
    check_choice(name, backend, ("auto", *DEVICE_TYPES, "reference"))


def resolve_backend(backend: str, device: torch.device, needs_reference: bool = False) -> str:
    """The backend that computes: one of DEVICE_TYPES, or "reference".

    ``needs_reference``: a gradient is wanted that only the reference has (class probabilities or
    class weights that require grad); "auto" then takes it.
    """
    if backend == "reference":
        return backend
    # Tensors without data are computed by fake kernels, which all backends share.
    device_type = "cpu" if device.type == "meta" and backend == "auto" else device.type
    resolved = device_type if backend == "auto" else backend
    if resolved not in DEVICE_TYPES or (
        resolved == "cuda" and not _library.load().build_info()["cuda"]
    ):
        raise RuntimeError(
            f"input is on {device} and backend is {backend!r}: this build of memeff has no kernels "
            f"for {resolved}{_REMEDIES.get(resolved, '')}. backend='reference' runs plain PyTorch "
            "on any device (and stores the logits)"
        )
    if device_type not in (DEVICE_TYPES[resolved], "meta"):
        raise RuntimeError(
            f"input is on {device}, expected a {DEVICE_TYPES[resolved]} tensor for "
            f"backend={backend!r}"
        )
    if needs_reference:
        if backend != "auto":
            raise RuntimeError(
                f"backend is {backend!r}, expected 'auto' or 'reference': target or weight "
                "requires grad, and only the reference (which stores the logits) computes "
                "gradients for them"
            )
        return "reference"
    return resolved
