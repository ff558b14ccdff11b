"""Ranks that merge statistics in PyTorch, as on GPUs (memeff/_rank_statistics.py).

The backend "merged" is the CPU's kernels without what they know of ranks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import OPTIONS, Case, make_inputs, run_memeff, run_plain
from checks import (
    SHARDS,
    VOCAB,
    Ranks,
    add,
    bounds,
    raised,
    run_sharded,
    shard_inputs,
)
from statistics_checks import check_linear_loss, check_losses, check_token_statistics
from tolerances import assert_result

import memeff
from memeff import _backends, ops, statistics_ops

MERGED = "merged"


def make_merged() -> None:
    """Makes the backend known to memeff, in a process of checks."""
    ops.LIBRARIES[MERGED] = ops.LIBRARIES["cpu"]
    statistics_ops.LIBRARIES[MERGED] = statistics_ops.LIBRARIES["cpu"]
    _backends.DEVICE_TYPES[MERGED] = "cpu"


def check_loss(ranks: Ranks, case: Case, sizes: tuple[int, ...], backend: str = MERGED) -> None:
    ours = run_sharded(ranks, case, sizes, backend=backend)
    again = run_sharded(ranks, case, sizes, backend=backend)
    for name in ("loss", "dx", "dw", "db"):
        first, second = getattr(ours, name), getattr(again, name)
        assert first is None or torch.equal(first, second), f"{name} differs from run to run"
    inputs = make_inputs(case)
    plain = run_plain(case, inputs)
    exact = run_plain(replace(case, dtype=torch.float64), inputs.in_float64())
    if case.dtype in (torch.bfloat16, torch.float16) and exact.dx is not None:
        # Each rank rounds its contribution, and the sum is that of these.
        start, stop = bounds(sizes, ranks.rank)
        shared = memeff.VocabParallel(ranks.group, reduce_input_grad=False)
        part = run_memeff(
            case, shard_inputs(case, inputs, start, stop), vocab_parallel=shared, backend=backend
        ).dx
        assert part is not None and ours.dx is not None
        parts = torch.stack([other.float() for other in ranks.gather(part)])
        torch.testing.assert_close(ours.dx, parts.sum(0).to(case.dtype), rtol=2**-7, atol=1e-6)
        most = torch.finfo(case.dtype).eps * parts.abs().sum(0).norm()
        assert (parts.sum(0) - exact.dx).norm() <= most
        ours, plain, exact = (replace(result, dx=None) for result in (ours, plain, exact))
    assert_result(ours, plain, exact)


def check_refusals(ranks: Ranks) -> None:
    """What is not there raises on every rank."""
    shared = memeff.VocabParallel(ranks.group)
    for fields, text in (
        ({"class_weights": True}, "weight is given, expected class indices without class weights"),
        ({"probabilities": True}, "target holds class probabilities, expected class indices"),
    ):
        case = Case((5,), 8, 20, **fields)  # type: ignore[arg-type]
        inputs = shard_inputs(case, make_inputs(case), *bounds((12, 8), ranks.rank))
        message = raised(
            lambda case=case, inputs=inputs: run_memeff(  # type: ignore[misc]
                case, inputs, vocab_parallel=shared, backend=MERGED
            )
        )
        assert "NotImplementedError" in message and text in message, message


def check_returned(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    """The statistics that come with a loss."""
    case = Case((33,), 24, VOCAB, dtype=torch.float64, ignored=0.3, bias=True)
    whole = make_inputs(case)
    inputs = shard_inputs(case, whole, *bounds(sizes, ranks.rank))
    options = {"label_smoothing": 0.1, "return_statistics": True, "z_loss": 0.01}
    loss, ours = memeff.linear_cross_entropy(
        inputs.x, inputs.w, inputs.y, linear_bias=inputs.b, backend=MERGED,
        vocab_parallel=memeff.VocabParallel(ranks.group), **options,
    )  # type: ignore[call-overload]  # fmt: skip
    expected_loss, expected = memeff.linear_cross_entropy(
        whole.x, whole.w, whole.y, linear_bias=whole.b, **options
    )  # type: ignore[call-overload]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    for name, value, other in zip(ours._fields, ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12, msg=name)


_MORE = {
    "none": {"reduction": "none", "ignored": 0.3},
    "sum": {"reduction": "sum", "bias": True},
    "num-items": {"num_items": 91, "ignored": 0.2},
    "shift": {"shift": 2, "token_weight": True},
    "only-dx": {"differentiate": ("dx",), "bias": True},
    "only-dw": {"differentiate": ("dw",)},
    "all-ignored": {"ignored": 2.0, "reduction": "sum"},
    "ignored-class": {"ignore_index": 7, "ignored": 0.2},
}
_turns = [(size, sizes) for size in SHARDS for sizes in SHARDS[size]]
_count = 0
for _name, _fields in {**OPTIONS, **_MORE}.items():
    if _fields.get("probabilities") or _fields.get("class_weights"):
        continue
    # One of three dtypes each: the merge is the same, in float64, for all.
    _dtype = (torch.float64, torch.float32, torch.bfloat16)[_count % 3]
    _size, _sizes = _turns[_count % len(_turns)]
    _case = Case((3, 11), 24, VOCAB, dtype=_dtype, seed=_count, **_fields)  # type: ignore[arg-type]
    add(f"merged-{_name}-{_dtype}", _size, check_loss, _case, _sizes)
    _count += 1
for _size in SHARDS:
    for _dtype in (torch.float64, torch.float32):
        _sizes = SHARDS[_size][_count % 2]
        _count += 1
        add(
            f"merged-statistics-{_dtype}-{_size}", _size, check_token_statistics, _dtype, _sizes,
            2, logit_sum=True, log_sum_sq_probs=True, top_k=9, softcap=6.0, backend=MERGED,
            logit_scale=torch.tensor(0.7), temperature=torch.linspace(0.4, 2, 29),
        )  # fmt: skip
        add(
            f"merged-linear_loss-{_dtype}-{_size}", _size, check_linear_loss, _dtype, _sizes,
            "mean", MERGED,
        )  # fmt: skip
    add(f"merged-losses-{_size}", _size, check_losses, SHARDS[_size][1], MERGED)
    add(f"merged-returned-{_size}", _size, check_returned, SHARDS[_size][0])
add("merged-refusals", 2, check_refusals)
