"""What every test gets: repeatable random numbers, hypothesis profiles, skips without CUDA."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

# Threads that wait for the next parallel loop sleep. Awake, which is OpenMP's default, they take
# the processor from other workers of pytest-xdist. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # its tests are then skipped, with the reason (pytest.importorskip)
    hypothesis = None

# "repeatable" (the default) draws the same examples in every run, so that a red CI run is red at
# home too. "fresh" draws new ones: pytest --hypothesis-profile=fresh, with --hypothesis-seed=N to
# repeat a run.
if hypothesis is not None:
    _COMMON = {
        "deadline": None,
        "print_blob": True,
        "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    }
    hypothesis.settings.register_profile("repeatable", derandomize=True, max_examples=60, **_COMMON)
    hypothesis.settings.register_profile("fresh", max_examples=300, **_COMMON)
    hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="seed of torch's and Python's random numbers (default 0)",
    )
    parser.addoption(
        "--all-families",
        action="store_true",
        help="try memeff.patch with every model family of transformers (half an hour)",
    )


def pytest_report_header(config: pytest.Config) -> str:
    profile = config.getoption("--hypothesis-profile", default=None) or "repeatable"
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"--seed={config.getoption('--seed')}, hypothesis profile {profile}"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch and Python before each test; the output of a failed test shows the value."""
    value: int = request.config.getoption("--seed")
    print(f"--seed={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills every newly allocated tensor with NaN (integers with their largest value).

    An output or workspace that is not written, or is read before it is, then shows.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch's default changed"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
