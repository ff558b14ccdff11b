"""One test per defect found in other implementations, named after what went wrong there.

Where a whole test file covers the matter (memory, determinism, opcheck), the one here is the short
version.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import Case, check, make_inputs, run_memeff, run_plain
from tolerances import Result, assert_result

import memeff

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


# ---- wrong gradients ----------------------------------------------------------------------------


@BOTH
def test_none_uses_every_tokens_own_upstream_gradient(dtype: torch.dtype) -> None:
    """Liger #968, #678: every gradient was multiplied by grad_output[0]."""
    case = Case((40,), 16, 90, dtype=dtype, reduction="none")
    inputs = make_inputs(case)
    inputs.y[0] = -100
    inputs.upstream = torch.linspace(-3, 5, 40)
    exact = run_plain(Case(**{**case.__dict__, "dtype": torch.float64}), inputs.in_float64())
    assert_result(run_memeff(case, inputs), run_plain(case, inputs), exact)


@pytest.mark.parametrize("only", ["dx", "dw"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_frozen_side_leaves_the_other_its_gradient(only: str, reduction: str) -> None:
    """Liger: if the hidden states need no gradient, the classifier silently got none."""
    ours = check(Case((40,), 16, 90, reduction=reduction, differentiate=(only,)))
    assert (ours.dx is None) == (only == "dw") and (ours.dw is None) == (only == "dx")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_is_not_scaled_twice(reduction: str) -> None:
    """Liger scaled saved gradients in place; QuACK #209 failed on the second backward."""
    x, w = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = memeff.linear_cross_entropy(x, w, torch.randint(50, (30,)), reduction=reduction).sum()
    first = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), torch.tensor(3.0), retain_graph=True)
    single = torch.autograd.grad(loss, (x, w))
    for a, b, c in zip(first, second, single, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c)


@BOTH
def test_flat_softmax_keeps_its_gradient(dtype: torch.dtype) -> None:
    """CCE #14: skipping small probabilities drops all of an untrained head's gradient when every p
    < 2^-12.
    """
    ours = check(Case((64,), 16, 6000, dtype=dtype, spread=0.01))
    assert ours.dw is not None and (ours.dw.float().norm(dim=1) > 0).all()


@BOTH
def test_many_chunks_do_not_degrade_the_weight_gradient(dtype: torch.dtype) -> None:
    """Liger #512, #827, #830, #1391: a bf16 running sum is 7 times as far off after 1024 chunks."""
    check(Case((2048,), 16, 300, dtype=dtype, chunk_size=8))


def test_gradient_is_the_derivative_of_the_loss() -> None:
    """DeepSpeed #8587: it was not."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(9, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 8, -100, 3, 3, 1])

    def loss(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return memeff.linear_cross_entropy(
            x,
            w,
            y,
            linear_bias=b,
            softcap=3.0,
            logit_scale=1.2,
            z_loss=0.01,
            label_smoothing=0.1,
            reduction="none",
        )

    assert torch.autograd.gradcheck(loss, (x, w, b))


@BOTH
def test_bias_is_added_to_the_target_logit_once(dtype: torch.dtype) -> None:
    """CCE #52: once per tile of the vocabulary, so losses came out too low, even negative."""
    case = Case((50,), 16, 5000, dtype=dtype, bias=True, reduction="none")
    inputs = make_inputs(case)
    assert inputs.b is not None
    inputs.b += 10
    exact = run_plain(Case(**{**case.__dict__, "dtype": torch.float64}), inputs.in_float64())
    ours = run_memeff(case, inputs)
    assert (ours.loss >= 0).all()
    assert_result(ours, run_plain(case, inputs), exact)


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bias_with_softcap(dtype: torch.dtype, reduction: str) -> None:
    """The bias belongs inside the soft-cap, its gradient behind the soft-cap's derivative."""
    check(
        Case((50,), 16, 500, dtype=dtype, bias=True, softcap=3.0, spread=6.0, reduction=reduction)
    )


# ---- the mean ------------------------------------------------------------------------------------


def test_micro_batches_with_num_items_add_up_to_the_batch() -> None:
    """Liger #802, #322: wrong scale when micro-batches count different numbers of tokens."""
    x, w = torch.randn(60, 8), torch.randn(50, 8, requires_grad=True)
    y = torch.randint(50, (60,))
    y[:17] = -100
    (whole,) = torch.autograd.grad(memeff.linear_cross_entropy(x, w, y), w)
    for part in torch.arange(60).split(20):
        memeff.linear_cross_entropy(
            x[part], w, y[part], num_items=int((y != -100).sum())
        ).backward()
    torch.testing.assert_close(w.grad, whole)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction: str) -> None:
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    y = torch.full((6,), -100)
    loss = memeff.linear_cross_entropy(x, w, y, reduction=reduction)
    torch.testing.assert_close(
        loss, F.cross_entropy(x @ w.T, y, reduction=reduction), equal_nan=True
    )
    for gradient in torch.autograd.grad(loss.sum(), (x, w)):
        assert not gradient.any()


