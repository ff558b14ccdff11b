"""A whole step of a patched model takes the memory that memeff.plan promises, and no logits'."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import memeff
from buildtools.sources import ROOT

MIB = 2**20
TOKENS, FEATURES, VOCAB = 1024, 64, 65536  # logits of 256 MiB in float32
SLACK = 8 * MIB


def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/patched_step.py, which has a larger model."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import patched_step

    peaks = patched_step.measure_peaks(TOKENS, FEATURES, VOCAB, layers=1)
    plan = memeff.plan(TOKENS, FEATURES, VOCAB, torch.float32)
    gradients = 4 * FEATURES * (TOKENS + VOCAB)
    most = peaks["without head"] + gradients + plan.workspace_bytes + plan.library_bytes + SLACK
    assert peaks["patched"] <= most, peaks
    assert peaks["plain"] > most + 4 * TOKENS * VOCAB, peaks  # with logits it would not fit
