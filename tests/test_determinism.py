"""The same bits from the same inputs, on as many threads as torch was told to use and no more."""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from cases import Case, compact_budget, make_inputs, run_memeff
from tolerances import Result

import memeff
from memeff.bench.isolated import call_isolated

CASES = [
    Case(
        (700,), 48, 3001, dtype=dtype, reduction=reduction, bias=True, ignored=0.2, chunk_size=chunk
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for reduction in ("mean", "none")
    for chunk in (None, 64)
]
COMPACT = Case((1500,), 96, 5000, dtype=torch.bfloat16, bias=True, ignored=0.2)


def assert_same_bits(a: Result, b: Result) -> None:
    for name in ("loss", "dx", "dw", "db"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("case", [*CASES, COMPACT], ids=str)
def test_run_to_run(case: Case) -> None:
    if case is COMPACT:
        case = replace(case, memory_budget=compact_budget(case))
    inputs = make_inputs(case)
    first = run_memeff(case, inputs)
    for _ in range(4):
        # Other memory for inputs and outputs, at another alignment.
        held = torch.empty(torch.randint(1, 5000, ()).item())
        assert_same_bits(first, run_memeff(case, make_inputs(case)))
        del held


def products_depend_on_threads() -> bool:
    """Whether torch's own products of few tokens have other bits on other numbers of threads, as
    MKL's do on some processors without AVX-512."""
    weight = torch.randn(3001, 48)
    for tokens in (1, 8, 24, 60, 64, 188, 256):
        hidden = torch.randn(tokens, 48)
        torch.set_num_threads(1)
        alone = torch.mm(weight, hidden.t())
        for count in (2, 3):
            torch.set_num_threads(count)
            if not torch.equal(alone, torch.mm(weight, hidden.t())):
                return True
    return False


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("case", "kernels"),
    [(case, None) for case in CASES]
    + [(case, "bf16_portable") for case in CASES if case.dtype == torch.bfloat16],
    ids=str,
)
def test_whatever_the_number_of_threads(
    case: Case, kernels: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels is not None:
        monkeypatch.setenv("MEMEFF_CPU_KERNELS", kernels)
    else:
        plan = memeff.plan(math.prod(case.lead), case.features, case.vocab, case.dtype)
        if "blas" in plan.kernels and products_depend_on_threads():
            pytest.skip("torch's products have other bits on other numbers of threads here")
    inputs = make_inputs(case)
    torch.set_num_threads(1)
    alone = run_memeff(case, inputs)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same_bits(alone, run_memeff(case, inputs))


def test_inputs_are_left_alone() -> None:
    case = Case(
        (130,), 24, 301, dtype=torch.bfloat16, bias=True, class_weights=True, token_weight=True
    )
    inputs, untouched = make_inputs(case), make_inputs(case)
    run_memeff(case, inputs)
    for name in inputs.__dataclass_fields__:
        assert torch.equal(getattr(inputs, name), getattr(untouched, name)), name


def cpu_seconds_per_second(threads: int) -> float:
    """Processor time by wall-clock time of a few steps on `threads` threads."""
    torch.set_num_threads(threads)
    case = Case((512,), 256, 8192, dtype=torch.float32)
    inputs = make_inputs(case)
    run_memeff(case, inputs)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(3):
        run_memeff(case, inputs)
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def test_one_thread_means_one_thread() -> None:
    assert call_isolated(cpu_seconds_per_second, threads=1) < 1.15


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core only")
def test_other_python_threads_run_meanwhile() -> None:
    """The op gives up the GIL: a thread that wakes every millisecond goes on doing so."""
    case = Case((2048,), 256, 16384, dtype=torch.float32, differentiate=())
    inputs = make_inputs(case)
    run_memeff(case, inputs)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    run_memeff(case, inputs)
    end = time.perf_counter()
    stop.set()
    ticker.join()
    during = sum(begin < moment < end for moment in ticks)
    assert end - begin > 0.05, "the step is too short to tell"
    # The machine may be busy; a held GIL gives 0 or 1.
    assert during > 0.05 * (end - begin) / 0.001, f"{during} wake-ups in {end - begin:.2f} s"
