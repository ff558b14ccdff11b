"""benchmarks/distributed.py, on tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "distributed.py"


def test_it_measures(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = ["--shape", "64,8,101", "--rounds", "1", "--ranks", "2", "--larger", "4"]
    command += ["--json", str(results)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(results.read_text())
    (row,), (larger,) = found["rows"], found["extrapolated"]
    assert larger["ranks"] == 4 and larger["alone_s"] == row["alone_s"] / 2
    exchange = max(0, row["shared_s"] - row["alone_s"])
    assert abs(larger["shared_s"] - larger["alone_s"] - 1.5 * exchange) < 1e-9
    assert row["ranks"] == 2 and row["shared_s"] > 0 and row["alone_s"] > 0
    assert (row["gathered_bytes"], row["reduced_bytes"]) == (16 * 64, 4 * 64 * 8)


def test_the_model_of_the_documentation() -> None:
    spec: Any = importlib.util.spec_from_file_location("benchmark_of_ranks", SCRIPT)
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "distributed.md").read_text()
    shown = page.split("<!-- model: begin -->")[1].split("<!-- model: end -->")[0].strip()
    assert shown == script.model_table(), "type: python benchmarks/distributed.py --model"
