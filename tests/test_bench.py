"""memeff-bench: what it is given and what it says; the figures themselves are not tested."""

import json
import os
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch

import memeff
from buildtools.sources import ROOT
from memeff.bench import cli, report, training_step, variants
from memeff.bench.environment import command_line, warn_if_busy
from memeff.bench.isolated import call_isolated
from memeff.bench.measure import Settings, ShapeResult, VariantResult
from memeff.bench.problem import make_problem
from memeff.bench.shapes import Shape
from memeff.bench.timing import Timing
from memeff.bench.variants import DEFAULT_VARIANTS, check_names, make_variant

sys.path.insert(0, str(ROOT / "benchmarks"))

import losses
import plans


def test_a_small_run(tmp_path, capsys):
    file = tmp_path / "result.json"
    options = ["--shape", "33,24,70", "--rounds", "2", "--variants", "standard,memeff,quack"]
    assert cli.main([*options, "--dtype", "float32", "--json", str(file)]) == 0
    table = capsys.readouterr().out
    assert "quack: quack runs on GPUs only" in table
    (run,) = json.loads(file.read_text())["runs"]
    measured = {variant["name"]: variant for variant in run["variants"]}
    for name in ("standard", "memeff"):
        assert len(measured[name]["seconds"]) == 2
        assert measured[name]["errors"]["dw"] < 1e-5


def test_a_training_step():
    """A patched step takes what memeff.plan promises over one without head, and no logits."""
    slack = 8 * 2**20  # stacks, malloc's arenas, the rest of the model
    tokens, features, vocab = 512, 64, 32768
    settings = training_step.StepSettings(
        sizes=training_step.Architecture(features, vocab, 1, 4, 2, 128, False),
        tokens=tokens,
        context=128,
        dtype="float32",
        rounds=2,
        threads=torch.get_num_threads(),
    )
    fields = asdict(settings)
    variants = {}
    for name in training_step.VARIANTS:
        variants[name] = call_isolated(
            training_step.measure_peak, variant=name, sequences=4, settings=fields
        )
    weights = variants["plain"]["weights"]
    assert variants["memeff.patch"]["weights"] == weights
    assert variants["memeff.patch"]["state"] == 3 * weights
    over_state = {name: found["peak"] - found["state"] for name, found in variants.items()}
    plan = memeff.plan(tokens - 4, features, vocab, torch.float32)
    most = over_state["no head"] + plan.workspace_bytes + plan.library_bytes + slack
    assert over_state["memeff.patch"] <= most
    assert over_state["plain"] > most + 4 * tokens * vocab  # with logits it would not fit
    seconds = training_step.measure_times(asdict(replace(settings, tokens=128)))
    assert all(len(seconds[name]) == 2 for name in training_step.VARIANTS)
    for name, figures in variants.items():
        figures["seconds"] = seconds[name]
    text = training_step.table("llama-3.2-1b", {"variants": variants}, settings)
    assert "1 of 16 layers" in text and "4 x 128 tokens" in text


def test_the_step_is_the_same_with_and_without_memeff():
    sizes = training_step.Architecture(64, 500, 2, 4, 2, 128, False)
    ids = torch.randint(500, (2, 16))
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = training_step.Decoder(sizes)
        if patched:
            memeff.patch(model, strict=True)
        loss = model(ids)
        loss.backward()
        losses.append((loss.item(), model.embedding.weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("memory", [50, 137, 138, 1000, 10_000])
@pytest.mark.parametrize("first", [1, 4, 64])
def test_the_largest_batch(memory, first):
    measured = {}

    def bytes_of(batch):
        assert batch >= 1 and batch not in measured
        measured[batch] = 37 + 100 * batch - 30 * (batch % 2)  # not quite a line
        return measured[batch]

    best, size = training_step.largest_batch(memory, {first: bytes_of(first)}, bytes_of)
    assert best == 0 or size == measured[best] <= memory
    assert measured[best + 1] > memory


@pytest.mark.parametrize("output", [["--json", "/tmp/r.json"], ["--json=/tmp/r.json"], []])
def test_a_result_does_not_say_where_it_was_written(output):
    argv = ["/some/where/memeff-bench", "--rounds", "2", *output, "--dtype", "float32"]
    assert command_line(argv) == "memeff-bench --rounds 2 --dtype float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:99"], "'cuda:99', but torch finds"),
        (["--device", "meta"], "expected cpu, cuda"),
        (["--device", "nonsense"], "--device is 'nonsense'"),
        (["--variants", "memeff~much"], "'memeff~much' is unknown"),
        (["--variants", "memeff@4MiB~0.1"], "is unknown"),
        (["--variants", "memeff=sm90"], "is unknown"),
        (["--shape", "1,2"], "'1,2'"),
        (["--step", "--model", "gpt2"], "was given --model gpt2"),
        (["--step", "--tokens", "100"], "--tokens is 100; expected a multiple of 512"),
        (["--step", "--memory", "much"], "--memory is 'much'"),
    ],
)
def test_meaningless_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        cli.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_default_variants_are_known():
    for names in DEFAULT_VARIANTS.values():
        check_names(list(names))


