#!/usr/bin/env python3
"""Everything that needs a GPU, in one command: `make verify-gpu OUT=folder`.

Builds memeff for the GPU that is there, then runs the conformance program, the CUDA tests, the
benchmark and compute-sanitizer, the most telling ones first, within a time limit that suits one
datacenter GPU with 16 processor cores. Needs nvcc, g++, cmake, torch, ninja, pybind11 and pytest;
no network. FOLDER/results.json is written anew after every step, so that whatever ends this program
leaves what was done; the benchmark's own files are beside it.

Exit status: 0 every step passed or was skipped, 1 some failed, 77 there is no GPU.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "verify"
sys.path.insert(0, str(ROOT))

from buildtools.cuda_toolkit import find_toolkit
from buildtools.environment import find_torch

SKIPPED = 77  # exit status of our C++ tests, and of this program, where there is no GPU
TAIL_LINES = 60
# Not worth starting anything with less left.
LEAST_SECONDS = 5.0

# Both shapes of the issue tracker's and the peers' tables; the third is 4 x 4096 tokens.
SHAPES = ("8192,4096,128256", "4096,4096,128256", "16384,4096,131072")
SMALL_SHAPES = ("2048,2048,32768", "4096,2048,32768", "8192,2048,50304")


@dataclass
class Step:
    """One thing to run. `needs`: programs without which it is skipped."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a step ("passed", "failed", "timeout" or "skipped"), and its last output."""

    step: str
    status: str
    seconds: float
    command: str
    log_tail: list[str]


def query_gpu() -> dict[str, str] | None:
    """Name, compute capability, driver and memory of the first GPU; None without any."""
    fields = ("name", "compute_cap", "driver_version", "memory.total")
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode != 0 or not lines:
        return None
    values = [value.strip() for value in lines[0].split(",")]
    return dict(zip(fields, values, strict=True)) | {"count": str(len(lines))}