def test_mean_does_not_divide_by_the_ignored() -> None:
    """The public solution divided by numel."""
    x, w, y = torch.randn(10, 5), torch.randn(7, 5), torch.randint(7, (10,))
    y[3:] = -100
    mean = memeff.linear_cross_entropy(x, w, y)
    torch.testing.assert_close(mean, memeff.linear_cross_entropy(x[:3], w, y[:3]))


@BOTH
def test_mean_of_very_many_tokens_in_16_bits(dtype: torch.dtype) -> None:
    """1/N is subnormal in float16 from 65536 tokens on: gradients must not flush to 0."""
    n = 70_000
    x = torch.randn(n, 4).to(torch.float16)
    w = torch.randn(6, 4).to(torch.float16).requires_grad_()
    y = torch.randint(6, (n,))
    (dw,) = torch.autograd.grad(memeff.linear_cross_entropy(x, w, y), w)
    exact = w.detach().double().requires_grad_()
    (dw64,) = torch.autograd.grad(F.cross_entropy(x.double() @ exact.T, y), exact)
    torch.testing.assert_close(dw.double(), dw64, rtol=2e-3, atol=2e-5)


# ---- numbers that are not finite, targets that are not classes -----------------------------------


def test_classes_at_minus_infinity() -> None:
    """PyTorch #195829."""
    x, w, b = torch.randn(20, 8, requires_grad=True), torch.randn(900, 8), torch.zeros(900)
    b[:600] = -math.inf
    y = torch.randint(600, 900, (20,))
    loss = memeff.linear_cross_entropy(x, w, y, linear_bias=b)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, w, b), y))
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.isfinite().all()


