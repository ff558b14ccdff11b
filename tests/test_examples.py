"""examples/: every script runs, and what it trains improves.

An example defines main(), which returns the loss of every step.
"""

from __future__ import annotations

import math
import runpy
from typing import Any

import pytest

from buildtools.sources import ROOT

# Script -> packages that it needs besides memeff.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "custom_loss.py": (),
    "distillation.py": (),
    "first_call.py": (),
    "grpo.py": (),
}


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / name))


def test_every_example_is_tested_and_described() -> None:
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == set(EXAMPLES)
    page = (ROOT / "examples" / "README.md").read_text()
    assert all(f"`{name}`" in page for name in names)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_learns(name: str) -> None:
    for package in EXAMPLES[name]:
        pytest.importorskip(package)
    losses = load(name)["main"]()
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.01 * abs(losses[0])


def test_the_first_call_gives_the_losses_of_plain_pytorch() -> None:
    example = load("first_call.py")
    expected = example["main"](loss_of=example["with_logits"])
    assert example["main"]() == pytest.approx(expected, rel=1e-5)
