"""memeff.plan: the plan of a call before it runs."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import memeff


def test_numbers() -> None:
    plan = memeff.plan(4096, 1024, 32768, torch.bfloat16)
    assert (plan.tokens, plan.features, plan.vocab, plan.dtype) == (
        4096,
        1024,
        32768,
        torch.bfloat16,
    )
    assert plan.backend == "cpu"
    assert plan.floor_bytes == 2 * 1024 * (4096 + 32768)
    assert plan.floor_flops == pytest.approx(6 * 4096 * 1024 * 32768)
    assert plan.flops >= plan.floor_flops
    assert plan.workspace_bytes > 0
    assert plan == memeff.plan(4096, 1024, 32768, "bfloat16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tokens = 1  # type: ignore[misc]


def test_tensors() -> None:
    """Leading dimensions are flattened, and requires_grad says which gradients are wanted."""
    x = torch.empty(4, 1024, 512, device="meta", requires_grad=True)
    w = torch.empty(32000, 512, device="meta", requires_grad=True)
    target = torch.empty(4, 1024, device="meta", dtype=torch.int64)
    assert (
        memeff.plan(x, w)
        == memeff.plan(x, w, target)
        == memeff.plan(4096, 512, 32000, torch.float32)
    )
    frozen = memeff.plan(x, w.detach())
    assert frozen.floor_bytes == 4 * 4096 * 512
    assert frozen.floor_flops == pytest.approx(4 * 4096 * 512 * 32000)
    nothing = memeff.plan(x.detach(), w.detach())
    assert (nothing.kind, nothing.floor_bytes) == ("statistics", 0)


def test_ranks_that_share_the_vocabulary() -> None:
    """The plan of a rank; tests/distributed measures products and memory against it."""
    plan = memeff.plan(4096, 1024, 32767, "bfloat16", vocab_parallel=4)
    alone = memeff.plan(4096, 1024, 8192, "bfloat16")
    assert (plan.ranks, plan.vocab, alone.ranks) == (4, 8192, 0)
    assert (plan.floor_flops, plan.floor_bytes) == (alone.floor_flops, alone.floor_bytes)
    frozen = memeff.plan(4096, 1024, 32767, "bfloat16", vocab_parallel=4, weight_grad=False)
    frozen_alone = memeff.plan(4096, 1024, 8192, "bfloat16", weight_grad=False)
    assert frozen.workspace_bytes > frozen_alone.workspace_bytes  # the numbers of all ranks
    # lse and the target's logit; sums of the input's gradient.
    assert (plan.gathered_bytes, plan.reduced_bytes) == (16 * 4096, 4 * 4096 * 1024)
    assert (alone.gathered_bytes, alone.reduced_bytes) == (0, 0)
    # tests/distributed counts them.
    assert plan.all_gathers >= 4 and plan.all_reduces >= 4 and alone.all_gathers == 0
    exchange = f"0.1 MiB to {plan.all_gathers} all-gathers and 16.0 MiB to {plan.all_reduces} "
    assert f"4; each gives {exchange}all-reduces" in str(plan)
    assert "on each of 4 ranks" in repr(plan) and "ranks" not in str(alone)
    smooth = memeff.plan(8, 4, 40, "float64", vocab_parallel=2, label_smoothing=0.1)
    assert (smooth.gathered_bytes, smooth.reduced_bytes) == (24 * 8, 8 * 8 * 4)
    x, w = torch.empty(8, 4, device="meta"), torch.empty(20, 4, device="meta", requires_grad=True)
    rows = memeff.plan(x, w, vocab_parallel=2)
    assert (rows.vocab, rows.reduced_bytes) == (20, 0)
    with pytest.raises(ValueError, match=r"vocab_parallel is 0, expected a number of ranks >= 1"):
        memeff.plan(8, 4, 40, "float32", vocab_parallel=0)


@pytest.mark.parametrize("kernels", [None, "sm90,sm90", "sm80,sm80"])
def test_ranks_that_share_the_vocabulary_on_gpus(
    kernels: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are kept until the ranks have merged their statistics: 6 N D V / R."""
    if kernels is not None:
        monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    plan = memeff.plan(2048, 4096, 131072, "bfloat16", vocab_parallel=8, backend="cuda")
    assert plan.flops == plan.floor_flops == 6 * 2048 * 4096 * 131072 / 8
    assert (plan.gathered_bytes, plan.reduced_bytes) == (16 * 2048, 4 * 2048 * 4096)
    assert "on each of 8 ranks" in repr(plan)
    # Sums of the input's gradient are added up over the ranks: no other ones than float32.
    for budget in (24 << 20, 64 << 20):
        small = memeff.plan(
            8192, 1024, 65536, "bfloat16", memory_budget=budget, vocab_parallel=2, backend="cuda"
        )
        assert small.input_accumulation == "float32"
        assert small.workspace_bytes + small.library_bytes <= budget


