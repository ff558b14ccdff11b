"""memeff on a GPU: the tolerance rule for every family of kernels, and what only a GPU can show.

Skipped, visibly, where there is none. The emulated backend's tests (test_emulated.py) cover more
options on smaller shapes; these repeat the essential ones at sizes that fill a GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import DTYPES, OPTIONS, Case, check, make_inputs, run_memeff

import memeff
from memeff import _library

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not _library.load().build_info()["cuda"], reason="memeff was built without CUDA"
    ),
]

KERNELS = [
    "", "generic,generic", "sm80,generic", "sm80,sm80", "sm90,generic", "sm90,sm90", "sm90,sm90rs",
    "sm90x2,sm90x2",
]  # fmt: skip
MIB = 2**20


@pytest.fixture(params=KERNELS, ids=lambda name: name or "default")
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The families to use where problem and GPU allow it."""
    name: str = request.param
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", name)
    return name


def on_gpu(case: Case) -> Any:
    return make_inputs(case).to("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "shape", [(37, 19, 53), (1, 8, 40), (520, 96, 2053), (1030, 264, 9001)], ids=str
)
def test_shapes(
    shape: tuple[int, int, int], dtype: torch.dtype, reduction: str, kernels: str
) -> None:
    tokens, features, vocab = shape
    case = Case((tokens,), features, vocab, dtype, reduction, bias=True, ignored=0.2)
    check(case, device="cuda")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_options(options: dict[str, Any], dtype: torch.dtype, reduction: str) -> None:
    check(Case((200,), 64, 1003, dtype, reduction, **options), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_size", [100, 256])
def test_chunks(chunk_size: int, dtype: torch.dtype, kernels: str) -> None:
    check(Case((1000,), 64, 3001, dtype, chunk_size=chunk_size), device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", ["3MiB", "6MiB", "20MiB"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sums_in_the_gradients_memory(
    budget: str, dtype: torch.dtype, reduction: str, kernels: str
) -> None:
    """Compact sums, over slices in the small budgets, over chunks of tokens in the largest; and
    products that overlap, which must not show in any bit."""
    case = Case((2500,), 264, 9001, dtype, reduction, ignored=0.1)
    check(case, device="cuda", memory_budget=budget)
    inputs = on_gpu(case)
    first, second = (run_memeff(case, inputs, memory_budget=budget) for _ in range(2))
    for name in ("loss", "dx", "dw"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", ["4MiB", "8MiB", "64MiB"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_what_was_planned(
    budget: str, dtype: torch.dtype, reduction: str, kernels: str
) -> None:
    """The peak of torch's allocator, over inputs and gradients."""
    case = Case((2048,), 256, 32001, dtype, reduction)
    inputs = on_gpu(case)
    run_memeff(case, inputs, memory_budget=budget)  # cuBLAS allocates its own workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run_memeff(case, inputs, memory_budget=budget)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert result.dx is not None and result.dw is not None
    gradients = result.dx.nbytes + result.dw.nbytes
    per_token = 10 * 8 * 2048  # loss, lse, upstream gradients in float64
    assert extra - gradients <= int(budget.removesuffix("MiB")) * MIB + per_token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeats_bit_by_bit(dtype: torch.dtype, reduction: str, kernels: str) -> None:
    case = Case((700,), 128, 5003, dtype, reduction, bias=True, ignored=0.1)
    inputs = on_gpu(case)
    first, second = run_memeff(case, inputs), run_memeff(case, inputs)
    for name in ("loss", "dx", "dw", "db"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_device(reduction: str, kernels: str) -> None:
    case = Case((300,), 64, 1001, torch.bfloat16, reduction)
    inputs = on_gpu(case)
    run_memeff(case, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_memeff(case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_graph(dtype: torch.dtype, kernels: str) -> None:
    case = Case((300,), 64, 1001, dtype)
    inputs = on_gpu(case)
    x, w = inputs.x.requires_grad_(), inputs.w.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        loss = memeff.linear_cross_entropy(x, w, inputs.y)
        return (loss, *torch.autograd.grad(loss, (x, w)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


def test_follows_the_current_stream(kernels: str) -> None:
    case = Case((500,), 128, 3001, torch.bfloat16)
    inputs = on_gpu(case)
    expected = run_memeff(case, inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = make_inputs(case)
        moved = late.to("cuda")  # ready only after the sleep
        actual = run_memeff(case, moved)
    side.synchronize()
    for name in ("loss", "dx", "dw"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_several_threads(kernels: str) -> None:
    """Each with a stream and a shape of its own; results as those of one thread."""
    cases = [Case((200 + 90 * i,), 64, 1001 + 500 * i, torch.bfloat16) for i in range(4)]
    inputs = [on_gpu(case) for case in cases]
    expected = [run_memeff(case, its) for case, its in zip(cases, inputs, strict=True)]
    torch.cuda.synchronize()

    def work(i: int) -> list[Any]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [run_memeff(cases[i], inputs[i]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(len(cases)) as threads:
        for results, one in zip(threads.map(work, range(len(cases))), expected, strict=True):
            for actual in results:
                for name in ("loss", "dx", "dw"):
                    assert torch.equal(getattr(actual, name), getattr(one, name)), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device(kernels: str) -> None:
    check(Case((300,), 64, 1001, torch.bfloat16, bias=True), device="cuda:1")


def test_more_scores_than_32_bits_count(kernels: str) -> None:
    """N * V > 2^31, V * D large; the loss against plain PyTorch on slices of the tokens."""
    tokens, features, vocab = 20000, 64, 131072
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
    w = torch.randn(vocab, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
    y = torch.randint(vocab, (tokens,), device="cuda")
    loss = memeff.linear_cross_entropy(x, w, y, reduction="none")
    for begin in (0, 9984, tokens - 32):
        rows = slice(begin, begin + 32)
        logits = (x[rows].double() @ w.double().T).detach()
        expected = torch.nn.functional.cross_entropy(logits, y[rows], reduction="none")
        torch.testing.assert_close(loss[rows].double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(memeff.linear_cross_entropy(x, w, y), x)[0]
    logits = (x[-32:].double() @ w.double().T).detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits, y[-32:], reduction="sum").backward()
    expected = logits.grad @ w.double() / tokens
    error = (gradient[-32:].double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_targets_out_of_range_are_seen(kernels: str) -> None:
    case = Case((9,), 16, 40, torch.bfloat16, "none")
    inputs = on_gpu(case)
    inputs.y[3] = 40
    loss = run_memeff(case, inputs).loss
    assert loss.isnan().tolist() == [n == 3 for n in range(9)]


def test_compiles(kernels: str) -> None:
    case = Case((200,), 64, 1001, torch.bfloat16)
    inputs = on_gpu(case)
    compiled = torch.compile(memeff.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = memeff.linear_cross_entropy(inputs.x, inputs.w, inputs.y)
    assert torch.equal(compiled(inputs.x, inputs.w, inputs.y), expected)
