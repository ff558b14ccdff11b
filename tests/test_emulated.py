"""The whole way from Python to the CUDA kernels, on the CPU: the kernels run in the emulator.

Every call is checked under the tolerance rule, in memory that starts as NaN, and by the emulator:
races, bounds, uninitialised reads, copies in flight. Shapes are small, because every access of
every thread is a function call here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import emulated
import pytest
import torch

pytest.importorskip("hypothesis")
from cases import (
    DTYPES,
    INPUT_LAYOUTS,
    OPTIONS,
    WEIGHT_LAYOUTS,
    Case,
    check,
    make_inputs,
    run_memeff,
)
from emulated import no_reports  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_loss import Problem as LossProblem
from test_linear_loss import check as check_linear_loss
from test_property import cases as any_case
from test_token_statistics import DIFFERENTIABLE, SUMS, Problem
from test_token_statistics import check as check_statistics
from test_token_statistics import plain as plain_statistics
from tolerances import assert_close_as_plain

import memeff

pytestmark = emulated.needed

KERNELS = ["generic,generic", "sm80,generic", "sm80,sm80", "sm90,generic", "sm90,sm90"]
# Everything that 16-bit kernels distinguish: families of their own in both types; those that share
# all but some products or the movement of operands with another, in one (sm90rs not in fp16, where
# backward keeps no scores). fp32 and fp64 are the generic kernels' alone.
VARIANTS = [
    *(
        (kernels, dtype)
        for kernels in ("generic,generic", "sm80,sm80", "sm90,sm90")
        for dtype in (torch.bfloat16, torch.float16)
    ),
    ("sm80,generic", torch.bfloat16),
    ("sm90,generic", torch.float16),
    ("sm90x2,sm90x2", torch.float16),
    ("sm90x2,sm90rs", torch.bfloat16),
    ("generic,generic", torch.float32),
    ("generic,generic", torch.float64),
]


dtype = emulated.dtype_fixture(VARIANTS)


def check_emulated(case: Case, **overrides: Any) -> None:
    check(case, backend="emulated", **overrides)


def test_generic_kernels_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the GPU, here sm_90, no handwritten product runs that nobody asked for."""
    monkeypatch.delenv("MEMEFF_CUDA_KERNELS", raising=False)
    before = emulated.load().counters()
    for reduction in ("mean", "none"):
        check_emulated(Case((37,), 24, 150, torch.bfloat16, reduction, bias=True, ignored=0.2))
    after = emulated.load().counters()
    assert after == {**before, "launches": after["launches"]} != before


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(37, 24, 150), (130, 40, 300), (1, 8, 40), (5, 7, 1)], ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, reduction: str) -> None:
    tokens, features, vocab = shape
    check_emulated(Case((tokens,), features, vocab, dtype, reduction, bias=True, ignored=0.2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_emulated(Case((40,), 16, 140, dtype, **options))


@pytest.mark.parametrize("options", ["everything", "probabilities_all", "softcap_smoothing"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_options_recomputed(options: str, reduction: str, dtype: torch.dtype) -> None:
    check_emulated(Case((40,), 16, 140, dtype, reduction, **OPTIONS[options]))


@pytest.mark.parametrize("shape", [(9, 2100, 70), (7, 16, 4200), (4200, 8, 20)], ids=str)
def test_products_in_pieces(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is upcast for torch.mm (here and before sm_80), a piece at a time."""
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "generic,generic")
    tokens, features, vocab = shape
    check_emulated(Case((tokens,), features, vocab, torch.bfloat16, "none", bias=True))


@pytest.mark.parametrize("tokens", [11, 16])
@pytest.mark.parametrize("differentiate", [("dw",), ("dx", "dw", "db")], ids=str)
@pytest.mark.parametrize("kernels", ["generic,generic", "sm80,generic", "sm80,sm80"])
def test_kept_blocks_whose_rows_are_padded(
    kernels: str, differentiate: tuple[str, ...], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of 3 tokens lie in grad_weight, which ends within a row of their maxima, and those of
    the others in the workspace."""
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    case = Case((tokens,), 3, 130, torch.bfloat16, "sum", bias=True, differentiate=differentiate)
    check_emulated(case)


@pytest.mark.parametrize("kernels", ["sm80,generic", "sm90,sm90"])
def test_kept_and_fresh_tokens_with_float32_sums(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 tokens whose scores are kept, before 276 whose sums of grad_input stay for all slices."""
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    case = Case((300,), 24, 300, torch.bfloat16, "sum", accum_dtype=torch.float32)
    for budget in range(2**16, 2**18, 2**11):
        try:
            plan = memeff.plan(
                300, 24, 300, torch.bfloat16, reduction="sum", accum_dtype=torch.float32,
                memory_budget=budget, backend="cuda", compute_capability=(9, 0),
            )  # fmt: skip
        except ValueError:  # too small
            continue
        once_more = 1.2 < plan.flops / plan.floor_flops < 1.4  # and no sweep of their own
        if once_more and plan.stored_in_gradient == 24:
            break
    assert plan.stored_in_gradient == 24 and plan.stored_in_workspace == 0 and plan.num_slices > 1
    check_emulated(case, memory_budget=budget)


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_chunks(chunk_size: int, dtype: torch.dtype) -> None:
    tokens = 6 if chunk_size == 1 else 290
    accum_dtype = torch.promote_types(dtype, torch.float32)
    check_emulated(Case((tokens,), 16, 140, dtype, chunk_size=chunk_size, accum_dtype=accum_dtype))


@pytest.mark.parametrize(
    ("reduction", "wanted"),
    [
        ("mean", ("token_chunks", "compact", "float32")),
        ("mean", ("vocab_slices", "compact", "compact")),
        ("none", ("vocab_slices", "compact", "compact")),
        ("none", ("vocab_slices", "exact", "compact")),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("generic,generic", torch.bfloat16),
        ("sm80,generic", torch.float16),
        ("sm80,sm80", torch.bfloat16),
        ("sm90,sm90", torch.float16),
        ("sm90x2,sm90x2", torch.bfloat16),
        ("sm90,sm90rs", torch.bfloat16),
    ],
    ids=str,
)
def test_compact_sums(
    kernels: str,
    dtype: torch.dtype,
    reduction: str,
    wanted: tuple[str, str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients that add up in their own memory: grad_weight over chunks of tokens or the parts of
    a slice, grad_input over slices. The smallest budget with such a plan and several slices."""
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    case = Case((300,), 24, 700, dtype, reduction, ignored=0.1)
    # So few tokens would not be divided without being asked to.
    options = {"chunk_size": 128} if wanted[0] == "token_chunks" else {}

    def plan(kib: int) -> tuple[str, str, str] | None:
        try:
            made = memeff.plan(
                300, 24, 700, dtype, reduction=reduction, backend="cuda", memory_budget=kib << 10,
                **options,
            )  # fmt: skip
        except ValueError:
            return None  # too small a budget
        one_slice = made.kind == "vocab_slices" and made.num_slices == 1
        return None if one_slice else (made.kind, made.accumulation, made.input_accumulation)

    # fp16 keeps no scores. Where cuBLAS multiplies, the sums of a slice are there anyway.
    can_be = not (dtype == torch.float16 and wanted[0] == "token_chunks")
    if kernels.endswith("generic"):
        can_be &= wanted[:2] != ("vocab_slices", "compact")
    budgets = [kib for kib in range(40, 700, 4) if plan(kib) == wanted]
    assert bool(budgets) == can_be
    if budgets:
        check_emulated(case, memory_budget=budgets[0] << 10, **options)


@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        ("sm90,sm90", {"chunk_size": 128}),
        ("sm90x2,sm90x2", {"bias": True, "ignored": 0.2}),
        ("sm90,sm90rs", {}),
    ],
    ids=str,
)
def test_grad_input_in_parts(
    kernels: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few tiles that parts of their long sums over the classes are computed at the same time."""
    tokens = 150 if "chunk_size" in options else 40
    case = Case((tokens,), 48, 2100, torch.bfloat16, **options)
    launches = {}
    for one in (kernels, "sm80,sm80"):  # whose launches do not overlap
        monkeypatch.setenv("MEMEFF_CUDA_KERNELS", one)
        before = emulated.load().counters()["launches"]
        run_memeff(case, make_inputs(case), backend="emulated")
        launches[one] = emulated.load().counters()["launches"] - before
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
    check_emulated(case)
    assert launches[kernels] >= launches["sm80,sm80"] + 3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smallest_budget(reduction: str, bias: bool, dtype: torch.dtype) -> None:
    """Where everything shares memory that can. (With a bias, sm90rs are the products of sm90.)"""
    case = Case((200,), 16, 700, dtype, reduction, bias=bias)
    with pytest.raises(ValueError, match="the minimum is") as caught:
        run_memeff(case, make_inputs(case), memory_budget=1, backend="emulated")
    least = int(str(caught.value).split("the minimum is ")[1].split()[0])
    check_emulated(case, memory_budget=least)


@pytest.mark.parametrize("differentiate", [(), ("dx",), ("dw",), ("db",), ("dx", "db")], ids=str)
def test_only_what_is_wanted(differentiate: tuple[str, ...], dtype: torch.dtype) -> None:
    for reduction in ("mean", "none"):
        case = Case((140,), 16, 140, dtype, reduction, bias=True, differentiate=differentiate)
        check_emulated(case)


@pytest.mark.parametrize("layout", [*WEIGHT_LAYOUTS[1:], "expanded_tokens"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    assert layout in INPUT_LAYOUTS
    weight_layout = layout if layout in WEIGHT_LAYOUTS else "padded"
    check_emulated(Case((33,), 24, 140, dtype, input_layout=layout, weight_layout=weight_layout))


@pytest.mark.parametrize(
    ("schedule", "late_delivery"), [("reversed", False), ("random", True)], ids=str
)
def test_order_of_events_does_not_matter(
    schedule: str, late_delivery: bool, dtype: torch.dtype
) -> None:
    case = Case((140,), 24, 300, dtype, bias=True, ignored=0.1)
    inputs = make_inputs(case)
    expected = run_memeff(case, inputs, backend="emulated")
    with emulated.checked(late_delivery=late_delivery, schedule=schedule, seed=7):
        actual = run_memeff(case, inputs, backend="emulated")
    for name in ("loss", "dx", "dw", "db"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("options", [{}, {"chunk_size": 100}, {"bias": True}], ids=str)
def test_products_from_scores(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as from gradients in memory, which a gradient of the bias still needs."""
    case = Case((140,), 24, 300, torch.bfloat16, ignored=0.1, **options)
    inputs = make_inputs(case)
    results, loads = [], []
    for kernels in ("sm90,sm90", "sm90,sm90rs"):
        monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
        before = emulated.load().counters()["ldmatrix"]  # by which scores come, and old sums
        results.append(run_memeff(case, inputs, backend="emulated"))
        loads.append(emulated.load().counters()["ldmatrix"] - before)
    for name in ("loss", "dx", "dw"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    assert loads[1] == loads[0] if "bias" in options else loads[1] > loads[0]


def test_statistics(dtype: torch.dtype) -> None:
    case = Case((45,), 16, 300, dtype, bias=True, softcap=5.0, ignored=0.2)
    inputs = make_inputs(case)
    arguments: dict[str, Any] = {
        "linear_bias": inputs.b, "softcap": 5.0, "return_statistics": True
    }  # fmt: skip
    loss, ours = memeff.linear_cross_entropy(
        inputs.x, inputs.w, inputs.y, backend="emulated", **arguments
    )
    exact = inputs.in_float64()
    arguments["linear_bias"] = exact.b
    exact_loss, expected = memeff.reference.linear_cross_entropy(
        exact.x, exact.w, exact.y, **arguments
    )
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    for name, value in ours._asdict().items():
        other = getattr(expected, name)
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), other, rtol=1e-4, atol=1e-4, msg=name)
        else:
            assert torch.equal(value, other), name


STATISTICS: list[tuple[tuple[str, ...], dict[str, Any], int | None]] = [
    (("logprob",), {}, 3),
    (("logprob", "lse"), {"softcap": 3.0, "logit_scale": 0.7}, None),
    (("entropy",), {"logit_scale": -1.3}, None),
    (DIFFERENTIABLE, {"softcap": 4.0, "top_k": 3}, None),
    (DIFFERENTIABLE, {"softcap": 4.0, "top_k": 3}, 3),
    ((*DIFFERENTIABLE, *SUMS), {}, None),
    (SUMS, {"softcap": 4.0, "logit_scale": -1.3}, 3),
    ((*DIFFERENTIABLE, *SUMS), {"temperature": True, "softcap": 4.0, "top_k": 3}, 3),
]


@pytest.mark.parametrize(("names", "options", "targets"), STATISTICS, ids=str)
def test_token_statistics(
    names: tuple[str, ...], options: dict[str, Any], targets: int | None, dtype: torch.dtype
) -> None:
    problem = Problem(37, 24, 301, targets=targets, dtype=dtype)
    check_statistics(problem, names, {"backend": "emulated"}, **options)


def test_logprobs_skip_ignored_tokens(dtype: torch.dtype) -> None:
    problem = Problem(37, 24, 301, dtype=dtype)
    on_cpu, ours = (
        memeff.linear_logprobs(problem.x, problem.w, problem.target, backend=backend)
        for backend in ("cpu", "emulated")
    )
    torch.testing.assert_close(ours, on_cpu, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), problem.x)[0] for value in (on_cpu, ours)]
    assert (gradients[1][problem.target == -100] == 0).all()
    tolerance = 4 * torch.finfo(dtype).eps * gradients[0].abs().max().item()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=max(tolerance, 1e-6))


def test_heads_and_skipped_tokens() -> None:
    """K-dimensional weights, and two targets of which the first may be ignored: as on the CPU."""
    x, w = torch.randn(9, 8), torch.randn(21, 2, 8)
    target = torch.randint(21, (9, 2, 2))
    target[torch.rand(target.shape) < 0.5] = -100
    x[(target == -100).flatten(1).all(1)] = torch.nan
    results = []
    for backend in ("cpu", "emulated"):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        fields = memeff.linear_token_statistics(
            *leaves, target, skip_ignored=True, top_k=2, log_sum_sq_probs=True, backend=backend
        )
        loss = sum(f.square().sum() + f.sum() for f in fields[:3])
        results.append((*filter(torch.is_tensor, fields), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "planning"),
    [
        ({}, {}),
        ({}, {"memory_budget": 1}),
        ({"reduction": "mean", "logit_scale": 1.3}, {"chunk_size": 128}),
        ({"softcap": 4.0}, {"chunk_size": 128}),
        ({"softcap": 4.0}, {"memory_budget": 1}),
    ],
    ids=str,
)
def test_linear_loss(options: dict[str, Any], planning: dict[str, Any], dtype: torch.dtype) -> None:
    """Scores kept while the caller differentiates; the smallest budget computes some again."""
    problem = LossProblem(dtype, tokens=150, vocab=300, features=24)
    planning = {**planning, "backend": "emulated"}
    if "memory_budget" in planning:
        with pytest.raises(ValueError, match="the minimum is") as caught:
            problem.ours(**planning)
        least = str(caught.value).split("the minimum is ")[1].split()[0]
        planning["memory_budget"] = int(least)
    check_linear_loss(problem, planning, **options)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_scores_kept_or_computed_again(
    softcap: float | None, entropy: bool, dtype: torch.dtype
) -> None:
    """linear_loss keeps scores until the caller has differentiated, statistics have theirs computed
    again; with a soft cap the entry of the target needs its derivative, too. No gradient of the
    bias: kernels may then multiply scores as they are."""
    p = LossProblem(dtype, tokens=150, vocab=300, features=24)
    exact = p.in_float64()
    options: dict[str, Any] = {
        "linear_bias": p.b.detach(), "softcap": softcap, "entropy": entropy, "backend": "emulated"
    }  # fmt: skip

    def loss(s: memeff.LogitStatistics | SimpleNamespace, old: torch.Tensor) -> torch.Tensor:
        losses: torch.Tensor = (s.logprob - old).clamp(max=2).exp() + 0.01 * s.lse.square()
        return losses - 0.1 * s.entropy.square() if entropy else losses

    def of_plain(q: LossProblem) -> torch.Tensor:
        s = SimpleNamespace(**plain_statistics(q, softcap))
        return loss(s, q.old.to(s.lse.dtype))[counted].sum()

    counted = p.target != -100  # linear_loss has no loss of the others
    kept = memeff.linear_loss(loss, p.x, p.w, p.target, p.old, reduction="sum", **options)
    statistics = memeff.linear_token_statistics(p.x, p.w, p.target, **options)
    again = loss(statistics, p.old)[counted].sum()
    plain, expected = of_plain(p), of_plain(exact)
    for name, ours in (("kept", kept), ("computed again", again)):
        sides = [(p, ours), (p, plain), (exact, expected)]
        losses = [side.detach() for _, side in sides]
        assert_close_as_plain(f"loss, {name}", *losses, gradient=False)
        gradients = [
            torch.autograd.grad(side, (q.x, q.w, q.old), retain_graph=True) for q, side in sides
        ]
        for leaf, *three in zip(("dx", "dw", "old"), *gradients, strict=True):
            assert_close_as_plain(f"{leaf}, {name}", *three)


@pytest.mark.parametrize("several", [False, True])
def test_linear_loss_runs_per_chunk(several: bool) -> None:
    """Where it can: with several targets per token all statistics come first."""
    problem = LossProblem(torch.float32, tokens=300, vocab=40, features=16)
    target = torch.stack([problem.target, problem.target], 1) if several else problem.target
    sizes = []

    def loss(statistics: memeff.LogitStatistics) -> torch.Tensor:
        sizes.append(len(statistics.lse))
        return -statistics.lse

    total = memeff.linear_loss(
        loss, problem.x, problem.w, target, chunk_size=128, backend="emulated"
    )
    total.backward()
    assert (len(sizes) == 1) == several and sum(sizes) == 300


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_ignored(reduction: str, dtype: torch.dtype) -> None:
    case = Case((9,), 16, 40, dtype, reduction, ignored=1.0, bias=True)
    ours = run_memeff(case, make_inputs(case), backend="emulated")
    assert ours.loss.isnan().all() if reduction == "mean" else (ours.loss == 0).all()
    for gradient in (ours.dx, ours.dw, ours.db):
        assert gradient is not None and (gradient == 0).all()


def test_no_tokens(dtype: torch.dtype) -> None:
    ours = run_memeff(
        Case((0,), 16, 40, dtype), make_inputs(Case((0,), 16, 40, dtype)), backend="emulated"
    )
    assert ours.loss.isnan() and ours.dw is not None and (ours.dw == 0).all()


def test_targets_out_of_range_are_seen(dtype: torch.dtype) -> None:
    """The device cannot raise: the token's loss is NaN, and so is everything it is part of."""
    case = Case((9,), 16, 40, dtype, "none")
    inputs = make_inputs(case)
    inputs.y[3] = 40
    loss = run_memeff(
        case,
        inputs,
        backend="emulated",
    ).loss
    assert loss.isnan().tolist() == [n == 3 for n in range(9)]


@settings(max_examples=25)
@given(case=any_case(), kernels=st.sampled_from([*KERNELS, "sm90x2,sm90x2", "sm90,sm90rs"]))
def test_any_call(case: Case, kernels: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMEFF_CUDA_KERNELS", kernels)
        check_emulated(case)


def test_covers_all_dtypes() -> None:
    assert {dtype for _, dtype in VARIANTS} == set(DTYPES)
