"""DDP, FSDP1, FSDP2 and ZeRO with two processes: a patched model trains as the plain one does under
the same stack, without logits. The cases are in stacks.py."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from stacks import BEGIN, CASES, DENSE, END, LAUNCHES, PAGE, launch, table

# In float32, relative. Parameters: after three steps.
MOST = {"losses": 1e-6, "gradients": 2e-6, "parameters": 2e-6}


def faults(name: str, result: dict[str, Any] | None) -> list[str]:
    """What is wrong with the outcome of a case."""
    if result is None:
        return [f"{name}: did not end in time"]
    if "error" in result:
        return [f"{name}: {result['error']}"]
    found = []
    for what, most in MOST.items():
        if CASES[name].bf16:
            # No further from float32 than plain bf16, as in tests/tolerances.py.
            most = 1.1 * result[f"plain_{what}"] + torch.finfo(torch.bfloat16).eps
        if not result[what] <= most:
            found.append(f"{name}: {what} differ by {result[what]:.1e}, at most {most:.1e}")
    if result["argmax"] > (0.1 if CASES[name].bf16 else 0):
        found.append(f"{name}: {result['argmax']:.0%} of argmax differ")
    ours, plain = result["dtypes"]
    if ours != plain:
        found.append(f"{name}: dtypes of logits and loss are {ours}, plain {plain}")
    ran = result["without_logits"]
    if name in DENSE:
        if not result["left_dense"] or ran:
            found.append(f"{name}: lazy, expected plain logits")
    elif result["materialised"] or ran.get("cross_entropy", 0) < 3 or not ran.get("argmax"):
        found.append(f"{name}: ran {ran}, materialised {result['materialised']}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("packages", LAUNCHES)
def test_stacks(packages: str) -> None:
    if importlib.util.find_spec(packages) is None:
        pytest.skip(f"{packages} is not installed")
    results = launch(LAUNCHES[packages], timeout=500)
    found = [fault for name in LAUNCHES[packages] for fault in faults(name, results.get(name))]
    assert not found, "\n".join(found)


def test_the_table_of_stacks_is_that_of_the_documentation() -> None:
    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert shown == table(), "type: python tests/lazy/stacks.py --write"
