"""Several processes that share a vocabulary or sequences: see checks.py and its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
from every_check import CHECKS
from launch import run_checks


def test_every_check_on_every_rank(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path)


def test_the_tensor_parallel_plan_of_transformers_is_among_them() -> None:
    pytest.importorskip("transformers")
    assert "head-transformers" in CHECKS
