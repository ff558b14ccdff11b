#!/usr/bin/env python3
"""Random calls of any size, options, budget and inputs, under the tolerance rule.

    python tests/fuzz/fuzz.py --seconds 600                      on the CPU
    python tests/fuzz/fuzz.py --seconds 600 --backend emulated   the CUDA kernels, emulated
    python tests/fuzz/fuzz.py --only 1234                        one call again, as a failure says

Each seed is one call: features up to 1500, classes over several slices, every option and dtype,
memory budgets from the minimum upward, impossible classes, ignored tokens whose hidden states are
NaN, tokens that are NaN. Forward and backward must accept the same budget. Memory starts as NaN.

A call that is out of tolerance is repeated on other numbers, and judged by all of them together
(tolerances.assert_over_draws). Anything else, an exception for example, fails at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch
from cases import DTYPES, Case, Inputs, make_inputs, run_memeff, run_plain
from test_token_statistics import DIFFERENTIABLE, Problem
from test_token_statistics import comparisons as statistics_comparisons
from tolerances import Comparison, assert_over_draws, compare_results

MOST_FEATURES, MOST_CLASSES, MOST_TOKENS = 1500, 9000, 700
# N D V: products take tens of milliseconds on a CPU; the emulator calls a function per access.
MOST_WORK = {"cpu": 3e7, "emulated": 1.5e5}
KERNELS = {
    "cpu": ("bf16_portable", "blas"),
    "emulated": (
        "generic,generic", "sm80,generic", "sm80,sm80", "sm90,generic", "sm90,sm90",
        "sm90x2,sm90x2", "sm90,sm90rs",
    ),
}  # fmt: skip
VARIABLE = {"cpu": "MEMEFF_CPU_KERNELS", "emulated": "MEMEFF_CUDA_KERNELS"}


@dataclass(frozen=True)
class Call:
    """Of linear_cross_entropy, or with `targets` of linear_token_statistics."""

    case: Case
    kernels: str
    budget: float | None = None  # in minimal budgets
    impossible: float = 0.0  # share of the classes whose bias is -inf
    poison_ignored: bool = False  # hidden states of ignored tokens are NaN
    bad_token: bool = False  # one token is NaN
    targets: int | None = None  # per token
    differentiable: tuple[str, ...] = ()
    threads: int = 1


def _size(rng: random.Random, most: int) -> int:
    """Of any order of magnitude; often next to a multiple that kernels like."""
    size = round(math.exp(rng.uniform(0, math.log(most))))
    if rng.random() < 0.4:
        step = rng.choice([8, 16, 32, 64, 128, 224, 256, 512])
        size = (size + step - 1) // step * step + rng.choice([-1, 0, 0, 1])
    return max(1, min(size, most))


def draw(seed: int, backend: str, most_work: float | None = None) -> Call:
    """The call of that seed. ``most_work``: N D V, MOST_WORK where it is None."""
    rng = random.Random(seed)
    work = most_work or MOST_WORK[backend]
    features, vocab = _size(rng, MOST_FEATURES), _size(rng, MOST_CLASSES)
    while features * vocab > work:
        features, vocab = (features + 1) // 2, vocab * 2 // 3
    tokens = max(1, min(_size(rng, MOST_TOKENS), int(work) // (features * vocab)))
    dtype = rng.choice(DTYPES)
    probabilities = vocab > 1 and rng.random() < 0.1
    impossible = rng.choice([0.0, 0.0, 0.0, 0.2]) if vocab > 10 and not probabilities else 0.0
    smoothing = 0.0 if impossible else rng.choice([0.0, 0.0, 0.1, 0.9])
    wide = torch.promote_types(dtype, torch.float32)
    lead: tuple[int, ...] = (tokens,)
    shift = 0
    if rng.random() < 0.2 and tokens > 4:
        lead = (2, tokens // 2)
        shift = 0 if probabilities else rng.choice([0, 1])
    reduction = rng.choice(["mean", "sum", "none"])
    ignored = 0.0 if probabilities else rng.choice([0.0, 0.1, 0.8])
    case = Case(
        lead=lead,
        features=features,
        vocab=vocab,
        dtype=dtype,
        reduction=reduction,
        bias=impossible > 0 or rng.random() < 0.5,
        class_weights=rng.random() < 0.2,
        label_smoothing=smoothing,
        probabilities=probabilities,
        ignored=ignored,
        softcap=rng.choice([None, None, None, 4.0, 30.0]),
        logit_scale=rng.choice([1.0, 1.0, 0.4, -1.5 if impossible == 0 else 1.5]),
        z_loss=rng.choice([0.0, 0.0, 1e-3]),
        token_weight=rng.random() < 0.2,
        num_items=rng.choice([None, None, 5]) if reduction == "mean" else None,
        shift=shift,
        spread=rng.choice([0.3, 3.0]),
        input_layout=rng.choice(["contiguous", "contiguous", "padded", "transposed"]),
        weight_layout=rng.choice(["contiguous", "contiguous", "padded", "transposed"]),
        chunk_size=rng.choice([None, None, None, 1, 40, 300]),
        accum_dtype=rng.choice([None, None, wide]),
        differentiate=rng.choice(
            [("dx", "dw", "db"), ("dx", "dw", "db"), ("dx",), ("dw",), ("db",), ("dx", "db"), ()]
        ),
        seed=rng.randrange(2**31),
    )
    most_targets = 1 if backend == "emulated" else 6
    statistics = rng.random() < 0.2
    return Call(
        case,
        kernels=rng.choice(KERNELS[backend]),
        budget=rng.choice([None, None, 1.0, 1.001, 1.1, 1.5, 3.0]),
        impossible=impossible,
        poison_ignored=ignored > 0 and shift == 0 and rng.random() < 0.3,
        bad_token=rng.random() < 0.05,
        targets=rng.choice([1, most_targets]) if statistics else None,
        differentiable=rng.choice([DIFFERENTIABLE, DIFFERENTIABLE, ("logprob",), ("entropy",)]),
        threads=rng.choice([1, 2]),
    )


@contextlib.contextmanager
def _surroundings(call: Call, backend: str) -> Iterator[None]:
    """Kernels, threads, memory full of NaN, and the emulator's reports."""
    before = torch.get_num_threads(), os.environ.get(VARIABLE[backend])
    os.environ[VARIABLE[backend]] = call.kernels
    torch.set_num_threads(call.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with contextlib.ExitStack() as stack:
            if backend == "emulated":
                import emulated

                stack.enter_context(emulated.checked())
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before[0])
        if before[1] is None:
            del os.environ[VARIABLE[backend]]
        else:
            os.environ[VARIABLE[backend]] = before[1]


