"""The option --all-families: every model family of transformers, half an hour on two cores."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ != "test_any_family":
        return
    from families import families

    if metafunc.config.getoption("--all-families"):
        every = list(families())
    else:
        every = [pytest.param("", "", marks=pytest.mark.skip(reason="needs --all-families"))]
    metafunc.parametrize(("kind", "model_type"), every)
