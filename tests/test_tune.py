"""memeff-tune, rehearsed on the CPU: the emulated kernels stand in for those of a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import memeff
from memeff import _library, _tuned
from memeff.bench import tuning
from memeff.bench.shapes import Shape

# Seconds of a family: enough for one that works on a busy machine.
LIMIT = 90.0
# Seconds of one that hangs, whose process is ended after them.
HANG = 3.0


def machine(**fields: Any) -> tuning.Machine:
    cases = (((37, 24, 150), {}),)
    return tuning.Machine(
        "emulated", 90, "cpu", "emulated", "tuning_faults:prepare", cases=cases, **fields
    )


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    emulated = pytest.importorskip("emulated")
    if emulated.missing() is not None:
        pytest.skip(f"no emulator: {emulated.missing()}")
    emulated.load()  # built before the clock starts
    call_isolated = tuning.call_isolated

    def set_faults(**families: str) -> None:
        def call(function: Any, *, kernels: list[str], time_limit: float, **rest: Any) -> Any:
            hangs = any(families.get(name) == "hang" for name in kernels[0].split(","))
            limit = HANG if hangs else time_limit
            return call_isolated(function, kernels=kernels, time_limit=limit, **rest)

        monkeypatch.setenv("REHEARSED_FAULTS", json.dumps(families))
        monkeypatch.setattr(tuning, "call_isolated", call)

    return set_faults


def test_rehearsal(faults: Any, tmp_path: Path) -> None:
    """What crashes, hangs or is wrong is not used; the rest is timed, and the file serves calls."""
    faults(sm90="hang", sm90x2="crash", sm80="wrong number")
    file, lines, written = tmp_path / "cache" / "tuned.json", [], []

    def progress(line: str) -> None:
        lines.append(line)
        written.append(sum(len(result["families"]) for result in _tuned.read(file)))

    found = tuning.tune_machine(
        machine(family_seconds=LIMIT), [Shape(40, 16, 140)], "bfloat16", 600.0, file, progress
    )
    states = found.families
    assert list(states) == ["generic", "sm80", "sm90", "sm90rs", "sm90x2"]
    assert states["generic"] == "verified"
    assert states["sm90"] == f"hang: not done after {LIMIT:.0f} s"
    assert states["sm90x2"].startswith("crash: ")
    assert states["sm90rs"] == "not run: it needs a family that failed"
    assert states["sm80"].startswith("wrong number: ")
    assert [line.split()[0] for line in lines] == list(states)
    assert written == [0, 1, 2, 3, 4]  # those before it
    (choice,) = (choice for choice in found.choices if not choice["skips"])
    assert choice["kernels"] == "generic,generic"
    assert choice["seconds"]["generic,generic"] > 0
    assert f"hang: not done after {LIMIT:.0f} s" in str(found) and str(file) in str(found)

    (result,) = _tuned.read(file)
    rows, banned = known(file)
    assert ("emulated", 90, "bfloat16", 40, 16, 140, False, "generic,generic") in rows
    assert banned == [("emulated", name) for name in ("sm80", "sm90", "sm90rs", "sm90x2")]
    assert result["families"] == states


def known(file: Path) -> Any:
    return _tuned.known(file, _library.load().build_info(), _library.extension_file())


def result(gpu: str = "GPU", **fields: Any) -> dict[str, Any]:
    info = _library.load().build_info()
    choice = {"dtype": "bfloat16", "tokens": 40, "features": 16, "vocab": 140, "skips": False,
              "kernels": "sm80,sm80", "seconds": {}}  # fmt: skip
    build = _tuned.build(info, _library.extension_file())
    return {"gpu": gpu, "capability": 90, "driver": _tuned.driver(), "build": build,
            "families": {"sm80": "verified"}, "choices": [choice], **fields}  # fmt: skip


class TestFile:
    def test_one_result_per_gpu(self, tmp_path: Path) -> None:
        file = tmp_path / "tuned.json"
        for families in ({"sm80": "hang"}, {"sm80": "verified"}):
            _tuned.write(file, result("A", families=families))
            _tuned.write(file, result("B"))
        assert [(r["gpu"], r["families"]) for r in _tuned.read(file)] == [
            ("A", {"sm80": "verified"}),
            ("B", {"sm80": "verified"}),
        ]
        rows, banned = known(file)
        assert [row[0] for row in rows] == ["A", "B"] and banned == []

    @pytest.mark.parametrize("field", ["driver", "build"])
    def test_another_driver_or_build_does_not_count(self, field: str, tmp_path: Path) -> None:
        file = tmp_path / "tuned.json"
        _tuned.write(file, result(families={"sm80": "hang"}, **{field: "another"}))
        assert known(file) == ([], [])

    def test_where_it_lies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MEMEFF_TUNE_FILE", "/named/file")
        assert _tuned.tune_file() == Path("/named/file")
        monkeypatch.delenv("MEMEFF_TUNE_FILE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
        assert _tuned.tune_file() == Path("/cache/memeff/tuned.json")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert _tuned.tune_file() == Path.home() / ".cache/memeff/tuned.json"

    @pytest.mark.parametrize(
        "content", ["", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "results": [{}]}']
    )
    def test_anything_else_is_a_warning(self, content: str, tmp_path: Path) -> None:
        file = tmp_path / "tuned.json"
        file.write_text(content)
        with pytest.warns(UserWarning, match="run memeff-tune to write it again"):
            assert known(file) == ([], [])
        _tuned.write(file, result())
        assert len(known(file)[0]) == 1

    def test_a_process_reads_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from memeff.bench.isolated import call_isolated

        file = tmp_path / "tuned.json"
        _tuned.write(file, result())
        monkeypatch.setenv("MEMEFF_TUNE_FILE", str(file))
        monkeypatch.delenv("MEMEFF_CUDA_KERNELS", raising=False)
        assert call_isolated(kernels_of_a_plan) == ["sm80,sm80", "tuned on GPU at 40x16x140"]


def kernels_of_a_plan() -> list[str]:
    options = dict.fromkeys(("input_grad", "weight_grad"), True)
    chosen = _library.load().plan(
        tokens=40, features=16, vocab=140, dtype="bfloat16", backend="cuda", probabilities=False,
        ranks=0, capability=90, gpu="GPU", multiprocessors=132, options=options,
    )  # fmt: skip
    return [str(chosen["kernels"]), str(chosen["kernels_reason"])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": []}, "shapes is"),
        ({"shapes": [(1, 0, 3)]}, "shapes is"),
        ({"dtype": torch.float32}, "dtype is torch.float32, expected torch.bfloat16"),
        ({"seconds": 0}, "seconds is 0, expected more than 0"),
    ],
    ids=str,
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memeff.tune(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="torch finds none"):
        memeff.tune()
    assert tuning.main([]) == 1
    assert "memeff-tune needs a GPU" in capsys.readouterr().err
