"""The snippets of README.md, run one after the other in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_snippets_run() -> None:
    assert len(SNIPPETS) >= 4
    namespace: dict[str, Any] = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)
    for name in ("hidden", "weight"):
        gradient = namespace[name].grad
        assert gradient is not None and gradient.isfinite().all(), name
    loss = namespace["loss"]
    assert isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.isfinite()
