"""benchmarks/frontier.py: docs/predictions.md has the tables that the planner predicts today."""

from __future__ import annotations

import itertools
import sys

import pytest

from buildtools.sources import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import frontier


@pytest.mark.parametrize("shape", frontier.SHAPES, ids=str)
def test_the_page_shows_what_is_predicted(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "")  # frontier() sets it
    (h200,) = (gpu for gpu in frontier.DRAWN if gpu.name == "H200")
    title, _, *rows = frontier.table(h200, *shape)
    page = (ROOT / "docs" / "predictions.md").read_text()
    assert "\n".join([f"**{title}**", "", *rows]) in page


@pytest.mark.parametrize("gpu", frontier.DRAWN, ids=lambda gpu: gpu.name)
def test_more_memory_is_not_slower(gpu: frontier.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "")
    for tokens in frontier.TOKENS:
        for kernels in frontier.KERNELS:
            points = frontier.frontier(gpu, tokens, kernels)
            assert all(point.mib <= point.budget for point in points)
            # Chunks are as large as the budget allows, which may fit tiles a little worse.
            for less, more in itertools.pairwise(points):
                assert more.ms <= 1.02 * less.ms
            assert points[-1].ms > frontier.floor_ms(gpu, tokens)