def test_help_lists_the_variants(capsys):
    with pytest.raises(SystemExit):
        cli.parse_arguments(["--help"])
    listed = capsys.readouterr().out.partition("variants:")[2]
    for names in DEFAULT_VARIANTS.values():
        for name in (re.sub("@.*", "@SIZE", name) for name in names):
            assert f"\n  {name} " in listed


@pytest.mark.parametrize(("load", "warns"), [(0.01, False), (100.0, True)])
def test_a_busy_machine_is_reported(load, warns, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    warn_if_busy()
    assert ("the machine is busy" in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5 us"), (999.0, "999 us"), (2000.0, "2 ms"), (3e7, "30 s")]
)
def test_ticks_have_units(value, text):
    assert report.with_unit(value, ("us", "ms", "s"), 1000) == text


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    settings = Settings("float32", True, 1, 1, ["standard", "missing", "memeff"])
    timing = Timing([0.1, 0.2, 0.4])
    results = [
        ShapeResult(
            Shape(8, 4, vocab), timing, 4 * vocab,
            [VariantResult("standard", timing, None, 2**20), VariantResult("missing", note="why"),
             VariantResult("memeff", timing)],
        )
        for vocab in (16, 32)
    ]  # fmt: skip
    report.plot(str(tmp_path / "plot.png"), settings, results)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_any_function_by_name(softcap):
    problem = make_problem(Shape(8, 4, 16), torch.float32)
    inputs = (problem.x, problem.w, problem.y, softcap)
    expected = make_variant("standard").loss(*inputs)
    torch.testing.assert_close(make_variant("memeff-apply").loss(*inputs), expected)


def test_memory_budget_by_name():
    problem = make_problem(Shape(8, 4, 16), torch.float32)
    loss = make_variant("memeff@4MiB").loss(problem.x, problem.w, problem.y, None)
    expected = make_variant("standard").loss(problem.x, problem.w, problem.y, None)
    torch.testing.assert_close(loss, expected)


def test_kernels_by_name(monkeypatch):
    """The environment variable is set for the call and the backward pass behind it."""
    monkeypatch.setattr(variants, "_KERNELS_AT_START", "sm80,sm80")
    monkeypatch.setenv("MEMEFF_CUDA_KERNELS", "sm80,sm80")
    problem = make_problem(Shape(8, 4, 16), torch.float32)
    for name, kernels in [
        ("memeff=sm90+generic", "sm90,generic"),
        ("memeff~0.1=sm90+sm90", "sm90,sm90"),
        ("memeff@4MiB=generic+generic", "generic,generic"),
        ("memeff", "sm80,sm80"),
    ]:
        make_variant(name).loss(problem.x, problem.w, problem.y, None)
        assert os.environ["MEMEFF_CUDA_KERNELS"] == kernels


def test_peaked_raises_the_target_alone():
    shape = Shape(40, 512, 300)
    flat, peaked = (make_problem(shape, torch.float64, peaked=p) for p in (False, True))
    raised = (peaked.x - flat.x) @ flat.w.T
    targets = raised[torch.arange(40), flat.y]
    torch.testing.assert_close(targets, torch.full_like(targets, 30.0))
    others = raised[torch.arange(300) != flat.y[:, None]]
    assert others.std() < 30.0 / 512**0.5 * 1.5  # the weights' own chance products
    assert torch.softmax(peaked.x @ flat.w.T, 1)[torch.arange(40), flat.y].min() > 0.99


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_beyond_cross_entropy_take_a_step(name):
    """benchmarks/losses.py: gradients of each of its losses."""
    problem = make_problem(Shape(16, 8, 40), torch.float32)
    losses.step(name, problem, 2**25)
    for gradient in (problem.x.grad, problem.w.grad):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plans(dtype: torch.dtype) -> None:
    """benchmarks/plans.py: as many chunks as asked for, and times relative to the fastest."""
    rows = plans.measure(Shape(300, 16, 200), dtype, [8], rounds=1)
    by_name = {row["plan"]: row for row in rows}
    assert "then 3 chunks of up to" in by_name["chunks of 128"]["steps"]
    assert ("8 MiB" in by_name) == (dtype == torch.bfloat16)
    assert min(row["x_measured"] for row in rows) == 1.0
    assert all(row["floor_s"] > 0 and row["bytes"] > 0 for row in rows)


@pytest.mark.cuda
def test_a_small_run_on_a_gpu(tmp_path):
    file = tmp_path / "result.json"
    options = ["--device", "cuda", "--shape", "256,128,1000", "--rounds", "2"]
    assert cli.main([*options, "--variants", "standard,memeff", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["machine"]["gpu"] == torch.cuda.get_device_name()
    for variant in result["runs"][0]["variants"]:
        assert variant["median_s"] > 0
        assert variant["over_gradients_bytes"] >= 0
