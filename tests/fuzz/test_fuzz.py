"""A fixed number of the fuzzer's calls (fuzz.py); `make fuzz SECONDS=600` tries others."""

from __future__ import annotations

import emulated
import fuzz
import pytest
import torch
from tolerances import DRAWS, Comparison, compare


@pytest.mark.parametrize("seed", range(40))
def test_on_the_cpu(seed: int) -> None:
    fuzz.check_seed(seed, "cpu")


@emulated.needed
@pytest.mark.parametrize("seed", range(12))
def test_on_the_emulator(seed: int) -> None:
    emulated.load()
    fuzz.check_seed(seed, "emulated")


@emulated.needed
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_many_on_the_emulator(first: int) -> None:
    """Small ones, of all families: a call takes a tenth of a second, most of it Python's."""
    emulated.load()
    for seed in range(first, first + 50):
        fuzz.check_seed(seed, "emulated", most_work=2000)


def test_a_failure_says_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And has been out of tolerance on fresh numbers, too."""

    def fail(call: fuzz.Call, backend: str) -> list[Comparison]:
        seeds.append(call.case.seed)
        wrong = torch.tensor([1.0])
        return compare("dw", wrong + 1, wrong, wrong.double())

    seeds: list[int] = []
    monkeypatch.setattr(fuzz, "_compare_cross_entropy", fail)
    monkeypatch.setattr(fuzz, "_compare_statistics", fail)
    with pytest.raises(AssertionError, match=f"dw, over {DRAWS} draws"):
        fuzz.check_seed(3, "cpu", most_work=1e4)
    assert len(seeds) == DRAWS == len(set(seeds))
    printed = capsys.readouterr().out
    assert "python tests/fuzz/fuzz.py --backend cpu --only 3 --most-work 10000\n" in printed
    assert repr(fuzz.draw(3, "cpu", 1e4)) in printed
