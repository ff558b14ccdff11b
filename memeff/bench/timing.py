"""Interleaved timing: each round runs every candidate once, so that all see the same machine.

On a CUDA device a call is timed by events on its stream, after the L2 cache has been overwritten:
in training, too, something else ran in between.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from memeff.bench.problem import Problem
from memeff.bench.variants import Variant

# A candidate this many times slower than the first one joins only the first _SLOW_ROUNDS rounds.
_SLOW = 4.0
_SLOW_ROUNDS = 3

Call = Callable[[], None]


@dataclass
class Timing:
    """Seconds of each round, and what is reported of them."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range in seconds; 0 from a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def time_once(call: Call, device: torch.device) -> float:
    """Seconds of one call, the device's queue empty before and after."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cache_flusher(device: torch.device) -> Call:
    """What empties the L2 cache of a CUDA device; does nothing for the CPU, whose caches other
    candidates of the round have filled."""
    if device.type != "cuda":
        return lambda: None
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)

    def flush() -> None:
        scratch.zero_()

    return flush


def time_interleaved(
    candidates: Mapping[str, tuple[Call, Call]],
    rounds: int,
    device: torch.device,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Times `candidates` (name -> (call, reset)), all warmed up before, over `rounds` rounds.

    `reset` runs before each call, outside the clock, as does the flushing of a GPU's cache. The
    order is turned by one each round, so that none always runs behind the same neighbour. The
    first candidate is the yardstick for leaving slow ones out of later rounds.
    """
    names = list(candidates)
    flush_cache = cache_flusher(device)
    timings = {name: Timing() for name in names}
    for turn in range(rounds):
        offset = turn % len(names)
        for name in names[offset:] + names[:offset]:
            yardstick, own = timings[names[0]].seconds, timings[name].seconds
            if turn >= _SLOW_ROUNDS and own and min(own) > _SLOW * min(yardstick):
                continue
            on_progress(f"timing: round {turn + 1} of {rounds}, {name}")
            call, reset = candidates[name]
            reset()
            flush_cache()
            own.append(time_once(call, device))
            reset()
    return timings


def loss_call(variant: Variant, problem: Problem, backward: bool) -> Call:
    """One step of `variant`: the loss and, with `backward`, gradients into x.grad and w.grad."""

    def forward_and_backward() -> None:
        variant.loss(problem.x, problem.w, problem.y, problem.softcap).backward()

    def forward_only() -> None:
        with torch.no_grad():
            variant.loss(problem.x, problem.w, problem.y, problem.softcap)

    return forward_and_backward if backward else forward_only


def gemm_floor_call(problem: Problem, backward: bool) -> Call:
    """The bare matrix products no exact method can do without, into outputs allocated beforehand.

    logits [N, V] = x w^T; with `backward` also dx [N, D] = dlogits w and dw [V, D] = dlogits^T x,
    all in the inputs' dtype. The logits stand in for dlogits: a product's time does not depend on
    the values.
    """
    x, w = problem.x.detach(), problem.w.detach()
    logits = x.new_empty(problem.shape.tokens, problem.shape.vocab)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def products() -> None:
        torch.mm(x, w.T, out=logits)
        if backward:
            torch.mm(logits, w, out=dx)
            torch.mm(logits.T, x, out=dw)

    return products


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one middling matrix product, best of three: what the default run is sized by."""
    n, d, v = 512, 512, 4096
    x = torch.ones(n, d, dtype=dtype, device=device)
    w = torch.ones(v, d, dtype=dtype, device=device)
    out = torch.empty(n, v, dtype=dtype, device=device)

    def product() -> None:
        torch.mm(x, w.T, out=out)

    product()
    return 2 * n * d * v / min(time_once(product, device) for _ in range(3))
