"""What the processes of a launch check, each against one process with the whole vocabulary.

Here are the ranks, the list of checks, and those of linear_cross_entropy.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from cases import OPTIONS, Case, Inputs, make_inputs, run_memeff, run_plain
from tolerances import Result, assert_result
from torch.utils.flop_counter import FlopCounterMode

import memeff
from memeff.bench.memory import PeakMemory


@dataclass(frozen=True)
class Ranks:
    group: Any
    impatient: Any  # the same with a short timeout
    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


# Classes of each rank: uneven, and some ranks without any. Tiles have 224 classes.
SHARDS = {
    2: ((300, 231), (0, 531)),
    3: ((7, 0, 524), (224, 224, 83)),
    4: ((1, 260, 0, 270), (133, 133, 133, 132)),
}
VOCAB = 531


def shard_of(tensor: torch.Tensor | None, start: int, stop: int, dim: int = 0) -> Any:
    return None if tensor is None else tensor.narrow(dim, start, stop - start).clone()


def shard_inputs(case: Case, inputs: Inputs, start: int, stop: int) -> Inputs:
    """The same with one rank's rows of everything that has a row or an entry per class."""
    y = shard_of(inputs.y, start, stop, -1) if case.probabilities else inputs.y
    return replace(
        inputs,
        w=shard_of(inputs.w, start, stop),
        b=shard_of(inputs.b, start, stop),
        class_weights=shard_of(inputs.class_weights, start, stop),
        y=y,
    )


def bounds(sizes: tuple[int, ...], rank: int) -> tuple[int, int]:
    return sum(sizes[:rank]), sum(sizes[: rank + 1])


def run_sharded(ranks: Ranks, case: Case, sizes: tuple[int, ...], **overrides: Any) -> Result:
    """The result of all ranks: their gradients of the classifier's rows, one after the other."""
    start, stop = bounds(sizes, ranks.rank)
    inputs = shard_inputs(case, make_inputs(case), start, stop)
    parallel = memeff.VocabParallel(ranks.group, start if case.seed % 2 else None)
    ours = run_memeff(case, inputs, vocab_parallel=parallel, **overrides)
    return whole_result(ranks, ours)