@pytest.mark.parametrize("budget", ["32MiB", "256MiB", "4GiB"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_budget_bounds_the_workspace(budget: str, reduction: str) -> None:
    plan = memeff.plan(4096, 1024, 32768, "bfloat16", memory_budget=budget, reduction=reduction)
    units = {"32MiB": 2**25, "256MiB": 2**28, "4GiB": 2**32}
    assert 0 < plan.workspace_bytes <= units[budget]


def test_small_budgets_keep_bfloat16_sums_compact() -> None:
    plan = memeff.plan(4096, 1024, 32768, "bfloat16", memory_budget="40MiB")
    assert plan.accumulation == "compact" or plan.kernels == "blas"
    exact = memeff.plan(
        4096, 1024, 32768, "bfloat16", memory_budget="40MiB", accum_dtype=torch.float32
    )
    assert exact.accumulation != "compact"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("dtype", "capability", "upcasts"),
    [("bfloat16", (7, 5), True), ("float16", (7, 5), False), ("bfloat16", (8, 0), False)],
    ids=str,
)
def test_budget_bounds_upcast_operands(
    dtype: str, capability: tuple[int, int], upcasts: bool, reduction: str
) -> None:
    """GPUs before sm_80 do not multiply bfloat16: torch upcasts, in addition to the workspace."""
    plan = memeff.plan(
        4096, 1024, 32768, dtype, reduction=reduction, memory_budget="64MiB",
        backend="cuda", compute_capability=capability,
    )  # fmt: skip
    assert (plan.library_bytes > 0) is upcasts
    assert plan.workspace_bytes + plan.library_bytes <= 64 * 2**20


def test_options_count() -> None:
    """Partial sums of what else is wanted per token are part of the workspace."""

    def workspace(**options: object) -> int:
        return memeff.plan(
            512, 64, 100_000, "float32", weight_grad=False, **options
        ).workspace_bytes

    plain = workspace()
    assert workspace(label_smoothing=0.1) > plain
    assert workspace(return_statistics=True) > plain
    assert workspace(probabilities=True) > plain


def test_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which, and why, where nothing was measured. (No committed choice is for so many tokens.)"""
    monkeypatch.delenv("MEMEFF_CUDA_KERNELS", raising=False)

    def plan(**options: object) -> memeff.Plan:
        return memeff.plan(
            131072, 4096, 128256, "bfloat16", backend="cuda", compute_capability=(9, 0), **options
        )

    reason = "default; run memeff-tune to use faster ones"
    for options in ({}, {"skip_mass": 1e-3}, {"memory_budget": "128MiB"}):
        chosen = plan(**options)
        assert (chosen.kernels, chosen.kernels_reason) == ("generic,generic", reason)
        assert chosen.predicted_flops >= chosen.flops
    assert f"cuda: generic,generic ({reason})" in str(plan())
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "sm90,sm90")
    small = plan(memory_budget="64MiB")
    assert (small.accumulation, small.input_accumulation) == ("compact", "compact")
    assert "of the input compact" in str(small)
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "sm80,sm80")
    assert (plan().kernels, plan().kernels_reason) == ("sm80,sm80", "MEMEFF_CUDA_KERNELS")
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "sm80")
    with pytest.raises(ValueError, match="MEMEFF_CUDA_KERNELS='sm80'"):
        plan()


def test_compute_capability_means_a_gpu() -> None:
    problem = (4096, 1024, 32768, "bfloat16")
    assert memeff.plan(*problem, compute_capability=(8, 0)) == memeff.plan(
        *problem, compute_capability=(8, 0), backend="cuda"
    )
    assert memeff.plan(*problem).backend == "cpu"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("budget", [None, "40MiB"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_steps_account_for_every_token(backend: str, budget: str | None, reduction: str) -> None:
    plan = memeff.plan(
        6000, 1024, 32768, "bfloat16", backend=backend, memory_budget=budget, reduction=reduction
    )
    assert plan.steps in str(plan) and plan.steps in repr(plan)
    kept, chunks, kept_too, again = (
        sum(map(int, re.findall(pattern, plan.steps)))
        for pattern in (
            r"(\d+) tokens kept in the gradient's memory", r"(\d+) chunks? of up to",
            r"(\d+) in the workspace", r"scores of (\d+) computed again",
        )
    )  # fmt: skip
    assert kept == plan.stored_in_gradient
    if plan.kind == "vocab_slices":
        assert kept + kept_too + again == 6000
        computed_again = (plan.flops - plan.floor_flops) / (2 * 1024 * 32768)
        # One sweep over the slices for both gradients, or one for each.
        assert any(computed_again == pytest.approx(sweeps * again) for sweeps in (1, 2))
    else:
        assert chunks == plan.num_chunks - (kept > 0)


def test_readable() -> None:
    text = str(memeff.plan(4096, 1024, 32768, "bfloat16"))
    for part in (
        "4096 tokens",
        "1024 features",
        "32768 classes",
        "bfloat16",
        "workspace",
        "MiB",
        "FLOP",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind", "text"),
    [
        ((10, 20, 30), {}, TypeError, r"missing the dtype, .* plan\(10, 20, 30, torch.bfloat16\)"),
        ((10, 10, 10, "int8"), {}, ValueError, "dtype is 'int8'"),
        ((10, 10, None, "float32"), {}, TypeError, "vocab must be an int"),
        ((-1, 10, 10, "float32"), {}, ValueError, "tokens is -1"),
        ((10, 1.5, 10, "float32"), {}, TypeError, "features must be an int"),
        ((torch.ones(3, 4), 5), {}, TypeError, "plan takes"),
        ((torch.ones(3, 4), torch.ones(5, 4), 7), {}, TypeError, "target must be"),
        ((10, 10, 10, "float32"), {"reduction": "max"}, ValueError, "reduction is 'max'"),
        ((10, 10, 10, "float32"), {"backend": "reference"}, ValueError, 'backend is "reference"'),
        ((10, 10, 10, "float32"), {"chunk_size": 0}, ValueError, "chunk_size is 0"),
        ((4096, 512, 32000, "float32"), {"memory_budget": 100}, ValueError, "memory_budget"),
        ((10, 10, 10, "float32"), {"input_grad": 1}, TypeError, "input_grad must be a bool"),
        ((10, 10, 10, "float32"), {"bias_grad": None}, TypeError, "bias_grad must be a bool"),
        ((10, 10, 10, "float32"), {"probabilities": "no"}, TypeError, "probabilities must be"),
        ((10, 10, 10, "float32"), {"compute_capability": "sm_90"}, TypeError, "'sm_90'"),
        ((10, 10, 10, "float32"), {"compute_capability": (9, 0, 0)}, TypeError, "two ints"),
        ((10, 10, 10, "float32"), {"compute_capability": (9.0, 0)}, TypeError, "two ints"),
        ((10, 10, 10, "float32"), {"compute_capability": (7, 0)}, ValueError, r"\(7, 5\) or newer"),
        (
            (10, 10, 10, "float32"), {"compute_capability": (9, 0), "backend": "cpu"}, ValueError,
            "backend='cpu', expected a GPU",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(
    arguments: tuple[object, ...], keywords: dict[str, object], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        memeff.plan(*arguments, **keywords)
