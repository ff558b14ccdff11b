"""``Report``: what ran without logits, and what computed them, where."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch

# Frames of these packages are not the code that asks for logits.
_LIBRARY_FOLDERS = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (os.path.dirname(os.path.abspath(__file__)), torch.__file__)
)


@dataclass
class Materialised:
    """How often a function computed logits, and the file and line of the first time."""

    where: str
    count: int = 0


@dataclass
class Report:
    """What became of the logits of one patched model; `print` it.

    The counts are of eager code: what torch.compile traced is not counted.
    """

    strict: bool = False
    heads: list[str] = field(default_factory=list)
    """Names of the heads whose logits are lazy."""
    eager_only: list[str] = field(default_factory=list)
    """Those of them whose logits are plain under torch.compile: heads of tensor-parallel models."""
    left_dense: dict[str, str] = field(default_factory=dict)
    """Name of a head that stayed as it was, or of a call that returned plain logits -> reason."""
    without_logits: Counter[str] = field(default_factory=Counter)
    """Function -> number of calls that needed no logits."""
    materialised: dict[str, Materialised] = field(default_factory=dict)
    """Function -> the calls that computed the logits."""

    def ran(self, function: str) -> None:
        """Count a call that needed no logits."""
        if not torch.compiler.is_compiling():
            self.without_logits[function] += 1

    def needs_logits(self, function: object, training: bool) -> None:
        """Count a call that computes logits. The first in training warns; strict raises."""
        if torch.compiler.is_compiling():
            return
        name = name_of(function)
        entry = self.materialised.get(name)
        if entry is None or self.strict:
            file, line = calling_line()
            if self.strict:
                raise RuntimeError(
                    f"{name} at {file}:{line} needs the logits, and memeff.patch was called with "
                    "strict=True; strict=False computes them there"
                )
            if training and not self.materialised:
                warnings.warn_explicit(
                    f"{name} computed the logits of a head under memeff.patch, which costs their "
                    "memory; the report that patch returns lists every such place",
                    UserWarning,
                    file,
                    line,
                )
            entry = self.materialised[name] = Materialised(f"{file}:{line}")
        entry.count += 1

    def stays_dense(self, name: str, reason: str) -> None:
        """Note, with one warning, that a head or its calls return plain logits."""
        if self.left_dense.get(name) != reason:
            self.left_dense[name] = reason
            message = f"memeff.patch leaves {name} with plain logits: {reason}"
            warnings.warn_explicit(message, UserWarning, *calling_line())

    def clear(self) -> None:
        """Forget the calls counted so far."""
        self.without_logits.clear()
        self.materialised.clear()

    def __str__(self) -> str:
        lines = [f"lazy heads: {', '.join(self.heads) or 'none'}"]
        if self.eager_only:
            lines.append(f"plain logits under torch.compile: {', '.join(self.eager_only)}")
        lines += [f"plain logits: {name}: {why}" for name, why in self.left_dense.items()]
        lines.append(
            "ran without logits:" if self.without_logits else "ran without logits: nothing"
        )
        lines += [f"  {count:6d} x {name}" for name, count in self.without_logits.most_common()]
        lines.append(
            "computed the logits:" if self.materialised else "computed the logits: nothing"
        )
        lines += [
            f"  {entry.count:6d} x {name}, first at {entry.where}"
            for name, entry in self.materialised.items()
        ]
        return "\n".join(lines)


def calling_line() -> tuple[str, int]:
    """File and line of the innermost frame outside of torch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        os.path.abspath(frame.f_code.co_filename).startswith(_LIBRARY_FOLDERS)
    ):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def name_of(function: object) -> str:
    """A function as code writes it: "cross_entropy", "Tensor.std", "Tensor.T"."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    owner = getattr(function, "__objclass__", None)
    qualified = getattr(function, "__qualname__", "")
    in_tensor = owner is not None or qualified.startswith(
        ("Tensor.", "TensorBase.", "_TensorBase.")
    )
    return f"Tensor.{name}" if in_tensor else name
