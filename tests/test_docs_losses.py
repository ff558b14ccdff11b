"""The snippets of docs/losses.md, run one after the other in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

TEXT = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_snippets_run() -> None:
    assert len(SNIPPETS) >= 14
    namespace: dict[str, Any] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/losses.md", "exec"), namespace)
    for name in ("hidden", "weight", "scale"):
        gradient = namespace[name].grad
        assert gradient is not None and gradient.isfinite().all(), name
    scalars = ("gspo", "ppo", "dpo", "orpo", "simpo", "cpo", "kto", "focal", "smooth", "loss")
    for name in scalars:
        value = namespace[name]
        assert isinstance(value, torch.Tensor) and value.dim() == 0 and value.isfinite(), name
