"""The rule over several draws (tolerances.assert_over_draws): what it forgives, and what not."""

from __future__ import annotations

import pytest
import torch
from tolerances import DRAWS, Comparison, assert_over_draws, compare


def draws(errors: list[float], plain_errors: list[float], scale: float = 1.0) -> list[int]:
    """Judges one gradient of 4096 entries with these relative errors; the draws that were made."""
    made: list[int] = []

    def draw(i: int) -> list[Comparison]:
        made.append(i)
        exact = torch.full((4096,), scale, dtype=torch.float64)
        sides = [(exact * (1 + error[i])).float() for error in (errors, plain_errors)]
        return compare("dw", *sides, exact)

    assert_over_draws(draw)
    return made


def test_a_call_that_holds_the_rule_is_run_once() -> None:
    assert draws([1e-5], [1e-5]) == [0]


def test_luck_averages_out() -> None:
    ours = [4e-5, 1e-5, 1e-5, 3e-5] + [1e-5] * (DRAWS - 4)
    plain = [1e-5, 1e-5, 3e-5, 1e-5, 1e-5, 4e-5] + [1e-5] * (DRAWS - 6)
    assert draws(ours, plain) == list(range(DRAWS))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_error_that_is_always_there_fails(scale: float) -> None:
    with pytest.raises(AssertionError, match=f"dw, over {DRAWS} draws"):
        draws([1.3e-5] * DRAWS, [1e-5] * DRAWS, scale)


def test_a_gross_error_in_one_draw_fails() -> None:
    with pytest.raises(AssertionError, match="over"):
        draws([4e-5] + [1e-5] * (DRAWS - 1), [1e-5] * DRAWS)


def test_what_is_no_matter_of_luck_fails_at_once() -> None:
    made = []

    def draw(i: int) -> list[Comparison]:
        made.append(i)
        return compare("dw", torch.zeros(2), torch.zeros(3), torch.zeros(3).double())

    with pytest.raises(AssertionError, match="shape"):
        assert_over_draws(draw)
    assert made == [0]