def test_a_nan_row_stays_one_row() -> None:
    """PyTorch #195829."""
    x, w = torch.randn(200, 8), torch.randn(300, 8)
    x[5] = math.nan
    loss = memeff.linear_cross_entropy(x, w, torch.randint(300, (200,)), reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [5]


def test_target_out_of_range_is_an_error() -> None:
    """PyTorch #195829."""
    with pytest.raises(IndexError, match="50"):
        memeff.linear_cross_entropy(torch.randn(3, 8), torch.randn(50, 8), torch.tensor([1, 50, 2]))


def test_logprobs_are_never_positive() -> None:
    """verl #2656, #3723."""
    w = torch.eye(64, dtype=torch.bfloat16)
    x = torch.linspace(0.1, 60, 64)[:, None].to(torch.bfloat16) * w
    _, statistics = memeff.linear_cross_entropy(x, w, torch.arange(64), return_statistics=True)
    assert (statistics.logprob <= 0).all() and (statistics.loss >= 0).all()
    _, statistics = memeff.linear_cross_entropy(
        torch.randn(500, 64), torch.randn(3, 64), torch.randint(3, (500,)), return_statistics=True
    )
    assert (statistics.logprob <= 0).all() and (statistics.loss >= 0).all()


# ---- shapes --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("tokens", [1, 17, 127, 129, 255, 257])
def test_tokens_that_do_not_fill_the_last_chunk(tokens: int, dtype: torch.dtype) -> None:
    """The public solution misplaced a ragged last chunk; the rows of dX must be the tokens' own."""
    for reduction in ("mean", "none"):
        check(Case((tokens,), 24, 130, dtype=dtype, chunk_size=16, reduction=reduction))


def test_one_batch_of_tokens() -> None:
    """Automodel #1097: hidden states [4096, D] against labels [1, 4096]."""
    x, w, y = torch.randn(12, 8), torch.randn(50, 8), torch.randint(50, (12,))
    expected = memeff.linear_cross_entropy(x, w, y)
    assert torch.equal(memeff.linear_cross_entropy(x[None], w, y[None]), expected)
    with pytest.raises(RuntimeError, match=r"target.*1, 12"):
        memeff.linear_cross_entropy(x, w, y[None])


@pytest.mark.parametrize("bias", [False, True])
def test_with_and_without_bias(bias: bool) -> None:
    """The public solution crashed with bias=None."""
    check(Case((20,), 8, 50, bias=bias))


def test_chunks_follow_the_problem() -> None:
    """The public solution always made two; unsloth's half-of-free-memory rule one giant one (zoo
    #857, #947).
    """
    small = memeff.plan(128, 64, 1000, "float32")
    large = memeff.plan(16384, 1024, 128256, "float32")
    assert small.num_chunks < large.num_chunks < 200
    assert large.workspace_bytes < 16384 * 128256 * 4 / 4


def test_a_budget_of_nothing_is_refused() -> None:
    """unsloth #3827: target_gb of zero divided by zero."""
    for budget in (0, 1, "1KiB"):
        with pytest.raises(ValueError, match="memory_budget"):
            memeff.linear_cross_entropy(
                torch.randn(64, 8, requires_grad=True),
                torch.randn(5000, 8, requires_grad=True),
                torch.randint(50, (64,)),
                memory_budget=budget,
            )


# ---- what is around the loss ---------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_with_ignored_rows(reduction: str) -> None:
    """Liger #1338: silently wrong under torch.compile with any ignored row; #1328: a crash."""
    x, w = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    y = torch.randint(50, (30,))
    y[::3] = -100

    def step(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return memeff.linear_cross_entropy(x, w, y, reduction=reduction).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(step(x, w, y), (x, w)),
        torch.autograd.grad(compiled(x, w, y), (x, w)),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(step(x, w, y), compiled(x, w, y))


def test_autocast_with_float32_weights() -> None:
    """bf16 hidden states meet a float32 classifier, whose gradient stays float32."""
    x = torch.randn(30, 8, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(50, 8, requires_grad=True)
    y = torch.randint(50, (30,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = memeff.linear_cross_entropy(x, w, y)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert (loss.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    expected = memeff.linear_cross_entropy(x, w.to(torch.bfloat16), y)
    assert torch.equal(loss, expected)


def test_accuracy_and_greedy_tokens_without_logits() -> None:
    """Liger #328, TRL #4730, #7063: accuracy and log-probabilities were out of reach."""
    x, w, y = torch.randn(40, 8), torch.randn(50, 8), torch.randint(50, (40,))
    _, statistics = memeff.linear_cross_entropy(x, w, y, return_statistics=True)
    logits = x @ w.T
    assert torch.equal(statistics.argmax, logits.argmax(-1))
    assert torch.equal(statistics.correct, logits.argmax(-1) == y)
    expected = logits.log_softmax(-1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(statistics.logprob, expected)


def test_module_reads_its_weight_inside_its_own_forward() -> None:
    """Liger #332, TRL #3368, #6372: FSDP and ZeRO-3 gather weights in the owner's hooks."""
    module = memeff.LinearCrossEntropyLoss(8, 50)
    whole = module.linear.weight.detach().clone()
    module.linear.weight.data = torch.empty(0, 8)  # as if sharded away

    def gather(module: torch.nn.Module, arguments: object) -> None:
        module.linear.weight.data = whole

    module.register_forward_pre_hook(gather)
    x, y = torch.randn(20, 8), torch.randint(50, (20,))
    assert torch.equal(module(x, y), memeff.linear_cross_entropy(x, whole, y))


def test_head_trains() -> None:
    """The public solution computed dW and db and then dropped them."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 16), torch.randint(10, (200,))
    module = memeff.LinearCrossEntropyLoss(16, 10, bias=True)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    first = module(x, y).item()
    for _ in range(50):
        optimizer.zero_grad()
        module(x, y).backward()
        optimizer.step()
    assert module(x, y).item() < first - 0.3
    for old, new in zip(before, module.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_needs_nothing_but_torch() -> None:
    """CCE #41 needed Triton on the CPU, Soup #383 transformers; neither came with it."""
    program = """
import sys
for name in ("triton", "transformers", "numpy", "matplotlib", "psutil"):
    sys.modules[name] = None
import torch, memeff
memeff.linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), torch.tensor([1, 2, 3, 4]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- the tests themselves ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "dx", "dw", "db"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_wrong_result_is_caught(name: str, dtype: torch.dtype) -> None:
    """The public solution's check subtracted a gradient from itself. Ours must reject a 3 % error
    anywhere, one misplaced row, and a missing gradient.
    """
    case = Case((64,), 96, 128, dtype=dtype, bias=True, reduction="none")
    inputs = make_inputs(case)
    plain = run_plain(case, inputs)
    exact = run_plain(Case(**{**case.__dict__, "dtype": torch.float64}), inputs.in_float64())
    assert_result(plain, plain, exact)
    good = getattr(plain, name)
    for wrong in (1.03 * good, good.roll(1, 0), None):
        if wrong is None and name == "loss":
            continue
        with pytest.raises(AssertionError, match=name):
            assert_result(Result(**{**plain.__dict__, name: wrong}), plain, exact)


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_the_current_stream_of_the_tensors_device() -> None:
    """Kernels on the default stream, or on device 0, read inputs before they are written."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    stream = torch.cuda.Stream(device)
    x, w, y = torch.randn(512, 256), torch.randn(5000, 256), torch.randint(5000, (512,))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        loss = memeff.linear_cross_entropy(
            x.to(device, non_blocking=True),
            w.to(device, non_blocking=True),
            y.to(device, non_blocking=True),
        )
    stream.synchronize()
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(x @ w.T, y), rtol=1e-4, atol=1e-4)
