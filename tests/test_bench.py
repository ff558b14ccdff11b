"""memeff-bench: what it is given and what it says; the figures themselves are not tested."""

import json
import os

import pytest
import torch

from memeff.bench import cli, variants
from memeff.bench.environment import command_line
from memeff.bench.problem import make_problem
from memeff.bench.shapes import Shape
from memeff.bench.variants import DEFAULT_VARIANTS, check_names, make_variant


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
    ],
)
def test_meaningless_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        cli.parse_arguments(options)
    assert message in capsys.readouterr().err


def test_default_variants_are_known():
    for names in DEFAULT_VARIANTS.values():
        check_names(list(names))


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
