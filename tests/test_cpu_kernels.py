"""The CPU's bf16 kernels through Python, on any processor: MEMEFF_CPU_KERNELS chooses them.

Sizes of real models' order (several blocks of D, slices of V, chunks of N) under every plan.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from cases import OPTIONS, Case, Inputs, check, make_inputs, run_memeff, run_plain
from tolerances import Result, assert_result

import memeff

BF16_KERNELS = ("bf16_portable", "blas")


@pytest.fixture(params=BF16_KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", request.param)
    return str(request.param)


def test_the_variable_chooses_the_kernels(kernels: str) -> None:
    plan = memeff.plan(100, 64, 1000, torch.bfloat16)
    assert (plan.kernels, plan.kernels_reason) == (kernels, "MEMEFF_CPU_KERNELS")
    # What the bf16 kernels do not support is computed by torch's products.
    assert memeff.plan(100, 64, 1000, torch.float32).kernels == "blas"
    both = memeff.plan(100, 64, 1000, torch.bfloat16, softcap=30.0, label_smoothing=0.1)
    assert both.kernels == "blas"


def test_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMEFF_CPU_KERNELS", raising=False)
    plan = memeff.plan(100, 64, 1000, torch.bfloat16)
    assert plan.kernels_reason == "default"
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", "")
    assert memeff.plan(100, 64, 1000, torch.bfloat16).kernels == plan.kernels


def test_a_name_that_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", "avx1024")
    with pytest.raises(ValueError, match=r"MEMEFF_CPU_KERNELS='avx1024': expected 'avx512_bf16'"):
        memeff.linear_cross_entropy(torch.ones(1, 1), torch.ones(2, 1), torch.tensor([0]))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, kernels: str) -> None:
    for reduction in ("mean", "none"):
        case = Case((130,), 72, 500, torch.bfloat16, reduction=reduction, **OPTIONS[name])
        check(case)
        check(replace(case, chunk_size=40, seed=1))


LARGE = Case((700,), 1100, 3000, torch.bfloat16, bias=True, ignored=0.1)


@functools.cache
def references(case: Case) -> tuple[Inputs, Result, Result]:
    """The inputs, and what plain PyTorch makes of them in bf16 and in float64."""
    inputs = make_inputs(case)
    exact = run_plain(replace(case, dtype=torch.float64), inputs.in_float64())
    return inputs, run_plain(case, inputs), exact


def describe(plan: memeff.Plan) -> str:
    products = round(3 * plan.flops / plan.floor_flops)  # of 2 N D V; 3 when nothing is repeated
    kept = "kept" if plan.stored_in_gradient > 0 else "none kept"
    several = "one chunk" if plan.num_chunks == 1 else "chunks"
    return f"{plan.kind}, {several}, {kept}, {plan.accumulation}, {products} products"


def plans_of(case: Case) -> dict[str, dict[str, int | None]]:
    """Settings that lead to every plan that the planner has for the case, by description."""
    found: dict[str, dict[str, int | None]] = {}
    budgets = [None, *range(2**20, 2**25, 2**18)]
    for chunk_size in (None, 160):
        for budget in budgets:
            settings = {"memory_budget": budget, "chunk_size": chunk_size}
            try:
                plan = memeff.plan(
                    case.lead[0],
                    case.features,
                    case.vocab,
                    case.dtype,
                    bias_grad=True,
                    reduction=case.reduction,
                    **settings,
                )
            except ValueError:  # the budget is too small
                continue
            found.setdefault(describe(plan), settings)
    return found


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_plan_at_real_sizes(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_CPU_KERNELS", "bf16_portable")
    case = replace(LARGE, reduction=reduction)
    inputs, plain, exact = references(case)
    plans = plans_of(case)
    if reduction == "mean":
        wanted = {"exact", "float32", "compact"}
        assert {name.split(", ")[3] for name in plans} == wanted, plans
        assert {name.split(", ")[0] for name in plans} == {"token_chunks", "vocab_slices"}, plans
    assert any("5 products" in name for name in plans), plans  # separate sweeps
    for name, settings in plans.items():
        print(name, settings)
        assert_result(run_memeff(case, inputs, **settings), plain, exact)
