#!/usr/bin/env python3
"""Everything that needs a GPU, in one command: `make verify-gpu OUT=folder`.

Builds memeff for the GPU that is there, then runs the conformance program, memeff-tune, the CUDA
tests, the benchmarks, ncu and compute-sanitizer, the most telling ones first, within a time limit
that suits one datacenter GPU with 16 processor cores. A family of kernels that fails, hangs or is
wrong in one step is left out of those that follow. Needs nvcc, g++, cmake, torch, ninja, pybind11
and pytest; no network. Files are written after every step, so that whatever ends this program
leaves what was done:

    FOLDER/results.json            every step with its last output and its figures
    FOLDER/output.txt              everything that the steps printed
    FOLDER/measured_choices.inc    which kernels were fastest, for csrc/cuda/measured_choices.inc

A second run builds only what has changed; --steps names what it is for, --build-only ARCH builds
without a GPU, before its clock runs. The steps of least value come last, and one for which too
little of --seconds is left is skipped, and says so.

Exit status: 0 no step failed, 1 some failed, 77 there is no GPU.
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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "verify"
CHOICES = ROOT / "csrc" / "cuda" / "measured_choices.inc"
sys.path.insert(0, str(ROOT))

import measured_choices

from buildtools.cuda_toolkit import Toolkit, find_toolkit
from buildtools.environment import Torch, find_torch
from memeff._tuned import VERIFIED
from memeff.bench.choices import candidates, choices_of

SKIPPED = 77  # exit status of our C++ tests, and of this program, where there is no GPU
TAIL_LINES = 60
# Both shapes of the issue tracker's and the peers' tables; the third is 4 x 4096 tokens.
SHAPES = ("8192,4096,128256", "4096,4096,128256", "16384,4096,131072")
# Measured choices serve shapes within a factor of 4: with this one, heads of small models, too.
SMALL_HEAD = "2048,2048,32768"
SMALL_SHAPES = ("2048,2048,32768", "4096,2048,32768", "8192,2048,50304")


@dataclass
class Step:
    """One thing to run. `expected`: seconds that it should take on an H200, with less it does not
    start; `needs`: programs without which it is skipped; `figures`: a file that it writes, JSON,
    which becomes part of its outcome; `family`: the kernels that its failure speaks against.
    """

    name: str
    command: Sequence[str]
    limit: float  # seconds
    expected: float
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    figures: Path | None = None
    family: str = ""


@dataclass
class Outcome:
    """What became of a step, and its last output: "passed", "failed", "timeout" (its own limit),
    "unfinished" (the end of --seconds came first) or "skipped".
    """

    step: str
    status: str
    seconds: float
    command: str
    log_tail: list[str]
    figures: Any = None


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


def keep(output: Path | None, title: str, text: str) -> None:
    """Adds what a step printed to the file of all output."""
    if output is not None:
        with output.open("a") as file:
            file.write(f"==== {title}\n{text.rstrip()}\n\n")


def run(step: Step, seconds: float, output: Path | None = None) -> Outcome:
    """Runs a step for at most `seconds`, its whole process group ended afterwards."""
    missing = [program for program in step.needs if shutil.which(program) is None]
    shown = " ".join([*(f"{k}={v}" for k, v in step.environment.items()), *step.command])
    if missing:
        return Outcome(step.name, "skipped", 0.0, shown, [f"no {' and no '.join(missing)}"])
    if step.figures is not None:
        step.figures.parent.mkdir(parents=True, exist_ok=True)
        step.figures.unlink(missing_ok=True)
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
        text = log.read()
    keep(output, f"{step.name}: {shown}", text)
    tail = text.splitlines()[-TAIL_LINES:]
    seconds = round(time.monotonic() - start, 1)
    figures = None
    if step.figures is not None and step.figures.exists():
        figures = json.loads(step.figures.read_text())
    return Outcome(step.name, status, seconds, shown, tail, figures)


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
        f"cmake --build {BUILD}/cpp --parallel {jobs} --target gpu",
    ]
    if int(arch) >= 80:
        lines = [
            f"{cmake} -S tests/emulator -B {BUILD}/conformance "
            f"-DMEMEFF_CONFORMANCE_ARCH={conformance}",
            f"cmake --build {BUILD}/conformance --parallel {jobs} --target conformance",
            *lines,
        ]
    return " && ".join(lines)


def sanitizer_command(tool: str, families: Sequence[str]) -> str:
    """compute-sanitizer over the C++ kernel tests, the newest GPU's first, each for a while; the
    first finding fails the step.
    """
    parts = [*(part for part in ("sm90", "sm80") if part in families), "token", "gen"]
    tests = " ".join(f"{BUILD}/cpp/gpu_test_{part}*" for part in parts)
    return (
        f"status={SKIPPED}; for test in {tests}; do echo $test; "
        f'timeout 40 compute-sanitizer --tool {tool} --error-exitcode 9 "$test"; code=$?; '
        f"if [ $code = {SKIPPED} ]; then continue; fi; "
        "if [ $code = 124 ]; then echo no finding in 40 s; code=0; fi; "
        "if [ $code != 0 ]; then exit $code; fi; status=0; done; exit $status"
    )


def pytest_step(name: str, which: str, limit: float, expected: float, family: str = "") -> Step:
    """The tests of the CUDA extension whose names `which` selects (pytest -k). After an error that
    CUDA does not recover from all that follow fail: hence a process for each family of kernels, and
    an end after some failures. Names come first, so that one that hangs has been named.
    """
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail=20", "-m", "cuda",
               "-p", "no:cacheprovider", "-k", which, "tests"]  # fmt: skip
    return Step(name, command, limit, expected, family=family)


def ctest_step(name: str, *selection: str, expected: float, family: str = "") -> Step:
    """The C++ tests of the kernels that are so selected."""
    command = ["ctest", "--test-dir", f"{BUILD}/cpp", "--output-on-failure", "-L", "gpu"]
    return Step(name, [*command, *selection], 90, expected, ["ctest"], family=family)


def bench_step(
    name: str, shape: str, dtype: str, limit: float, expected: float, *options: str
) -> Step:
    """One run of memeff-bench."""
    file = BUILD / "figures" / f"{name}-{dtype}-{shape.replace(',', 'x')}.json"
    command = [sys.executable, "-m", "memeff.bench.cli", "--device", "cuda", "--shape", shape,
               "--dtype", dtype, "--rounds", "10", "--json", str(file), *options]  # fmt: skip
    return Step(f"benchmark {name} {shape} {dtype}", command, limit, expected, figures=file)


def choice_step(pairs: Sequence[str], shape: str, dtype: str, skips: bool = False) -> Step:
    """Kernels against each other, whole calls in one process."""
    mass = "~1e-3" if skips else ""
    variants = ",".join(f"memeff{mass}={kernels}" for kernels in pairs)
    options = ["--variants", variants, *(["--peaked"] if skips else [])]
    return bench_step("choices skipping" if skips else "choices", shape, dtype, 60, 15, *options)


def budget_step(pairs: Sequence[str], shape: str, dtype: str) -> Step:
    """The same under memory budgets, where handwritten products are predicted to win
    (docs/kernels.md, "Time against memory")."""
    variants = [
        f"memeff@{budget}={kernels}"
        for budget in ("512MiB", "256MiB", "32MiB")
        for kernels in pairs
    ]
    return bench_step("budgets", shape, dtype, 60, 35, "--variants", ",".join(variants))


def tune_step(shapes: Sequence[str], dtype: str, limit: float) -> Step:
    """What a user runs: every family verified and timed in a process of its own."""
    file = BUILD / "figures" / "tuned.json"
    command = [sys.executable, "-m", "memeff.bench.tuning", "--json", str(file),
               "--dtype", dtype, "--seconds", str(limit)]  # fmt: skip
    for shape in shapes:
        command += ["--shape", shape]
    return Step("memeff-tune", command, limit + 10, expected=100, figures=file)


def kernel_step(
    shapes: Sequence[str], dtype: str, torch: Torch | None, families: Sequence[str],
    name: str = "kernels alone", build: str = "cpp", part: str = "",
) -> Step:  # fmt: skip
    """Every kernel of these families alone, or those with `part` in their names."""
    file = BUILD / "figures" / f"{name}.json"
    command = [f"{BUILD}/{build}/bench_cuda_kernels", "--dtype", dtype, "--json", str(file),
               "--families", ",".join(families)]  # fmt: skip
    for shape in shapes:
        command += ["--shape", shape]
    if part:
        command += ["--kernels", part]
    packages = torch.folder.parent / "nvidia" if torch else ROOT / "none"
    folders = [str(folder.parent) for folder in sorted(packages.glob("*/lib/libcublas.so.*"))]
    path = os.pathsep.join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {"LD_LIBRARY_PATH": path}
    return Step(name, command, 90, expected=30, environment=environment, figures=file)


# One of each kind: scores and products on tensor cores, and what memory bounds.
PROFILED = ("linear_statistics", "grad_weight_product", "stored_gradient", "keep_scores")


def profile_step(shape: str, dtype: str, families: Sequence[str]) -> Step:
    """How busy tensor cores, L2 and shared memory are in four kernels."""
    sections = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis",
                "WarpStateStats", "Occupancy")  # fmt: skip
    command = ["ncu", *(word for section in sections for word in ("--section", section))]
    names = "|".join(PROFILED)
    command += ["--kernel-name", f"regex:{names}", "--launch-count", "12"]
    command += [f"{BUILD}/cpp/bench_cuda_kernels", "--dtype", dtype, "--shape", shape,
                "--rounds", "1", "--kernels", ",".join(PROFILED),
                "--families", ",".join(families)]  # fmt: skip
    return Step("ncu", command, 60, 30, ["ncu"])


WITH_STAGGER, WITHOUT_STAGGER = "kernels with a stagger", "kernels without a stagger"


def stagger_steps(
    shape: str, dtype: str, torch: Torch | None, families: Sequence[str]
) -> list[Step]:
    """What the stagger of the consumer warpgroups of sm90 gains: a second build, whose groups
    begin tiles together (csrc/cuda/sm90/pipeline.cuh), and both timed one after the other.
    """
    build = (
        f"cmake -DCMAKE_BUILD_TYPE=Release -S . -B {BUILD}/cpp-no-stagger -DMEMEFF_CUDA=ON "
        "-DMEMEFF_CUDA_ARCHS=90 -DCMAKE_CUDA_FLAGS=-DMEMEFF_SM90_STAGGER_STEPS=0 && "
        f"cmake --build {BUILD}/cpp-no-stagger --parallel {os.cpu_count() or 1} "
        "--target bench_cuda_kernels"
    )
    families = [family for family in families if family.startswith("sm90")]
    part = "linear_,_product"
    return [
        Step("build without a stagger", ["sh", "-c", build], 180, 60),
        kernel_step([shape], dtype, torch, families, WITHOUT_STAGGER, "cpp-no-stagger", part),
        kernel_step([shape], dtype, torch, families, WITH_STAGGER, "cpp", part),
    ]


def hang_steps() -> list[Step]:
    """The C++ tests of sm90 in a build that says which wait does not end (docs/kernels-sm90.md)."""
    folder = f"{BUILD}/cpp-traps"
    build = (
        f"cmake -DCMAKE_BUILD_TYPE=Release -S . -B {folder} -DMEMEFF_CUDA=ON "
        "-DMEMEFF_CUDA_ARCHS=90 -DCMAKE_CUDA_FLAGS=-DMEMEFF_MBARRIER_TRIES=100000 && "
        f"cmake --build {folder} --parallel {os.cpu_count() or 1} --target gpu"
    )
    test = ["ctest", "--test-dir", folder, "--output-on-failure", "-L", "gpu", "-R", "sm90"]
    return [
        Step("build that traps hangs", ["sh", "-c", build], 180, 90),
        Step("C++ kernel tests, sm90, trapping hangs", test, 90, 20, ["ctest"]),
    ]


def stagger_comparison(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The medians of both builds side by side, for each kernel that has such a stagger."""
    seconds: dict[tuple[str, ...], dict[str, float]] = {}
    for outcome in outcomes:
        if outcome.step not in (WITH_STAGGER, WITHOUT_STAGGER) or outcome.figures is None:
            continue
        for case in (case for shape in outcome.figures["shapes"] for case in shape["cases"]):
            key = (case["kernel"], case["family"], case["variant"])
            if case["family"].startswith("sm90"):
                seconds.setdefault(key, {})[outcome.step] = case["median_s"]
    names = ("kernel", "family", "variant")
    return [
        {**dict(zip(names, key, strict=True)), "with_s": both[WITH_STAGGER],
         "without_s": both[WITHOUT_STAGGER]}
        for key, both in seconds.items() if len(both) == 2
    ]  # fmt: skip


