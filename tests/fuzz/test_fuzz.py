"""A fixed number of the fuzzer's calls (fuzz.py); `make fuzz SECONDS=600` tries others."""

from __future__ import annotations

import fuzz
import pytest


@pytest.mark.parametrize("seed", range(40))
def test_on_the_cpu(seed: int) -> None:
    fuzz.check_seed(seed, "cpu")


def test_a_failure_says_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one out of tolerance is not luck if most repetitions are."""

    def fail(call: fuzz.Call, backend: str) -> None:
        seeds.append(call.case.seed)
        raise AssertionError("out of tolerance")

    seeds: list[int] = []
    monkeypatch.setattr(fuzz, "_check_cross_entropy", fail)
    monkeypatch.setattr(fuzz, "_check_statistics", fail)
    with pytest.raises(AssertionError, match="out of tolerance"):
        fuzz.check_seed(3, "cpu")
    assert len(seeds) == fuzz.MOST_UNLUCKY + 1 == len(set(seeds))
    printed = capsys.readouterr().out
    assert "python tests/fuzz/fuzz.py --backend cpu --only 3\n" in printed
    assert repr(fuzz.draw(3, "cpu")) in printed