def _minimum(error: ValueError) -> int:
    return int(str(error).split("the minimum is ")[1].split()[0])


def _inputs(call: Call) -> tuple[Inputs, Inputs]:
    """For memeff and for the plain side, where nothing is NaN that is not looked at."""
    inputs = make_inputs(call.case)
    rng = torch.Generator().manual_seed(call.case.seed + 1)
    if call.impossible:
        assert inputs.b is not None
        masked = torch.rand(call.case.vocab, generator=rng) < call.impossible
        masked[0] = False
        inputs.b.masked_fill_(masked, -math.inf)
        counted = inputs.y != call.case.kept_ignore_index
        hit = masked[inputs.y.long().where(counted, 0)] & counted
        inputs.y[hit] = 0
    if call.bad_token:  # one that counts: plain PyTorch looks at those that are ignored
        shift = call.case.shift
        place = (inputs.x.shape[-2] - shift) // 2
        inputs.x.select(-2, place).fill_(math.nan)
        if not call.case.probabilities:
            inputs.y.select(-1, place + shift).fill_(0)
    ours = replace(inputs, x=inputs.x.clone()) if call.poison_ignored else inputs
    if call.poison_ignored:
        ignored = inputs.y == call.case.kept_ignore_index
        ours.x[ignored] = math.nan
        inputs.x[ignored] = 0
    return ours, inputs


def _compare_cross_entropy(call: Call, backend: str) -> list[Comparison]:
    case = call.case
    ours, plain = _inputs(call)
    options = {"backend": backend}
    if call.budget is not None:
        try:
            run_memeff(case, ours, memory_budget=1, **options)
            return []  # nothing to compute
        except ValueError as error:
            options["memory_budget"] = int(_minimum(error) * call.budget)
    exact = run_plain(replace(case, dtype=torch.float64), plain.in_float64())
    return compare_results(run_memeff(case, ours, **options), run_plain(case, plain), exact)


def _compare_statistics(call: Call, backend: str) -> list[Comparison]:
    case = call.case
    torch.manual_seed(case.seed)
    p = Problem(
        math.prod(case.lead), case.features, case.vocab, targets=call.targets, dtype=case.dtype,
        bias=case.bias, ignored=case.ignored, spread=case.spread,
    )  # fmt: skip
    planning = {"backend": backend, "chunk_size": case.chunk_size}
    if call.budget is not None:
        try:
            p.ours(memory_budget=1, softcap=case.softcap, **planning)
            return []
        except ValueError as error:
            planning["memory_budget"] = int(_minimum(error) * call.budget)
    return statistics_comparisons(
        p, call.differentiable, planning, softcap=case.softcap, logit_scale=case.logit_scale
    )


def check(call: Call, backend: str) -> None:
    """Raises AssertionError, or what the library raised."""

    def draw_inputs(i: int) -> list[Comparison]:
        other = replace(call, case=replace(call.case, seed=call.case.seed + i))
        with _surroundings(other, backend):
            run = _compare_cross_entropy if call.targets is None else _compare_statistics
            return run(other, backend)

    assert_over_draws(draw_inputs)


def check_seed(seed: int, backend: str, most_work: float | None = None) -> None:
    """A failure says how to repeat it."""
    call = draw(seed, backend, most_work)
    try:
        check(call, backend)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            command = f"python tests/fuzz/fuzz.py --backend {backend} --only {seed}"
            command += f" --most-work {most_work:g}" if most_work else ""
            print(f"FAILED: {command}\n  {call}\n  {type(error).__name__}: {error}", flush=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=60, help="time limit (default 60)")
    parser.add_argument("--backend", choices=sorted(KERNELS), default="cpu")
    parser.add_argument("--seed", type=int, default=None, help="the first; default: the time")
    parser.add_argument("--most-work", type=float, default=None, help="tokens x features x classes")
    parser.add_argument("--only", type=int, default=None, help="this one, with its traceback")
    arguments = parser.parse_args()
    if arguments.backend == "emulated":
        import emulated

        emulated.load()
    if arguments.only is not None:
        print(draw(arguments.only, arguments.backend, arguments.most_work))
        check_seed(arguments.only, arguments.backend, arguments.most_work)
        return 0
    first = int(time.time()) * 1000 if arguments.seed is None else arguments.seed
    end = time.monotonic() + arguments.seconds
    seed, failures = first, 0
    while time.monotonic() < end:
        try:
            check_seed(seed, arguments.backend, arguments.most_work)
        except Exception:
            failures += 1
        seed += 1
    print(f"{seed - first} calls on {arguments.backend}, from seed {first}; {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