# Whether torch can use the GPU that nvidia-smi has found, and the driver programs of this nvcc.
DRIVER_CHECK = """
import sys, torch
assert torch.ones(3, device="cuda").sum().item() == 3
driver, toolkit = torch._C._cuda_getDriverVersion() // 1000, int(sys.argv[1])
if driver < toolkit:
    sys.exit(f"the driver is for CUDA {driver}, nvcc is of CUDA {toolkit}: install a newer driver")
"""


def driver_step(toolkit: Toolkit | None) -> Step:
    """Too old a driver would make tests skip, and skipped tests look like nothing was wrong."""
    major = toolkit.version.split(".")[0] if toolkit else "0"
    return Step("driver", [sys.executable, "-c", DRIVER_CHECK, major], 60, 5)


def plan_steps(arch: str, torch: Torch | None, banned: Collection[str]) -> Iterator[Step]:
    """All steps, the most valuable first; each needs the build, which comes before them. They come
    one by one: families of kernels in `banned`, which grows meanwhile, are left out of the rest.
    """
    python = sys.executable
    new = int(arch) >= 80
    dtype = "bfloat16" if new else "float16"
    first, second, third = SHAPES if new else SMALL_SHAPES

    def left(skips: bool = False) -> list[str]:
        return [
            pair for pair in candidates(int(arch), skips)
            if not any(family in banned for family in pair.split("+"))
        ]  # fmt: skip

    def families() -> list[str]:
        return sorted({"generic", *(name for pair in left() for name in pair.split("+"))})

    yield Step("diagnostics", [python, "-m", "memeff.diagnostics"], 60, 5)
    if new:
        yield Step("conformance", [f"{BUILD}/conformance/conformance"], 90, 10)
    yield tune_step([first, SMALL_HEAD], dtype, 120)
    yield pytest_step("CUDA tests", "not sm80 and not sm90", 90, 30)
    yield ctest_step("C++ kernel tests", "-E", "sm|bench", expected=15)
    if "sm80" in families():
        yield pytest_step("CUDA tests, sm80", "sm80 and not sm90", 90, 30, "sm80")
        yield ctest_step("C++ kernel tests, sm80", "-R", "sm80", expected=15, family="sm80")
    yield kernel_step([first], dtype, torch, [*families(), "cublas"])
    if "sm90" in families():
        which = "sm90 and not sm90x2 and not sm90rs"
        yield pytest_step("CUDA tests, sm90", which, 60, 25, "sm90")
        yield ctest_step("C++ kernel tests, sm90", "-R", "sm90", expected=15, family="sm90")
    for family in ("sm90x2", "sm90rs"):
        if family in families():
            yield pytest_step(f"CUDA tests, {family}", family, 60, 20, family)
    if len(left()) > 1:
        yield choice_step(left(), first, dtype)
        yield budget_step(left(), first, dtype)
    yield bench_step("all", first, dtype, 120, 60)
    if len(left()) > 1:
        for shape in (SMALL_HEAD, second, third):
            yield choice_step(left(), shape, dtype)
        yield choice_step(left(skips=True), first, dtype, skips=True)
    yield profile_step(second, dtype, families())
    for tool in ("memcheck", "racecheck"):
        yield Step(tool, ["sh", "-c", sanitizer_command(tool, families())], 90, 60,
                   ["compute-sanitizer"])  # fmt: skip
    if any(family.startswith("sm90") for family in banned):
        yield from hang_steps()
    for shape in (second, third):
        yield bench_step("all", shape, dtype, 60, 40)
    yield bench_step("peaked", first, dtype, 60, 20, "--peaked", "--variants",
                     "standard,cce,memeff,memeff~1e-3")  # fmt: skip
    yield bench_step("forward", first, dtype, 60, 20, "--forward")
    if "sm90" in families():
        yield from stagger_steps(first, dtype, torch, families())


