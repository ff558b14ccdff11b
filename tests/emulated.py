"""The backend "emulated": the CUDA kernels on CPU tensors, run and checked by the emulator."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from memeff import _backends, ops, statistics_ops

_BUILD = Path(__file__).parent / "kernels" / "torch_backend" / "build.py"


@functools.cache
def _builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memeff_emulated_build", _BUILD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing() -> str | None:
    """Why the backend cannot be built here, or None."""
    reason: str | None = _builder().missing()
    return reason


@functools.cache
def load() -> ModuleType:
    """Builds the backend and makes backend="emulated" known to memeff."""
    return _register(_builder().load())


@functools.cache
def load_built() -> ModuleType:
    """The same in a process of one that has called load(): nothing is built."""
    builder = _builder()
    file = builder.FOLDER / f"{builder.NAME}.so"
    spec = importlib.util.spec_from_file_location(builder.NAME, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _register(module)


def _register(module: ModuleType) -> ModuleType:
    ops.LIBRARIES["emulated"] = ops.Operators("memeff_emulated")
    statistics_ops.LIBRARIES["emulated"] = statistics_ops.StatisticsOperators("memeff_emulated")
    _backends.DEVICE_TYPES["emulated"] = "cpu"
    return module


@contextlib.contextmanager
def checked(
    emulator: ModuleType | None = None,
    *,
    late_delivery: bool = True,
    schedule: str = "in_order",
    seed: int = 1,
) -> Iterator[None]:
    """Runs what is inside in that order of threads and copies; any report is a failure."""
    emulator = emulator or load()
    emulator.take_reports()
    emulator.configure(late_delivery=late_delivery, schedule=schedule, seed=seed)
    yield
    reports = emulator.take_reports()
    assert not reports, f"{len(reports)} reports, the first: " + "\n".join(reports[:3])


# ---- what files of emulated tests have in common: `pytestmark = emulated.needed`, and these ----

needed = pytest.mark.skipif(missing() is not None, reason=f"no emulator: {missing()}")


@pytest.fixture(autouse=True)
def no_reports() -> Iterator[None]:
    """Every test of a file that imports it fails if the emulator reports anything."""
    with checked():
        yield


def dtype_fixture(variants: Sequence[tuple[str, torch.dtype]]) -> Any:
    """A fixture: the dtype of the inputs in each of (kernels, dtype), with these kernels chosen."""

    @pytest.fixture(params=variants, ids=lambda v: f"{v[0]}-{v[1]}".replace("torch.", ""))
    def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
        kernels, chosen = request.param
        monkeypatch.setenv("MEMEFF_CUDA_KERNELS", kernels)
        return chosen  # type: ignore[no-any-return]

    return dtype
