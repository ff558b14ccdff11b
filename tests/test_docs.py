"""The snippets of README.md and docs/losses.md; those of a page run in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def run_snippets(page: str, least: int) -> dict[str, Any]:
    """What is defined after all of them, of which there are at least so many."""
    snippets = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(snippets) >= least
    namespace: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)
    return namespace


def check(namespace: dict[str, Any], gradients: tuple[str, ...], scalars: tuple[str, ...]) -> None:
    for name in gradients:
        gradient = namespace[name].grad
        assert gradient is not None and gradient.isfinite().all(), name
    for name in scalars:
        value = namespace[name]
        assert isinstance(value, torch.Tensor) and value.dim() == 0 and value.isfinite(), name


def test_readme() -> None:
    check(run_snippets("README.md", 4), ("hidden", "weight"), ("loss",))


def test_losses() -> None:
    scalars = ("gspo", "ppo", "dpo", "orpo", "simpo", "cpo", "kto", "focal", "smooth", "loss")
    check(run_snippets("docs/losses.md", 14), ("hidden", "weight", "scale"), scalars)
