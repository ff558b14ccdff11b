"""examples/: every script runs, and what it trains improves.

An example defines main(), which returns the loss of every step; those that compare a training with
the same one on memeff take `patched`, and sizes.
"""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest

from buildtools.sources import ROOT

# Script -> packages that it needs besides memeff.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "custom_loss.py": (),
    "custom_model.py": (),
    "distillation.py": (),
    "finetune_transformers.py": ("transformers", "accelerate"),
    "finetune_trl_grpo.py": ("trl",),
    "first_call.py": (),
    "fsdp2.py": (),
    "grpo.py": (),
    "lora_head.py": ("transformers", "peft"),
}
COMPARING = ("custom_model.py", "finetune_transformers.py", "lora_head.py")
SMALL: dict[str, Any] = {"vocab": 600, "steps": 6, "batch": 4, "length": 24}


@pytest.fixture(autouse=True)
def _folder_is_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def load(name: str) -> dict[str, Any]:
    for package in EXAMPLES[name]:
        pytest.importorskip(package)
    return runpy.run_path(str(ROOT / "examples" / name))


def test_every_example_is_tested_and_described() -> None:
    names = {path.name for path in (ROOT / "examples").glob("[!_]*.py")}
    assert names == set(EXAMPLES)
    page = (ROOT / "examples" / "README.md").read_text()
    assert all(f"`{name}`" in page for name in names)


def improves(losses: list[float]) -> bool:
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.01 * abs(losses[0])


@pytest.mark.parametrize("name", ["custom_loss.py", "distillation.py", "first_call.py", "grpo.py"])
def test_it_learns(name: str) -> None:
    assert improves(load(name)["main"]())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COMPARING)
def test_it_learns_as_it_does_without_memeff(name: str) -> None:
    main = load(name)["main"]
    losses = main(patched=True, **SMALL)
    assert len(losses) == SMALL["steps"] and improves(losses)
    assert losses == pytest.approx(main(patched=False, **SMALL), rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_grpo_of_trl_with_and_without() -> None:
    main = load("finetune_trl_grpo.py")["main"]
    small = {**SMALL, "steps": 2, "length": 6}
    losses = main(patched=True, **small)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert losses == pytest.approx(main(patched=False, **small), rel=1e-3, abs=1e-6)


def test_the_first_call_gives_the_losses_of_plain_pytorch() -> None:
    example = load("first_call.py")
    expected = example["main"](loss_of=example["with_logits"])
    assert example["main"]() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_both_ways_as_a_user_starts_them() -> None:
    """With the two processes of torchrun."""
    script = str(ROOT / "examples" / "fsdp2.py")
    command = [sys.executable, script, "vocab=600", "steps=3", "length=16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    number = r"(\d+\.\d+)"
    lines = re.findall(
        rf"^ *(plain|memeff): loss {number} -> {number}, .* peak memory (\d+) MiB$",
        done.stdout,
        re.MULTILINE,
    )
    (plain, *before), (ours, *after) = lines
    assert (plain, ours) == ("plain", "memeff")
    first, last, _ = map(float, before)
    assert [float(value) for value in after[:2]] == pytest.approx([first, last], abs=2e-5)
    assert last < first
