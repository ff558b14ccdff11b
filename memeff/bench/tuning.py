"""memeff-tune: which CUDA kernels are right and fast on this machine.

Every family of kernels (the candidates of choices.py that share a name) runs in a process of its
own, within a time limit: its results are compared with float64 on ragged shapes, then whole calls
are timed. A family that crashes, hangs or computes a wrong number is not used on this machine. The
outcome is a file (memeff/_tuned.py) that every process reads when it loads memeff.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memeff import _library, _tuned, planning
from memeff.bench.choices import MOST_ERROR_RATIO, candidates, fastest
from memeff.bench.isolated import IsolatedError, IsolatedTimeout, call_isolated
from memeff.bench.problem import DTYPES, Problem, make_problem
from memeff.bench.shapes import MODELS, Shape, parse_shape
from memeff.bench.timing import cache_flusher, time_once
from memeff.functional import linear_cross_entropy

# A choice serves shapes within a factor of 4: heads of large and of small models.
DEFAULT_SHAPES = (Shape(8192, 4096, 128256), Shape(2048, 2048, 32768))
DEFAULT_SECONDS = 120.0
_FAMILY_SECONDS = 60.0
_LEAST_SECONDS = 5.0  # a process needs them to begin with
_ROUNDS = 7
_SKIP_MASS = 1e-3
# Differences of whole calls at full size from the generic kernels' results.
_MOST_DIFFERENCE = 0.02

_VARIABLE = "MEMEFF_CUDA_KERNELS"

# Ragged, with and without what makes other plans and other kernels: [N, D, V] and options.
_CASES: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
    ((1000, 264, 5003), {}),
    ((1000, 264, 5003), {"reduction": "none", "label_smoothing": 0.1}),
    ((2049, 136, 3000), {"softcap": 20.0, "chunk_size": 256}),
    ((300, 1032, 20011), {"memory_budget": 24 * 2**20}),
)


@dataclass(frozen=True)
class Tuning:
    """What `tune` has found; ``str(tuning)`` is a readable summary."""

    gpu: str
    families: dict[str, str]
    """By name: "verified", or what went wrong."""
    choices: list[dict[str, Any]]
    """The fastest kernels by dtype, shape, and whether tiles are skipped, with all times."""
    file: Path

    def __str__(self) -> str:
        lines = [f"{self.gpu}; written to {self.file}"]
        lines += [f"  {name:<8} {state}" for name, state in self.families.items()]
        for choice in self.choices:
            times = sorted(choice["seconds"].items(), key=lambda item: item[1])
            shown = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times)
            shape = f"{choice['tokens']}x{choice['features']}x{choice['vocab']}"
            skips = ", skip_mass" if choice["skips"] else ""
            lines.append(f"  {shape} {choice['dtype']}{skips}: {choice['kernels']} ({shown})")
        return "\n".join(lines)


@dataclass(frozen=True)
class Machine:
    """Where kernels run: a GPU, or what stands in for one in a test.

    prepare: "module:function" that a process calls first.
    """

    gpu: str
    capability: int
    device: str
    backend: str = "cuda"
    prepare: str | None = None
    family_seconds: float = _FAMILY_SECONDS
    cases: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = _CASES


def tune(
    shapes: Iterable[tuple[int, int, int]] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | int | None = None,
    seconds: float = DEFAULT_SECONDS,
    file: str | Path | None = None,
    progress: Callable[[str], None] = print,
) -> Tuning:
    """Verify and time every family of CUDA kernels on this machine's GPU, each in a process of its
    own, and write the outcome to a file. Processes that load memeff afterwards use the fastest
    kernels that are right; without such a file the generic kernels (cuBLAS) run.

    Args:
        shapes: (tokens, features, classes) of the calls to time. A choice serves calls of the same
            dtype whose sizes each differ by no more than a factor of 4. None: 8192 x 4096 x 128256
            and 2048 x 2048 x 32768.
        dtype: of the calls, torch.bfloat16 or torch.float16.
        device: the GPU; None: the current one. Others of the same name share its result.
        seconds: in all, about.
        file: where the outcome goes; None: the environment variable MEMEFF_TUNE_FILE, else
            memeff/tuned.json in the user's cache folder.
        progress: gets a line whenever a family is done.

    Raises:
        ValueError: a dtype, shape or time that does not suit.
        RuntimeError: there is no GPU that torch can use, or the generic kernels fail.
    """
    sizes = [Shape(*shape) for shape in shapes] if shapes is not None else list(DEFAULT_SHAPES)
    if not sizes or any(min(s.tokens, s.features, s.vocab) < 1 for s in sizes):
        raise ValueError(f"shapes is {shapes!r}, expected (tokens, features, classes), each > 0")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}, expected torch.bfloat16 or torch.float16")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}, expected more than 0")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "memeff-tune needs a GPU, and torch finds none (python -m memeff.diagnostics reports "
            "why)"
        )
    place = torch.device("cuda" if device is None else device)
    if place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(place)
    capability = 10 * properties.major + properties.minor
    machine = Machine(properties.name, capability, str(place))
    name = str(dtype).removeprefix("torch.")
    return tune_machine(machine, sizes, name, seconds, file, progress)


def tune_machine(
    machine: Machine,
    shapes: Sequence[Shape],
    dtype: str,
    seconds: float,
    file: str | Path | None,
    progress: Callable[[str], None],
) -> Tuning:
    """`tune` on any machine."""
    deadline = time.monotonic() + seconds
    states: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}  # by kernels, "sm90,generic"
    target = Path(file) if file is not None else _tuned.tune_file()
    choices: list[dict[str, Any]] = []
    for family, kernels in _families(machine.capability).items():
        usable = [pair for pair in kernels if _usable(pair, family, states)]
        started = time.monotonic()
        states[family], measured = _run(
            machine, usable, shapes, dtype, deadline - started, found.get("generic,generic")
        )
        if states[family] == _tuned.VERIFIED:
            found |= measured
        progress(f"{family:<8} {states[family]} ({time.monotonic() - started:.0f} s)")
        if family == "generic" and states[family] != _tuned.VERIFIED:
            raise RuntimeError(
                f"the generic kernels, which run by default, fail on {machine.gpu}: "
                f"{states[family]}. Please report this with the output of python -m "
                "memeff.diagnostics"
            )
        choices = _choices(found, shapes, dtype)
        # At once: whatever ends this process leaves what was found.
        _tuned.write(target, _result(machine, states, choices))
    return Tuning(machine.gpu, states, choices, target)


def _choices(
    found: dict[str, dict[str, Any]], shapes: Sequence[Shape], dtype: str
) -> list[dict[str, Any]]:
    """The fastest of the kernels at every call that they were timed at."""
    choices = []
    for index, (shape, skips) in enumerate(_calls(shapes)):
        times = {
            pair: results["seconds"][index]
            for pair, results in found.items()
            if results["seconds"][index] is not None
        }
        if "generic,generic" in times:
            choices.append(
                {"dtype": dtype, "tokens": shape.tokens, "features": shape.features,
                 "vocab": shape.vocab, "skips": skips, "kernels": fastest(times),
                 "seconds": times}
            )  # fmt: skip
    return choices


def _result(
    machine: Machine, states: dict[str, str], choices: list[dict[str, Any]]
) -> _tuned.Result:
    info = _library.load().build_info()
    return {
        "gpu": machine.gpu,
        "capability": machine.capability,
        "driver": _tuned.driver(),
        "build": _tuned.build(info, _library.extension_file()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "families": states,
        "choices": choices,
    }


def _families(capability: int) -> dict[str, list[str]]:
    """Kernels to compare, "scores,products", by their family: that of the two whose name comes
    later. The generic ones come first, as all others are compared with them; then the older the
    architecture, the less can go wrong."""
    pairs = [pair.split("+") for skips in (False, True) for pair in candidates(capability, skips)]
    names = sorted({"generic", *(name for pair in pairs for name in pair)})
    families: dict[str, list[str]] = {name: [] for name in names}
    families["generic"] = ["generic,generic"]
    for pair in pairs:
        family = families[max(pair, key=names.index)]
        if ",".join(pair) not in family:
            family.append(",".join(pair))
    return families


def _usable(kernels: str, family: str, states: dict[str, str]) -> bool:
    """Whether no part of other families has failed."""
    return all(
        name == family or states.get(name, _tuned.VERIFIED) == _tuned.VERIFIED
        for name in kernels.split(",")
    )


def _calls(shapes: Sequence[Shape]) -> list[tuple[Shape, bool]]:
    """What is timed: every shape, then every shape with `skip_mass`."""
    return [(shape, skips) for skips in (False, True) for shape in shapes]


def _run(
    machine: Machine, kernels: list[str], shapes: Sequence[Shape], dtype: str, seconds: float,
    generic: dict[str, Any] | None,
) -> tuple[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """A family in a process of its own: its state, and by kernels what measure_family returns."""
    if seconds < _LEAST_SECONDS:
        return "not run: no time was left", {}
    if not kernels:
        return "not run: it needs a family that failed", {}
    limit = min(machine.family_seconds, seconds)
    try:
        measured: dict[str, dict[str, Any]] = call_isolated(
            measure_family, time_limit=limit, kernels=kernels, cases=machine.cases,
            shapes=[(s.tokens, s.features, s.vocab) for s in shapes], dtype=dtype,
            device=machine.device, backend=machine.backend, capability=machine.capability,
            prepare=machine.prepare, seconds=0.6 * limit,
        )  # fmt: skip
    except IsolatedTimeout:
        return f"hang: not done after {limit:.0f} s", {}
    except IsolatedError as error:
        return f"crash: {str(error).splitlines()[-1][:200]}", {}
    for pair, results in measured.items():
        if "wrong" in results:
            return f"wrong number: {results['wrong']} ({pair})", {}
        difference = _difference(results, generic) if generic else None
        if difference:
            return f"wrong number: {difference} ({pair})", {}
    return _tuned.VERIFIED, measured


def _difference(results: dict[str, Any], generic: dict[str, Any]) -> str | None:
    """Where the results of whole calls are not those of the generic kernels."""
    for own, expected in zip(results["digests"], generic["digests"], strict=True):
        if own is None or expected is None:
            continue
        for name, (value, size) in own.items():
            if not abs(value - expected[name][0]) <= _MOST_DIFFERENCE * max(size, 1e-30):
                return f"{name} at full size is not that of the generic kernels"
    return None


# ---- in a process of its own ----


def measure_family(
    kernels: list[str], cases: list[Any], shapes: list[list[int]], dtype: str, device: str,
    backend: str, capability: int, prepare: str | None, seconds: float,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """By kernels: "wrong", if results of the cases are not right; else, per call of _calls,
    "seconds" and "digests" (each None where the call does not fit or other kernels serve it)."""
    if prepare is not None:
        module, _, function = prepare.partition(":")
        getattr(importlib.import_module(module), function)()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    deadline = time.monotonic() + seconds
    measured: dict[str, dict[str, Any]] = {}
    for pair in kernels:
        os.environ[_VARIABLE] = pair
        for sizes, options in cases:
            wrong = _check(Shape(*sizes), options, dtype, device, backend)
            if wrong is not None:
                return {pair: {"wrong": wrong}}
        measured[pair] = {"seconds": [], "digests": []}
    for sizes, skips in _calls([Shape(*sizes) for sizes in shapes]):
        for pair in kernels:
            os.environ[_VARIABLE] = pair
            timed = None
            if time.monotonic() < deadline and _serves(pair, sizes, dtype, capability, skips):
                timed = _time(sizes, skips, dtype, device, backend)
            measured[pair]["seconds"].append(timed and timed[0])
            measured[pair]["digests"].append(timed and timed[1])
    return measured


def _serves(kernels: str, shape: Shape, dtype: str, capability: int, skips: bool) -> bool:
    chosen = planning.plan(
        shape.tokens, shape.features, shape.vocab, dtype, backend="cuda",
        compute_capability=divmod(capability, 10), skip_mass=_SKIP_MASS if skips else 0.0,
    )  # fmt: skip
    return chosen.kernels == kernels


def _check(
    shape: Shape, options: dict[str, Any], dtype: str, device: str, backend: str
) -> str | None:
    """What is wrong with the loss and the gradients of a call, or None."""
    problem = make_problem(
        shape, DTYPES[dtype], device=device, seed=shape.tokens, requires_grad=False
    )
    x, w, y = problem.x, problem.w, problem.y
    y[::7] = -100  # ignored, as is
    x[0] = torch.inf
    counted = (y != -100)[:, None]
    upstream = torch.rand(shape.tokens, dtype=torch.float64, device=device) + 0.5

    def results(
        precision: torch.dtype, loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        leaves = [tensor.to(precision, copy=True).requires_grad_() for tensor in (x, w)]
        loss = loss_of(*leaves)
        weights = upstream.to(loss.dtype) if loss.dim() else None
        gradients = torch.autograd.grad(loss, leaves, weights)
        if precision != torch.float64:
            gradients = tuple(gradient.to(x.dtype) for gradient in gradients)
        named = zip(("loss", "grad_input", "grad_weight"), (loss, *gradients), strict=True)
        return {name: result.detach().double() for name, result in named}

    def plain(x: Tensor, w: Tensor) -> Tensor:
        z = torch.where(counted, x, 0) @ w.T
        if cap := options.get("softcap"):
            z = cap * torch.tanh(z / cap)
        return F.cross_entropy(
            z, y, reduction=options.get("reduction", "mean"),
            label_smoothing=options.get("label_smoothing", 0.0),
        )  # fmt: skip

    exact, rounded = results(torch.float64, plain), results(torch.float32, plain)
    ours = results(x.dtype, lambda x, w: linear_cross_entropy(x, w, y, backend=backend, **options))
    for name, expected in exact.items():
        size = expected.norm()
        error, usual = ((value[name] - expected).norm() / size for value in (ours, rounded))
        slack = 1e-6 if name == "loss" else torch.finfo(DTYPES[dtype]).eps
        if not error <= MOST_ERROR_RATIO * usual + slack:
            what = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
            return f"{name} of {shape} ({what}) errs by {error:.1e}, plain PyTorch by {usual:.1e}"
    return None


def _time(
    shape: Shape, skips: bool, dtype: str, device: str, backend: str
) -> tuple[float, dict[str, tuple[float, float]] | None] | None:
    """Median seconds of a forward and backward pass, and the digest of its results; None: it does
    not fit."""
    try:
        problem = make_problem(shape, DTYPES[dtype], device=device, peaked=skips)

        loss = torch.zeros(())

        def step() -> None:
            nonlocal loss
            problem.clear_gradients()
            loss = linear_cross_entropy(
                problem.x, problem.w, problem.y, skip_mass=_SKIP_MASS if skips else 0.0,
                backend=backend,
            )  # fmt: skip
            loss.backward()

        step()
        # What skipping leaves out is bounded, but not by the size of small gradients.
        digest = None if skips else _digest(loss.detach(), problem)
        place = torch.device(device)
        flush = cache_flusher(place)
        times = []
        for _ in range(_ROUNDS if place.type == "cuda" else 1):
            flush()
            times.append(time_once(step, place))
    except torch.OutOfMemoryError:
        return None
    return statistics.median(times), digest


def _digest(loss: Tensor, problem: Problem) -> dict[str, tuple[float, float]]:
    """Of each result a number that depends on all its elements, and its size."""
    digest = {"loss": (loss.item(), abs(loss.item()))}
    for name, gradient in (("grad_input", problem.x.grad), ("grad_weight", problem.w.grad)):
        assert gradient is not None
        generator = torch.Generator(gradient.device).manual_seed(1)
        signs = torch.randn(gradient.shape[1], generator=generator, device=gradient.device)
        sums = (gradient @ signs.to(gradient.dtype)).float()
        signs = torch.randn(gradient.shape[0], generator=generator, device=gradient.device)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).item()
        digest[name] = ((sums @ signs).item(), norm)
    return digest


# ---- the console script ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="memeff-tune",
        description="Verifies and times every family of memeff's CUDA kernels on this machine's "
        "GPU. From then on memeff uses the fastest that are right; without, cuBLAS's products.",
    )
    parser.add_argument(
        "--shape", action="append", default=[], metavar="N,D,V",
        help="tokens, features, classes of a call to time (repeatable; default: two)",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="append", default=[], choices=sorted(MODELS), metavar="NAME",
        help="head of a known model (repeatable): " + ", ".join(sorted(MODELS)),
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=8192, help="N for --model (default %(default)s)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", help="such as cuda:1 (default: the current one)")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT_SECONDS, help="in all (default %(default).0f)"
    )
    parser.add_argument(
        "--json", metavar="PATH", help="where the outcome goes (default: the user's cache folder)"
    )
    options = parser.parse_args(arguments)
    heads = [MODELS[name] for name in options.model]
    try:
        shapes = [parse_shape(text) for text in options.shape]
        shapes += [Shape(options.tokens, head.features, head.vocab) for head in heads]
        tuning = tune(
            [(s.tokens, s.features, s.vocab) for s in shapes] or None,
            dtype=DTYPES[options.dtype], device=options.device, seconds=options.seconds,
            file=options.json,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(f"memeff-tune: {error}", file=sys.stderr)
        return 1
    print(tuning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
