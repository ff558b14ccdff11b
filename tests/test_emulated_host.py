"""What host code does between the launches of a call, seen in the emulator.

Everything goes to the call's stream (the emulator reports what does not, in all emulated tests), no
value is read back from the device, and each launch's status is looked at.
"""

from __future__ import annotations

import itertools
import re
import resource
from typing import Any

import emulated
import pytest
import torch
from cases import OPTIONS, Case, check, make_inputs, run_memeff
from emulated import no_reports  # noqa: F401
from test_token_statistics import Problem

import memeff
from buildtools.sources import ROOT

pytestmark = emulated.needed

FAMILIES = ("generic,generic", "sm80,generic", "sm80,sm80", "sm90,sm90", "sm90,sm90rs")
# What torch does where a value of a GPU's tensor goes to the host.
READ_BACK = {
    "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal",
    "aten::masked_select", "aten::unique_consecutive",
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", request.param)
    name: str = request.param
    return name


def read_back(run: Any) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    seen = {event.key for event in profile.key_averages()}
    assert any(name.startswith("memeff_emulated::") for name in seen), seen
    return seen & READ_BACK


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_read_back(options: dict[str, Any]) -> None:
    """Or a call would wait for the device, and could not be part of a CUDA graph."""
    case = Case((9,), 8, 40, torch.bfloat16, **options)
    inputs = make_inputs(case)
    assert read_back(lambda: run_memeff(case, inputs, backend="emulated")) == set()


def test_nothing_is_read_back_by_statistics() -> None:
    problem = Problem(9, 8, 40, dtype=torch.bfloat16)
    x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()

    def run() -> None:
        fields = memeff.linear_token_statistics(
            x, w, problem.target, entropy=True, backend="emulated"
        )
        (fields.logprob.sum() + fields.entropy.sum()).backward()

    assert read_back(run) == set()


def test_reading_back_is_caught() -> None:
    """As a logit_scale in a tensor, whose value the plan and the kernels' arguments need."""
    p = Problem(9, 8, 40)
    options: dict[str, Any] = {"logit_scale": torch.tensor(1.5), "backend": "emulated"}
    found = read_back(lambda: memeff.linear_cross_entropy(p.x, p.w, p.target, **options))
    assert "aten::item" in found


def test_every_launch_is_checked(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not accepted ends the call, whichever it is, and the error names the kernels. The
    next call is as if nothing had happened."""
    emulator = emulated.load()
    case = Case((5,), 8, 130, torch.bfloat16, "none", bias=True, label_smoothing=0.1)
    inputs = make_inputs(case)
    refused = 0
    for refused in itertools.count():
        emulator.refuse_launch(refused)
        try:
            run_memeff(case, inputs, backend="emulated")
            break
        except RuntimeError as error:
            way_out = "; MEMEFF_CUDA_KERNELS=generic,generic runs without handwritten products"
            wanted = f"as it was told, with {kernels} kernels (MEMEFF_CUDA_KERNELS)"
            assert (wanted + ("" if kernels == FAMILIES[0] else way_out)) in str(error)
        finally:
            emulator.refuse_launch(-1)
    assert refused > 8
    check(case, backend="emulated")


def test_errors_of_budgets_name_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((50,), 8, 300, torch.bfloat16)
    for forced, why in (
        ("", "generic,generic kernels (default; run memeff-tune to use faster ones)"),
        ("sm80,sm80", "sm80,sm80 kernels (MEMEFF_CUDA_KERNELS)"),
    ):
        monkeypatch.setenv("MEMEFF_CUDA_KERNELS", forced)
        with pytest.raises(ValueError, match=re.escape(f", with {why}")):
            run_memeff(case, make_inputs(case), memory_budget=1, backend="emulated")


def test_a_lack_of_memory_names_kernels_and_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "generic,generic")
    tokens, features, vocab = 2048, 8, 60000
    plan = memeff.plan(
        tokens, features, vocab, torch.float32, backend="cuda", compute_capability=(9, 0)
    )
    assert plan.workspace_bytes > 2**27
    x = torch.randn(tokens, features, requires_grad=True)
    w = torch.randn(vocab, features, requires_grad=True)
    y = torch.randint(vocab, (tokens,))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**26, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"generic kernels .*a workspace of \d+ bytes"):
            memeff.linear_cross_entropy(x, w, y, backend="emulated")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# What the runtime refuses while a stream is being captured, or what waits for the device.
FORBIDDEN = re.compile(
    r"cuda(Malloc|Free|Memcpy|Memset)\w*\(|cuda\w*Synchronize|cudaEventQuery|cudaStreamQuery|"
    r"cudaStreamCreate|cudaEventCreate|cudaLaunchHostFunc|cudaSetDevice"
)


def test_host_code_calls_nothing_that_a_capture_forbids() -> None:
    found = {
        (path.name, call.group())
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu", ".cuh", ".h")
        for call in FORBIDDEN.finditer(path.read_text())
        if not call.group().startswith("cudaMemsetAsync")
    }
    assert found == set()
