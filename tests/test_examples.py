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


def started(arguments: list[str]) -> dict[str, tuple[float, float]]:
    """First and last loss of each way that an example printed, run in processes of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments, "vocab=600", "steps=3", "length=16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    number = r"(\d+\.\d+)"
    line = rf"^ *(plain|memeff): loss {number} -> {number}, .* peak memory \d+ MiB$"
    found = re.findall(line, done.stdout, re.MULTILINE)
    return {way: (float(first), float(last)) for way, first, last in found}


def assert_same_training(losses: dict[str, tuple[float, float]]) -> None:
    assert losses["memeff"] == pytest.approx(losses["plain"], abs=2e-5)
    assert losses["memeff"][1] < losses["memeff"][0]


@pytest.mark.slow
def test_both_ways_as_a_user_starts_them() -> None:
    """With the two processes of torchrun."""
    assert_same_training(started([str(ROOT / "examples" / "fsdp2.py")]))


@pytest.mark.slow
def test_trainer_under_accelerate_launch() -> None:
    """Data parallel, two processes."""
    for package in EXAMPLES["finetune_transformers.py"]:
        pytest.importorskip(package)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    script = str(ROOT / "examples" / "finetune_transformers.py")
    losses: dict[str, tuple[float, float]] = {}
    for way in ("plain", "memeff"):
        losses |= started([*launch, script, way])
    assert_same_training(losses)
