"""One shape: times, floor, errors and peak memory of every variant."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memeff.bench.accuracy import Errors, Float64Reference
from memeff.bench.isolated import IsolatedError, call_isolated
from memeff.bench.memory import PeakMemory
from memeff.bench.problem import DTYPES, Problem, make_problem
from memeff.bench.shapes import Shape
from memeff.bench.timing import Timing, gemm_floor_call, loss_call, time_interleaved
from memeff.bench.variants import Unavailable, Variant, make_variant

# Small enough to cost nothing, large enough that the libraries load, start their threads and
# compile kernels.
WARM_UP = Shape(64, 64, 512)


@dataclass(frozen=True)
class Settings:
    """What is common to all shapes of a run."""

    dtype: str
    backward: bool
    rounds: int
    threads: int
    variants: list[str]
    device: str = "cpu"
    softcap: float | None = None
    peaked: bool = False


@dataclass
class VariantResult:
    """One row of the table; `note` says why fields are missing."""

    name: str
    timing: Timing | None = None
    errors: Errors | None = None
    extra_bytes: int | None = None
    note: str | None = None


@dataclass
class ShapeResult:
    """All rows of one shape, the GEMM floor, and the bytes of dX + dW (forward only: 0)."""

    shape: Shape
    floor: Timing
    gradient_bytes: int
    rows: list[VariantResult]


def measure_shape(shape: Shape, settings: Settings, progress: Callable[[str], None]) -> ShapeResult:
    """Runs everything for one shape; a variant that fails becomes a row with a note."""
    device = torch.device(settings.device)
    dtype = DTYPES[settings.dtype]
    progress(f"{shape} {settings.dtype}: making inputs")
    problem = make_problem(
        shape,
        dtype,
        softcap=settings.softcap,
        requires_grad=settings.backward,
        device=settings.device,
        peaked=settings.peaked,
    )
    progress(f"{shape}: float64 reference")
    reference = Float64Reference(problem, gradients=settings.backward)

    rows = [VariantResult(name) for name in settings.variants]
    ready: dict[str, Variant] = {}
    for row in rows:
        progress(f"{shape}: first call of {row.name}")
        try:
            variant = make_variant(row.name, settings.device, settings.softcap)
            _check_it_fits(variant, shape, device)
            row.errors = _first_call(variant, problem, reference, settings.backward)
            if device.type == "cuda":
                row.extra_bytes = _peak_of_a_step(variant, problem, settings)
            ready[row.name] = variant
        except (
            Exception
        ) as error:  # a peer may fail in any way; the others are still worth measuring
            row.note = _reason(error)

    floor_call = gemm_floor_call(problem, settings.backward)
    floor_call()
    candidates = {"GEMM floor": (floor_call, problem.clear_gradients)}
    for name, variant in ready.items():
        candidates[name] = (loss_call(variant, problem, settings.backward), problem.clear_gradients)
    timings = time_interleaved(
        candidates, settings.rounds, device, lambda text: progress(f"{shape}: {text}")
    )
    gradient_bytes = (problem.x.nbytes + problem.w.nbytes) if settings.backward else 0
    # Before the children start: the logits of the floor and the inputs are no longer wanted.
    del floor_call, candidates, problem
    gc.collect()

    for row in rows:
        row.timing = timings.get(row.name)
        if row.timing is not None and row.extra_bytes is None:
            progress(f"{shape}: peak memory of {row.name}")
            try:
                row.extra_bytes = call_isolated(
                    measure_peak,
                    variant=row.name,
                    shape=[shape.tokens, shape.features, shape.vocab],
                    dtype=settings.dtype,
                    backward=settings.backward,
                    threads=settings.threads,
                    softcap=settings.softcap,
                    peaked=settings.peaked,
                )
            except IsolatedError as error:
                row.note = "memory: " + _reason(error)
    return ShapeResult(shape, timings["GEMM floor"], gradient_bytes, rows)


def _peak_of_a_step(variant: Variant, problem: Problem, settings: Settings) -> int:
    """Peak bytes of one step on a GPU, whose allocator can count anew at any time."""
    gc.collect()
    step = loss_call(variant, problem, settings.backward)
    with PeakMemory(settings.device) as peak:
        step()
    problem.clear_gradients()
    return peak.extra_bytes


def measure_peak(
    variant: str,
    shape: list[int],
    dtype: str,
    backward: bool,
    threads: int,
    softcap: float | None = None,
    peaked: bool = False,
) -> int:
    """Peak bytes of one step on the CPU; call it in a process of its own."""
    torch.set_num_threads(threads)
    chosen = make_variant(variant, softcap=softcap)

    def problem_of(size: Shape) -> Problem:
        return make_problem(
            size, DTYPES[dtype], softcap=softcap, requires_grad=backward, peaked=peaked
        )

    problem = problem_of(Shape(*shape))
    # Compiling takes more memory than the step and happens once per shape, so such a variant warms
    # up at full size.
    warm_up = problem if chosen.compiled else problem_of(WARM_UP)
    loss_call(chosen, warm_up, backward)()
    warm_up.clear_gradients()
    del warm_up
    gc.collect()
    step = loss_call(chosen, problem, backward)
    with PeakMemory() as peak:
        step()
    return peak.extra_bytes


def _check_it_fits(variant: Variant, shape: Shape, device: torch.device) -> None:
    needed = variant.bytes_per_logit * shape.logits
    available = available_bytes(device)
    if needed > available:
        raise Unavailable(
            f"needs about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free"
        )


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now, in bytes."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no line MemAvailable; expected Linux")


def _first_call(
    variant: Variant, problem: Problem, reference: Float64Reference, backward: bool
) -> Errors:
    """Warms the variant up at full size and compares what it computes."""
    with torch.set_grad_enabled(backward):
        loss = variant.loss(problem.x, problem.w, problem.y, problem.softcap)
    if backward:
        loss.backward()
    errors = reference.errors(loss.detach(), problem.x.grad, problem.w.grad)
    problem.clear_gradients()
    return errors


def _reason(error: Exception) -> str:
    """One line: the message of our own errors, the type too of anyone else's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, Unavailable):
        return lines[0]
    return f"{type(error).__name__}: {lines[-1] if isinstance(error, IsolatedError) else lines[0]}"[
        :160
    ]
