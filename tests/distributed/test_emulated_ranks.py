"""A vocabulary that processes share, on the CUDA kernels in the emulator: see emulated_checks.py,
and tests/emulated.py."""

from __future__ import annotations

from pathlib import Path

import emulated
from emulated_checks import EMULATED
from launch import run_checks

pytestmark = emulated.needed


def test_every_check_on_every_rank(tmp_path: Path) -> None:
    emulated.load()  # built once, before the processes look for it
    run_checks(EMULATED, tmp_path)