def commit() -> str:
    """The checkout's commit, marked where files differ from it; COMMIT where git knows nothing."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None or not git("rev-parse", "HEAD"):
        return os.environ.get("COMMIT", "unknown")
    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + ("+changes" if changes else "")


def run(step: Step, seconds: float) -> Outcome:
    """Runs a step for at most `seconds`, its whole process group ended afterwards."""
    missing = [program for program in step.needs if shutil.which(program) is None]
    shown = " ".join([*(f"{k}={v}" for k, v in step.environment.items()), *step.command])
    if missing:
        return Outcome(step.name, "skipped", 0.0, shown, [f"no {' and no '.join(missing)}"])
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env={**os.environ, **step.environment}, stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            status = {0: "passed", SKIPPED: "skipped"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            end_group(process)
        log.seek(0)
        tail = log.read().splitlines()[-TAIL_LINES:]
    return Outcome(step.name, status, round(time.monotonic() - start, 1), shown, tail)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends a process that leads a session, and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpp_build_command(arch: str) -> str:
    """Shell commands for the conformance program and the C++ kernel tests."""
    conformance = "90a" if arch == "90" else arch
    jobs = os.cpu_count() or 1
    cmake = "cmake -DCMAKE_BUILD_TYPE=Release"
    lines = [
        f"{cmake} -S . -B {BUILD}/cpp -DMEMEFF_CUDA=ON -DMEMEFF_CUDA_ARCHS={arch}",
        f"cmake --build {BUILD}/cpp --parallel {jobs}",
    ]
    if int(arch) >= 80:
        lines = [
            f"{cmake} -S tests/emulator -B {BUILD}/conformance "
            f"-DMEMEFF_CONFORMANCE_ARCH={conformance}",
            f"cmake --build {BUILD}/conformance --parallel {jobs} --target conformance",
            *lines,
        ]
    return " && ".join(lines)


def sanitizer_command(tool: str) -> str:
    """compute-sanitizer over the C++ kernel tests; the first finding fails the step."""
    return (
        f"status={SKIPPED}; for test in {BUILD}/cpp/gpu_test_*_kernels; do "
        f'compute-sanitizer --tool {tool} --error-exitcode 9 "$test"; code=$?; '
        f"if [ $code = {SKIPPED} ]; then continue; fi; "
        "if [ $code != 0 ]; then exit $code; fi; status=0; done; exit $status"
    )


def bench_step(
    folder: Path, name: str, shape: str, dtype: str, limit: float, *options: str
) -> Step:
    """One run of memeff-bench, its figures in a file of its own."""
    file = folder / f"bench-{name}-{dtype}-{shape.replace(',', 'x')}.json"
    command = [sys.executable, "-m", "memeff.bench.cli", "--device", "cuda", "--shape", shape,
               "--dtype", dtype, "--rounds", "10", "--json", str(file), *options]  # fmt: skip
    return Step(f"benchmark {name} {shape} {dtype}", command, limit)


def plan_steps(folder: Path, arch: str) -> list[Step]:
    """All steps, the most valuable first; each needs the build, which comes before them."""
    python = sys.executable
    new = int(arch) >= 80
    dtype = "bfloat16" if new else "float16"
    first, second, third = SHAPES if new else SMALL_SHAPES
    pytest = [python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
    return [
        Step("diagnostics", [python, "-m", "memeff.diagnostics"], 60),
        Step("conformance", [f"{BUILD}/conformance/conformance"], 60)
        if new
        else Step("conformance", ["sh", "-c", f"echo needs sm_80; exit {SKIPPED}"], 5),
        Step("CUDA tests", pytest, 180),
        bench_step(folder, "all", first, dtype, 120),
        Step("C++ kernel tests", ["ctest", "--test-dir", f"{BUILD}/cpp", "-L", "gpu",
                                  "--output-on-failure"], 60, ["ctest"]),
        Step("memcheck", ["sh", "-c", sanitizer_command("memcheck")], 60, ["compute-sanitizer"]),
        Step("racecheck", ["sh", "-c", sanitizer_command("racecheck")], 60, ["compute-sanitizer"]),
        bench_step(folder, "all", second, dtype, 60),
        bench_step(folder, "all", third, dtype, 60),
        bench_step(folder, "peaked", first, dtype, 60, "--peaked", "--variants",
                   "standard,cce,memeff,memeff~1e-3"),
        bench_step(folder, "forward", first, dtype, 60, "--forward"),
    ]  # fmt: skip


class Results:
    """results.json: rewritten whenever an outcome is added."""

    def __init__(self, folder: Path, environment: dict[str, Any]):
        self._file = folder / "results.json"
        self._environment = environment
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        steps = [asdict(outcome) for outcome in self.outcomes]
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({**self._environment, "steps": steps}, indent=1) + "\n")
        new.replace(self._file)
        print(f"{outcome.status:>8} {outcome.seconds:6.1f} s  {outcome.step}", flush=True)
        if outcome.status != "passed":
            print("\n".join(f"          {line}" for line in outcome.log_tail[-15:]), flush=True)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=lambda text: Path(text).resolve(), help="where the results go"
    )
    parser.add_argument("--seconds", type=float, default=530, help="in all (default %(default)s)")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds

    gpu = query_gpu()
    if gpu is None:
        print("SKIPPED: nvidia-smi finds no GPU, nothing was verified")
        return SKIPPED
    arch = gpu["compute_cap"].replace(".", "")
    torch, toolkit = find_torch(), find_toolkit()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(
        options.folder,
        {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "gpu": gpu,
            "torch": torch.version if torch else None,
            "nvcc": toolkit.version if toolkit else None,
            "cpus": os.cpu_count(),
        },
    )
    print(f"{gpu['name']}, sm_{arch}, driver {gpu['driver_version']}; results in {options.folder}")

    def left(limit: float) -> float:
        return min(limit, deadline - time.monotonic())

    # The C++ programs are built beside the extension: together they keep 16 cores busy.
    BUILD.mkdir(parents=True, exist_ok=True)
    cpp_log = BUILD / "cpp.log"
    cpp_start = time.monotonic()
    with cpp_log.open("w") as log:
        cpp = subprocess.Popen(
            ["sh", "-c", cpp_build_command(arch)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        switches = {"MEMEFF_CUDA": "1", "MEMEFF_CUDA_ARCHS": arch}
        step = Step("build of the extension", build, 300, environment=switches)
        results.add(run(step, left(step.limit)))
        try:
            code = cpp.wait(max(1.0, left(180)))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
    finally:
        end_group(cpp)
    seconds = round(time.monotonic() - cpp_start, 1)
    tail = cpp_log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    results.add(Outcome("build of the C++ tests", status, seconds, cpp_build_command(arch), tail))

    for step in plan_steps(options.folder, arch):
        if left(step.limit) < LEAST_SECONDS:
            results.add(Outcome(step.name, "skipped", 0.0, "", ["no time was left"]))
        else:
            results.add(run(step, left(step.limit)))
    return 1 if any(o.status in ("failed", "timeout") for o in results.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
