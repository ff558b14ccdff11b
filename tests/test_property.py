"""Random shapes, dtypes, strides and option combinations, under the tolerance rule.

Hypothesis also draws constants that it finds in the loaded modules, so the examples depend on which
tests are collected with these. The rule holds for all of them (assert_over_draws).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, INPUT_LAYOUTS, WEIGHT_LAYOUTS, Case, compare, make_inputs, run_memeff
from tolerances import assert_over_draws

pytest.importorskip("hypothesis")

from hypothesis import event, given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Sizes next to and between the multiples that kernels like (8, 16, 32, 64, 128, 256).
_EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)


def sizes(largest: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from([n for n in _EDGES if n <= largest]), st.integers(1, largest))


@st.composite
def leading(draw: st.DrawFn) -> tuple[int, ...]:
    count = draw(sizes(300))
    kind = draw(st.sampled_from(["[N]", "[1, N]", "[B, T]", "[]"]))
    if kind == "[]":
        return ()
    if kind == "[1, N]":
        return (1, count)
    if kind == "[B, T]":
        rows = draw(st.integers(1, 5))
        return (rows, max(1, count // rows))
    return (count,)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lead = draw(leading())
    vocab = draw(sizes(700))
    # A quarter. With one class all gradients cancel to 0, which leaves no scale to be relative to.
    probabilities = vocab > 1 and draw(st.booleans()) and draw(st.booleans())
    shift = 0
    if len(lead) >= 2 and lead[-1] > 2 and not probabilities:
        shift = draw(st.sampled_from([0, 0, 1, 2]))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        lead=lead,
        features=draw(sizes(150)),
        vocab=vocab,
        dtype=dtype,
        reduction=reduction,
        bias=draw(st.booleans()),
        class_weights=draw(st.booleans()),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0])),
        probabilities=probabilities,
        ignored=0.0 if probabilities else draw(st.sampled_from([0.0, 0.2, 0.9])),
        ignore_index=None
        if probabilities
        else draw(st.sampled_from([None, -1, 0, vocab - 1, 10**6])),
        softcap=draw(st.sampled_from([None, None, 2.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 1.0, 0.3, 2.0])),
        z_loss=draw(st.sampled_from([0.0, 0.0, 1e-3])),
        token_weight=draw(st.booleans()),
        num_items=draw(st.sampled_from([None, None, 5])) if reduction == "mean" else None,
        shift=shift,
        spread=draw(st.sampled_from([0.3, 3.0])),
        target_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        input_layout=draw(st.sampled_from(INPUT_LAYOUTS)),
        weight_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        chunk_size=draw(st.sampled_from([None, None, None, 1, 17, 64])),
        accum_dtype=draw(st.sampled_from([None, torch.promote_types(dtype, torch.float32)])),
        differentiate=draw(
            st.sampled_from(
                [("dx", "dw", "db"), ("dx", "dw", "db"), ("dx",), ("dw",), ("dw", "db"), ()]
            )
        ),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def _note(case: Case) -> None:
    """For pytest --hypothesis-show-statistics: whether the interesting corners are really drawn."""
    event(str(case.dtype))
    event(f"reduction {case.reduction}")
    event("probabilities" if case.probabilities else "indices")


@given(cases())
def test_any_call_is_as_close_as_plain_pytorch(case: Case) -> None:
    _note(case)
    assert_over_draws(lambda i: compare(replace(case, seed=case.seed + i))[1])


@given(cases())
def test_any_call_is_repeatable(case: Case) -> None:
    inputs = make_inputs(case)
    first, second = run_memeff(case, inputs), run_memeff(case, inputs)
    for name in ("loss", "dx", "dw", "db"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num()), name