def whole_result(ranks: Ranks, ours: Result) -> Result:
    parts: list[Result] = ranks.gather(ours)
    for part in parts[1:]:
        assert torch.equal(part.loss, parts[0].loss), "the loss differs between ranks"
        if ours.dx is not None:
            assert torch.equal(part.dx, parts[0].dx), "dX differs between ranks"

    def joined(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    return Result(ours.loss, ours.dx, joined("dw"), joined("db"))


@contextmanager
def kernels(name: str | None) -> Iterator[None]:
    """With MEMEFF_CPU_KERNELS set."""
    if name is not None:
        os.environ["MEMEFF_CPU_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("MEMEFF_CPU_KERNELS", None)


def check_loss(
    ranks: Ranks,
    case: Case,
    sizes: tuple[int, ...],
    cpu_kernels: str | None = None,
    **options: Any,
) -> None:
    with kernels(cpu_kernels):
        ours = run_sharded(ranks, case, sizes, **options)
        again = run_sharded(ranks, case, sizes, **options)
    for name in ("loss", "dx", "dw", "db"):
        first, second = getattr(ours, name), getattr(again, name)
        assert first is None or torch.equal(first, second), f"{name} differs from run to run"
    inputs = make_inputs(case)
    exact = run_plain(replace(case, dtype=torch.float64), inputs.in_float64())
    if case.dtype == torch.float64:
        for name in ("loss", "dx", "dw", "db"):
            value, expected = getattr(ours, name), getattr(exact, name)
            if expected is not None:
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert_result(ours, run_plain(case, inputs), exact)


def raised(call: Callable[[], Any]) -> str:
    """The type and message of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


CHECKS: dict[str, tuple[int, Callable[[Ranks], None]]] = {}


def add(name: str, size: int, check: Callable[..., None], *arguments: Any, **named: Any) -> None:
    assert name not in CHECKS, name
    CHECKS[name] = (size, lambda ranks: check(ranks, *arguments, **named))


# ---- what a plan promises: first, as memory that others have freed would hide some ----


def check_plan(ranks: Ranks, dtype: torch.dtype) -> None:
    """Products counted and memory measured on each rank, against memeff.plan(vocab_parallel=R)."""
    tokens, features, vocab = 512, 32, 8192 * ranks.size
    budget = 4 * 2**20
    shared = memeff.VocabParallel(ranks.group)

    def step(vocab: int, budget: int | None) -> PeakMemory:
        generator = torch.Generator().manual_seed(ranks.rank)
        w = torch.randn(vocab // ranks.size, features, generator=generator).to(dtype)
        generator.manual_seed(0)
        x = torch.randn(tokens, features, generator=generator).to(dtype)
        y = torch.randint(vocab, (tokens,), generator=generator)
        x.requires_grad_(), w.requires_grad_()
        with PeakMemory() as peak:
            loss = memeff.linear_cross_entropy(x, w, y, memory_budget=budget, vocab_parallel=shared)
            loss.backward()
        return peak

    step(64 * ranks.size, None)
    measured = step(vocab, budget).extra_bytes
    plan = memeff.plan(
        tokens, features, vocab, dtype, memory_budget=budget, vocab_parallel=ranks.size
    )
    slack = 2 * 2**20
    assert plan.workspace_bytes + plan.library_bytes <= budget
    most = plan.floor_bytes + plan.workspace_bytes + plan.library_bytes + slack
    assert measured <= most, f"{measured} bytes, at most {most}"
    x, w = torch.randn(tokens, features), torch.randn(vocab // ranks.size, features)
    with PeakMemory() as peak:  # the meter sees the logits of a shard
        x @ w.T
    assert peak.extra_bytes > 4 * tokens * (vocab // ranks.size) - slack > 1.5 * most

    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        memeff.linear_cross_entropy(x, w, torch.arange(tokens), vocab_parallel=shared).backward()
    assert (
        counter.get_total_flops() == plan.floor_flops == 6 * tokens * features * vocab / ranks.size
    )


def check_collectives(
    ranks: Ranks, dtype: torch.dtype, backend: str = "auto", tokens: int = 300, **options: Any
) -> None:
    """How often ranks exchange something, and how many bytes: what the plan says, and in addition
    the comparison before each operator."""
    features, vocab = 16, 40 * ranks.size
    plan = memeff.plan(
        tokens, features, vocab, dtype, vocab_parallel=ranks.size,
        backend="cuda" if backend == "emulated" else backend, **options,
    )  # fmt: skip
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = torch.randn(vocab // ranks.size, features).to(dtype)
    x.requires_grad_(), w.requires_grad_()
    shared = memeff.VocabParallel(ranks.group)
    with torch.profiler.profile(record_shapes=True) as profile:
        loss = memeff.linear_cross_entropy(
            x, w, torch.arange(tokens) % vocab, vocab_parallel=shared, backend=backend, **options
        )
        loss.sum().backward()
    events = profile.events()
    assert events is not None
    gathers, reduces = (
        sum(event.name == f"c10d::{name}_" for event in events)
        for name in ("allgather", "allreduce")
    )
    in_forward = dtype != torch.float16 and options.get("reduction") != "none"
    operators = 1 if in_forward else 2
    assert (gathers - operators, reduces) == (plan.all_gathers, plan.all_reduces), str(plan)
    assert gathers > operators and reduces > 0


for _size, _dtype in ((2, torch.bfloat16), (4, torch.float32)):
    add(f"plan-{_dtype}-{_size}", _size, check_plan, _dtype)
for _dtype, _options in (
    (torch.bfloat16, {}),
    (torch.float32, {"chunk_size": 64}),
    (torch.float64, {"reduction": "none"}),
):
    add(f"collectives-{_dtype}", 2, check_collectives, _dtype, **_options)


# ---- linear_cross_entropy: every option, all dtypes, every number of ranks ----

_turns = [(size, sizes) for size in SHARDS for sizes in SHARDS[size]]
_count = 0
for _option, _fields in OPTIONS.items():
    for _dtype, _kernels in (
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, "blas"),
        (torch.bfloat16, "bf16_portable"),
    ):
        _size, _sizes = _turns[_count % len(_turns)]
        _case = Case((5, 9), 24, VOCAB, dtype=_dtype, seed=_count, **_fields)
        _name = f"{_option}-{str(_dtype)[6:]}-{_kernels}-{_size}"
        add(_name, _size, check_loss, _case, _sizes, _kernels)
        _count += 1


# ---- plans, reductions, odd sizes ----


def least_budget(call: Callable[[int], Any]) -> int:
    """The minimum that the error of a budget of 1 byte reports."""
    message = raised(lambda: call(1))
    found = re.search(r"the minimum is (\d+) bytes", message)
    assert found, message
    return int(found[1])


def check_budget(ranks: Ranks, case: Case, sizes: tuple[int, ...], **options: Any) -> None:
    """In the smallest budget, which only one rank gives: it holds for all."""
    least = least_budget(
        lambda budget: run_sharded(ranks, case, sizes, memory_budget=budget, **options)
    )
    smallest = max(ranks.gather(least))
    assert smallest == least, "ranks report other minima"
    own = least if ranks.rank == 0 else least * 1000
    ours = run_sharded(ranks, case, sizes, memory_budget=own, **options)
    inputs = make_inputs(case)
    exact = run_plain(replace(case, dtype=torch.float64), inputs.in_float64())
    assert_result(ours, run_plain(case, inputs), exact)


def check_twice(ranks: Ranks, case: Case, sizes: tuple[int, ...], **options: Any) -> None:
    """A second backward pass gives the same gradients."""
    start, stop = bounds(sizes, ranks.rank)
    inputs = shard_inputs(case, make_inputs(case), start, stop)
    x, w = inputs.x.requires_grad_(), inputs.w.requires_grad_()
    loss = memeff.linear_cross_entropy(
        x, w, inputs.y, reduction=case.reduction, vocab_parallel=memeff.VocabParallel(ranks.group),
        **options,
    )  # fmt: skip
    first = torch.autograd.grad(loss, (x, w), inputs.upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), inputs.upstream)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLANS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none", "class_weights": True, "ignored": 0.3},
    "none-probabilities": {"reduction": "none", "probabilities": True, "class_weights": True},
    "sum": {"reduction": "sum", "bias": True},
    "num-items": {"num_items": 91, "ignored": 0.2},
    "shift": {"shift": 2, "token_weight": True},
    "chunks": {"chunk_size": 16},
    "only-dx": {"differentiate": ("dx",), "bias": True},
    "only-dw": {"differentiate": ("dw",)},
    "only-db": {"differentiate": ("db",), "bias": True},
    "no-gradients": {"differentiate": ()},
    "all-ignored": {"ignored": 2.0, "reduction": "sum"},
    "few-features": {"features": 3},
}
for _plan, _fields in _PLANS.items():
    for _dtype in _DTYPES:
        _size, _sizes = _turns[_count % len(_turns)]
        _case = Case((2, 70), 24, VOCAB, dtype=_dtype, seed=_count)
        add(f"{_plan}-{_dtype}", _size, check_loss, replace(_case, **_fields), _sizes)
        _count += 1
for _dtype in _DTYPES:
    for _reduction in ("mean", "none"):
        _size, _sizes = _turns[_count % len(_turns)]
        _case = Case((700,), 24, VOCAB, dtype=_dtype, seed=_count, reduction=_reduction)
        add(f"budget-{_reduction}-{_dtype}", _size, check_budget, _case, _sizes)
        add(f"twice-{_reduction}-{_dtype}", _size, check_twice, _case, _sizes)
        _count += 1


# ---- faults: no rank hangs, and each learns what is wrong ----


def fault(ranks: Ranks, expected: tuple[str, ...], backend: str = "auto", **different: Any) -> None:
    """Calls with arguments that are other ones on the last rank; what each rank's error says."""
    case = Case((7,), 8, 40)
    inputs = make_inputs(case)
    last = ranks.rank == ranks.size - 1
    start, stop = bounds((30, 10), ranks.rank)
    arguments: dict[str, Any] = {
        "input": inputs.x.requires_grad_(),
        "linear_weight": inputs.w[start:stop].requires_grad_(),
        "target": inputs.y,
        "vocab_parallel": memeff.VocabParallel(ranks.group),
        "backend": backend,
    }
    for name, value in different.items():
        if last or name.startswith("all_"):
            arguments[name.removeprefix("all_")] = value
    message = raised(lambda: memeff.linear_cross_entropy(**arguments))
    for part in expected[ranks.rank].split("..."):
        assert part in message, message
    backend = "auto" if backend == "reference" else backend
    check_loss(ranks, Case((5,), 8, 40), (30, 10), backend=backend)  # the group still works


def add_fault(name: str, first: str, second: str | None = None, **different: Any) -> None:
    expected = (first, first if second is None else second)
    add(f"fault-{name}", 2, fault, expected, **different)


_x, _y = torch.randn(6, 8, requires_grad=True), torch.randint(40, (6,))
add_fault(
    "shape", "input is a Float tensor with sizes [7, 8] on rank 0 and a Float tensor with sizes "
    "[6, 8] on rank 1", input=_x, target=_y,
)  # fmt: skip
add_fault("option", "label_smoothing is 0 on rank 0 and 0.5 on rank 1", label_smoothing=0.5)
add_fault("reduction", "reduction is 'mean' on rank 0 and 'sum' on rank 1", reduction="sum")
add_fault("chunk-size", "chunk_size is 0 on rank 0 and 9 on rank 1", chunk_size=9)
add_fault("targets", "target holds other values on rank 1 than on rank 0", target=torch.arange(7))
add_fault("gradients", "input_grad is 1 on rank 0 and 0 on rank 1", input=torch.randn(7, 8))
add_fault("weights", "weight is None on rank 0 and a Float tensor", weight=torch.ones(10))
add_fault(
    "own-error", "rank 1 of process group ... raised an error ...ValueError: softcap is -1",
    "ValueError: softcap is -1", softcap=-1.0,
)  # fmt: skip
add_fault(
    "own-dtype", "rank 1 of process group ...linear_weight has dtype torch.float64",
    "RuntimeError: linear_weight has dtype", linear_weight=torch.randn(10, 8).double(),
)  # fmt: skip
add_fault(
    "target-range", "IndexError: target[2] is 40: expected a class index in [0, 40)",
    all_target=torch.tensor([1, 2, 40, 3, 4, 5, 6]),
)  # fmt: skip
add_fault("budget", "ValueError: memory_budget=1 bytes", memory_budget=1)
add_fault("reference", "NotImplementedError: backend is", backend="reference")


def check_top_of_all(ranks: Ranks, backend: str = "auto") -> None:
    """More classes than a rank has are fine, more than there are on all ranks are an error."""
    x, w = torch.ones(3, 8), torch.randn((3, 0, 2, 4)[ranks.rank], 8)
    shared = memeff.VocabParallel(ranks.group)
    classes = sum(ranks.gather(len(w)))

    def top(k: int) -> Any:
        return memeff.linear_token_statistics(x, w, top_k=k, vocab_parallel=shared, backend=backend)

    assert torch.equal(top(classes).top_ids.sort().values, torch.arange(classes).expand(3, -1))
    message = raised(lambda: top(classes + 1))
    assert f"top_k={classes + 1}: expected a number of classes in [0, {classes}]" in message


for _size in SHARDS:
    add(f"top-of-all-{_size}", _size, check_top_of_all)


def check_start(ranks: Ranks) -> None:
    """Shards in another order than the ranks; and shards that overlap."""
    case = Case((9,), 8, VOCAB, dtype=torch.float64)
    inputs = make_inputs(case)
    start, stop = ((300, VOCAB), (0, 300))[ranks.rank]
    shard = shard_inputs(case, inputs, start, stop)
    ours = run_memeff(case, shard, vocab_parallel=memeff.VocabParallel(ranks.group, start))
    expected = run_plain(case, inputs)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-12, atol=1e-12)
    assert expected.dw is not None
    torch.testing.assert_close(ours.dw, expected.dw[start:stop], rtol=1e-12, atol=1e-12)
    wrong = memeff.VocabParallel(ranks.group, (200, 0)[ranks.rank])
    message = raised(lambda: run_memeff(case, shard, vocab_parallel=wrong))
    assert "the shard of rank 0 starts at class 200, expected 300" in message, message


def check_missing_rank(ranks: Ranks, backend: str = "auto") -> None:
    if ranks.rank == 0:
        case = Case((5,), 8, 40)
        options = {"vocab_parallel": memeff.VocabParallel(ranks.impatient), "backend": backend}
        message = raised(lambda: run_memeff(case, make_inputs(case), **options))
        assert "expected every rank to make the same call. A rank that is missing" in message
        assert "Timed out" in message or "timeout" in message, message
    ranks.gather(None)


def check_other_function(ranks: Ranks) -> None:
    case = Case((5,), 8, 40)
    inputs = make_inputs(case)
    parallel = memeff.VocabParallel(ranks.group)
    function = (memeff.linear_cross_entropy, memeff.linear_logprobs)[ranks.rank]
    message = raised(lambda: function(inputs.x, inputs.w, inputs.y, vocab_parallel=parallel))
    assert "rank 0 calls linear_cross_entropy_forward and rank 1 calls linear_token" in message


def check_group(ranks: Ranks) -> None:
    """A changed copy is of the same group, not of that of all ranks; so are pickled ones."""
    parallel = memeff.VocabParallel(ranks.group, reduce_input_grad=False)
    changed = replace(parallel, reduce_dtype=torch.bfloat16)
    assert (changed.group_name, changed.ranks) == (parallel.group_name, ranks.size)
    assert changed.reduce_dtype == torch.bfloat16 and not changed.reduce_input_grad
    assert memeff.VocabParallel(parallel.group_name, reduce_input_grad=False) == parallel
    assert pickle.loads(pickle.dumps(parallel)) == copy.deepcopy(parallel) == parallel


add("group", 2, check_group)
add("order-of-shards", 2, check_start)
add("fault-function", 2, check_other_function)
add("fault-missing-rank", 2, check_missing_rank)


# ---- compile, partial gradients ----


def check_compile(ranks: Ranks, backend: str = "auto") -> None:
    case = Case((21,), 16, VOCAB, ignored=0.3, bias=True)
    start, stop = bounds(SHARDS[ranks.size][0], ranks.rank)
    inputs = shard_inputs(case, make_inputs(case), start, stop)
    parallel = memeff.VocabParallel(ranks.group)

    def step(
        x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        return memeff.linear_cross_entropy(
            x * 2, w, inputs.y, linear_bias=b, logit_scale=scale, vocab_parallel=parallel,
            backend=backend,
        )  # fmt: skip

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        tensors = (inputs.x, inputs.w, inputs.b, torch.tensor(0.8))
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(run(compiled), run(step), strict=True):
        assert torch.equal(ours, expected)


def check_partial(ranks: Ranks, dtype: torch.dtype) -> None:
    """Without the reduction the contributions of the ranks add up to the gradient."""
    case = Case((300,), 16, VOCAB, dtype=dtype)
    start, stop = bounds((0, VOCAB) if ranks.size == 2 else SHARDS[ranks.size][0], ranks.rank)
    inputs = shard_inputs(case, make_inputs(case), start, stop)
    parallel = memeff.VocabParallel(ranks.group, reduce_input_grad=False)
    ours = run_memeff(case, inputs, vocab_parallel=parallel)
    total = torch.stack([part.double() for part in ranks.gather(ours.dx)]).sum(0)
    exact = run_plain(replace(case, dtype=torch.float64), make_inputs(case).in_float64())
    assert exact.dx is not None
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(total, exact.dx, rtol=tolerance, atol=tolerance * 1e-2)


def check_reduce_dtype(
    ranks: Ranks, dtype: torch.dtype, backend: str = "auto", tokens: int = 300
) -> None:
    """Contributions of the ranks rounded to bf16: an error of their rounding, and no other."""
    case = Case((tokens,), 16, VOCAB, dtype=dtype)
    start, stop = bounds(SHARDS[ranks.size][0], ranks.rank)
    inputs = shard_inputs(case, make_inputs(case), start, stop)

    def run(**options: Any) -> Result:
        parallel = memeff.VocabParallel(ranks.group, **options)
        ours = run_memeff(case, inputs, vocab_parallel=parallel, backend=backend)
        return whole_result(ranks, ours)

    ours, again = run(reduce_dtype=torch.bfloat16), run(reduce_dtype=torch.bfloat16)
    same, plain = run(reduce_dtype=torch.float32), run()
    alone = memeff.VocabParallel(ranks.group, reduce_input_grad=False)
    part = run_memeff(case, inputs, vocab_parallel=alone, backend=backend).dx
    assert ours.dx is not None and again.dx is not None and plain.dx is not None
    assert same.dx is not None and part is not None
    assert torch.equal(ours.dx, again.dx) and torch.equal(same.dx, plain.dx)
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.dw, plain.dw)
    sizes = torch.stack([other.abs().float() for other in ranks.gather(part)]).sum(0)
    error = (ours.dx.float() - plain.dx.float()).abs()
    assert (error <= (ranks.size + 1) * 2.0**-8 * sizes).all()
    assert error.max() > 0, "reduce_dtype has no effect"


for _size in reversed(SHARDS):  # all processes import the compiler at once
    add(f"compile-{_size}", _size, check_compile)
for _size in SHARDS:
    add(f"reduce-float32-{_size}", _size, check_reduce_dtype, torch.float32)
add("reduce-bfloat16-3", 3, check_reduce_dtype, torch.bfloat16)
for _dtype in (torch.float64, torch.bfloat16):
    for _size in SHARDS:
        add(f"partial-{_dtype}-{_size}", _size, check_partial, _dtype)


# ---- DTensors ----


def check_dtensor(
    ranks: Ranks, dtype: torch.dtype, sequence_parallel: bool, backend: str = "auto"
) -> None:
    """A classifier that is Shard(0): loss, and gradients with the placements of the parameters."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = DeviceMesh.from_group(ranks.group, "cpu", mesh_dim_names=("tp",))
    case = Case(
        (2, 9), 16, 7 if ranks.size == 4 else VOCAB, dtype=dtype, bias=True, class_weights=True,
        label_smoothing=0.1, ignored=0.2,
    )  # fmt: skip
    inputs = make_inputs(case)
    x = distribute_tensor(inputs.x, mesh, [Shard(1) if sequence_parallel else Replicate()])
    w = distribute_tensor(inputs.w, mesh, [Shard(0)])
    assert inputs.b is not None and inputs.class_weights is not None
    b = distribute_tensor(inputs.b, mesh, [Shard(0)])
    weight = distribute_tensor(inputs.class_weights, mesh, [Replicate()])
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = memeff.linear_cross_entropy(
        x, w, inputs.y, linear_bias=b, weight=weight, label_smoothing=0.1, backend=backend
    )
    gradients = torch.autograd.grad(loss, leaves, inputs.upstream)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert isinstance(gradient, DTensor) and gradient.placements == leaf.placements
    ours = Result(loss.detach(), *(gradient.full_tensor() for gradient in gradients))
    exact = run_plain(replace(case, dtype=torch.float64), inputs.in_float64())
    assert_result(ours, run_plain(case, inputs), exact)


def check_other_placements(ranks: Ranks) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    case = Case((5,), 8, 40)
    inputs = make_inputs(case)
    for placement in (Shard(1), Replicate()):
        w = distribute_tensor(inputs.w, mesh, [placement])
        message = raised(partial(memeff.linear_cross_entropy, inputs.x, w, inputs.y))
        assert "expected Shard(0) on one dimension" in message, message
        assert "memeff.patch" in message
    w = distribute_tensor(inputs.w, mesh, [Shard(0)])
    x = inputs.x + ranks.rank
    y = (inputs.y + ranks.rank) % 40
    # As under FSDP, whose ranks have tokens of their own.
    message = raised(partial(memeff.linear_cross_entropy, x, w, y))
    assert "target holds other values on rank 1" in message and "FSDP" in message, message


for _dtype in (torch.float64, torch.bfloat16):
    for _size in SHARDS:
        add(f"dtensor-{_dtype}-{_size}", _size, check_dtensor, _dtype, False)
        add(f"dtensor-sequence-{_dtype}-{_size}", _size, check_dtensor, _dtype, True)
add("dtensor-placements", 2, check_other_placements)