def newly_banned(outcome: Outcome, step: Step) -> dict[str, str]:
    """The families that a step speaks against, and what it says."""
    if step.name == "memeff-tune":
        results = (outcome.figures or {"results": []})["results"]
        return {
            family: f"{step.name}: {state}"
            for result in results
            for family, state in result["families"].items()
            if state != VERIFIED
        }
    if step.family and outcome.status in ("failed", "timeout"):
        return {step.family: f"{step.name}: {outcome.status}"}
    return {}


def replace(file: Path, text: str) -> None:
    """Writes a file so that it is there in full at every moment."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)


def choices_file(outcomes: Sequence[Outcome], environment: Mapping[str, Any], old: str) -> str:
    """measured_choices.inc as the steps so far have it, "" where nothing was compared."""
    runs: list[dict[str, Any]] = []
    for outcome in outcomes:
        if outcome.figures is not None and "runs" in outcome.figures:
            runs += outcome.figures["runs"]
    choices = choices_of(runs)
    if not choices:
        return ""
    gpu = environment["gpu"]
    tests = "; ".join(f"{o.step} {o.status}" for o in outcomes if o.step.startswith("CUDA tests"))
    remarks = [
        f"driver {gpu['driver_version']}, torch {environment['torch']}, {environment['date']}",
        f"commit {environment['commit']}; make verify-gpu: {tests or 'no CUDA tests'}",
    ]
    capability = int(gpu["compute_cap"].replace(".", ""))
    return measured_choices.render(choices, gpu["name"], capability, remarks, old)


class Results:
    """results.json: rewritten whenever an outcome is added."""

    def __init__(self, folder: Path, environment: dict[str, Any]):
        self._file = folder / "results.json"
        self._environment = environment
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        content = {**self._environment, "steps": [asdict(outcome) for outcome in self.outcomes]}
        if stagger := stagger_comparison(self.outcomes):
            content["stagger"] = stagger
        replace(self._file, json.dumps(content, indent=1) + "\n")
        print(f"{outcome.status:>8} {outcome.seconds:6.1f} s  {outcome.step}", flush=True)
        if outcome.status != "passed":
            print("\n".join(f"          {line}" for line in outcome.log_tail[-15:]), flush=True)


class Run:
    """One run: where its results go, and how much of its time is left."""

    def __init__(self, folder: Path, environment: dict[str, Any], seconds: float):
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._folder = folder
        self._environment = environment
        self._results = Results(folder, environment)
        self._output = folder / "output.txt"
        self._output.write_text("")
        self.banned: dict[str, str] = {}  # families of kernels, and why

    @property
    def failed(self) -> bool:
        return any(o.status in ("failed", "timeout") for o in self._results.outcomes)

    def left(self, limit: float) -> float:
        return min(limit, self._deadline - time.monotonic())

    def build(self, arch: str) -> None:
        """The C++ programs and the extension at the same time: both keep 16 cores busy."""
        BUILD.mkdir(parents=True, exist_ok=True)
        log, start, command = BUILD / "cpp.log", time.monotonic(), cpp_build_command(arch)
        with log.open("w") as file:
            cpp = subprocess.Popen(
                ["sh", "-c", command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            switches = {"MEMEFF_CUDA": "1", "MEMEFF_CUDA_ARCHS": arch}
            self.do(Step("build of the extension", build, 300, 5, environment=switches))
            try:
                code = cpp.wait(max(1.0, self.left(180)))
                status = "passed" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
        finally:
            end_group(cpp)
        text = log.read_text(errors="replace")
        keep(self._output, "build of the C++ tests", text)
        tail = text.splitlines()[-TAIL_LINES:]
        seconds = round(time.monotonic() - start, 1)
        self._results.add(Outcome("build of the C++ tests", status, seconds, command, tail))

    def do(self, step: Step) -> Outcome:
        """A step, if there is time for it."""
        limit = self.left(step.limit)
        if limit < step.expected:
            reason = (
                f"expected to take {step.expected:.0f} s, {max(0.0, limit):.0f} s are left of "
                f"--seconds {self._seconds:.0f}; --steps runs it later"
            )
            outcome = Outcome(step.name, "skipped", 0.0, "", [reason])
        else:
            outcome = run(step, limit, self._output)
            if outcome.status == "timeout" and limit < step.limit:
                outcome.status = "unfinished"
        self._results.add(outcome)
        for family, reason in newly_banned(outcome, step).items():
            print(f"          {family} is left out from here on: {reason}", flush=True)
            self.banned.setdefault(family, reason)
        table = choices_file(self._results.outcomes, self._environment, CHOICES.read_text())
        if table:
            replace(self._folder / "measured_choices.inc", table)
        return outcome


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=lambda text: Path(text).resolve(), help="where the results go"
    )
    parser.add_argument(
        "--seconds", type=float, default=550,
        help="in all; steps that do not fit are skipped (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", metavar="PART,...", help="only steps with one of these in their names"
    )
    parser.add_argument(
        "--build-only", metavar="ARCH", help="build for it, such as 90, and end: needs no GPU"
    )
    options = parser.parse_args()

    gpu = query_gpu()
    if gpu is None and not options.build_only:
        print("SKIPPED: nvidia-smi finds no GPU, nothing was verified")
        return SKIPPED
    torch, toolkit = find_torch(), find_toolkit()
    options.folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "gpu": gpu,
        "torch": torch.version if torch else None,
        "nvcc": toolkit.version if toolkit else None,
        "cpus": os.cpu_count(),
    }
    # Programs of the environment that this Python belongs to, such as ninja.
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    os.environ["PATH"] = os.pathsep.join(path)
    this_run = Run(options.folder, environment, options.seconds)
    if options.build_only:
        this_run.build(options.build_only)
        return 1 if this_run.failed else 0
    assert gpu is not None
    arch = gpu["compute_cap"].replace(".", "")
    print(f"{gpu['name']}, sm_{arch}, driver {gpu['driver_version']}; results in {options.folder}")
    if this_run.do(driver_step(toolkit)).status != "passed":
        return 1
    this_run.build(arch)
    parts = options.steps.split(",") if options.steps else [""]
    for step in plan_steps(arch, torch, this_run.banned):
        if any(part in step.name for part in parts):
            this_run.do(step)
    return 1 if this_run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
