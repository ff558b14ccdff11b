#!/usr/bin/env python3
"""Removes every barrier, wait and fence from the CUDA kernels, one by one: some test must notice.

    python tests/emulator/mutate.py tests/emulator/mutants.txt --compiler clang++-19

The table gets a line per mutant: what gave it away, or that it survived. A mutant is tried by the
test programs that contain the file, shortest first, until one fails. Lines of files that have not
changed since the commit they name are kept, so a run that was cut off goes on where it stopped.

A mutant survives when the synchronisation is superfluous, or when the tests do not reach the case
that needs it. Known survivors are in SURVIVORS, each with the reason; any other is a failure (exit
status 1).

Works on a copy of the sources in build/mutants: only the table is written beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = "csrc/cuda"
COPY = ROOT / "build" / "mutants"

# Calls that synchronise: the language's, those of csrc/cuda/ptx by their names, and sm90's helpers.
CALL = (
    r"(?:__sync(?:threads|warp)|ptx::\w*(?:wait|commit|fence|arrive|(?<!a)sync)\w*(?:<[^>]*>)?"
    r"|leave_stage|finish_loads|wait_until_empty|boxes\.finish)\("
)
# Such a call as a statement of its own, possibly under an `if` of the same line.
STATEMENT = re.compile(rf"^(\s*(?:if \(.*\) )?)({CALL}[^;]*\);)")

# (file below csrc/cuda, statement): why the tests cannot notice its absence.
SURVIVORS: dict[tuple[str, str], str] = {}

HEADER = """\
Every barrier, wait and fence of the kernels, removed alone: what noticed. Written by
tests/emulator/mutate.py; each line is true for its file as of the commit it names.
"""
COLUMNS = ("result", "place", "statement", "noticed by", "commit")


@dataclass(frozen=True)
class Mutant:
    file: str  # below csrc/cuda
    line: int  # from 1
    statement: str
    text: str  # of the file without the statement

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def find_mutants(file: str, source: str) -> list[Mutant]:
    """One for each synchronisation in the file."""
    lines = source.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        code = line.split("//")[0].rstrip()
        match = STATEMENT.match(code)
        if match:
            changed = [*lines[: number - 1], f"{match[1]};", *lines[number:]]
            found.append(Mutant(file, number, match[2], "\n".join(changed)))
        elif re.search(rf"(?<!void ){CALL}", code):
            raise SystemExit(f"{file}:{number}: not a statement of its own: {code.strip()}")
    return found


def kernel_files(part: str) -> list[str]:
    """Those with `part` in their path: not the primitives themselves."""
    kernels = ROOT / KERNELS
    files = [str(f.relative_to(kernels)) for f in kernels.rglob("*.cu*")]
    return sorted(f for f in files if part in f and not f.startswith(("ptx/", "common/device")))


# ---- building and running ----


def run(*command: str | pathlib.Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = done.stdout[-4000:] + done.stderr[-4000:]
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{output}")


@dataclass
class Program:
    """A test program and what is known of it with the kernels as they are."""

    path: pathlib.Path
    digest: str = ""
    seconds: float = 0

    def current_digest(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def failure(self, limit: float) -> str | None:
        """The first complaint of a run, or None."""
        # A line at a time, so that nobody waits for the rest once it has failed.
        command = ["stdbuf", "-oL", self.path]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        too_long = threading.Event()

        def stop() -> None:
            too_long.set()
            process.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        lines: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            if lines or "FAILED" in line or line.startswith("emulator:"):
                lines.append(line.strip())
            if len(lines) == 2:  # the second may say which defect was reported
                break
        if lines:
            process.kill()
        status = process.wait()
        timer.cancel()
        if lines:
            report = re.match(r"(?:emulator: )?([a-z' -]+): .* at ", lines[-1])
            return report[1] if report else "wrong numbers"
        if too_long.is_set():
            return "does not end"
        return f"exit status {status}" if status != 0 else None


class Workshop:
    """A copy of the sources, its build, and the test programs of the kernels."""

    def __init__(self, compiler: str, jobs: int) -> None:
        shutil.rmtree(COPY, ignore_errors=True)
        for part in ("csrc", "tests/emulator"):
            shutil.copytree(ROOT / part, COPY / part)
        build = COPY / "build"
        self.build = ("cmake", "--build", str(build), "--parallel", str(jobs))
        configure = ["cmake", "-S", COPY / "tests/emulator", "-B", build, "-G", "Ninja"]
        configure.append(f"-DCMAKE_CXX_COMPILER={compiler}")
        if shutil.which("ccache"):
            configure.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        run(*configure)
        run(*self.build)
        listed = subprocess.run(
            ["ctest", "--test-dir", build, "-R", "kernels", "--show-only=json-v1"],
            capture_output=True, check=True,
        )  # fmt: skip
        tests = json.loads(listed.stdout)["tests"]
        self.programs = [Program(pathlib.Path(test["command"][0])) for test in tests]
        for program in self.programs:
            begin = time.monotonic()
            failure = program.failure(1200)
            if failure:
                raise SystemExit(
                    f"{program.path.name} fails with the kernels as they are: {failure}"
                )
            program.seconds = time.monotonic() - begin
            program.digest = program.current_digest()
        self.programs.sort(key=lambda program: program.seconds)

    def who_notices(self, mutant: Mutant) -> str | None:
        """`program: complaint`, or None."""
        source = COPY / KERNELS / mutant.file
        original = source.read_text()
        source.write_text(mutant.text)
        try:
            run(*self.build)
            for program in self.programs:
                if program.current_digest() == program.digest:
                    continue  # does not contain the kernel
                failure = program.failure(60 + 10 * program.seconds)
                if failure:
                    return f"{program.path.name}: {failure}"
        finally:
            source.write_text(original)
        return None


# ---- the table ----


def read_table(path: pathlib.Path) -> dict[str, list[str]]:
    """Rows by place."""
    text = path.read_text() if path.exists() else ""
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.split("\n")]
    return {row[1]: row for row in rows if len(row) == len(COLUMNS) and tuple(row) != COLUMNS}


def write_table(path: pathlib.Path, rows: dict[str, list[str]]) -> None:
    def order(place: str) -> tuple[str, int]:
        file, line = place.split(":")
        return file, int(line)

    lines = [list(COLUMNS), *(rows[place] for place in sorted(rows, key=order))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    path.write_text(HEADER + "\n" + "".join(line.rstrip() + "\n" for line in text))


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("table", type=pathlib.Path, help="file that gets the result")
    parser.add_argument("--compiler", default="clang++")
    parser.add_argument("--only", default="", help="part of the path of the files to mutate")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    if git("diff", "--quiet", "HEAD", "--", KERNELS).returncode != 0:
        raise SystemExit(f"commit {KERNELS} first: the table names the commit it is true for")
    commit = git("rev-parse", "--short", "HEAD").stdout.strip()

    rows = read_table(arguments.table)
    selected = {
        file: find_mutants(file, (ROOT / KERNELS / file).read_text())
        for file in kernel_files(arguments.only)
    }
    todo: list[Mutant] = []
    for file, mutants in selected.items():
        old = {place: row for place, row in rows.items() if place.split(":")[0] == file}
        for place in old:
            del rows[place]
        for mutant in mutants:
            row = old.get(mutant.place)
            path = f"{KERNELS}/{file}"
            if row and git("diff", "--quiet", row[-1], "HEAD", "--", path).returncode == 0:
                rows[mutant.place] = row
            else:
                todo.append(mutant)
    print(f"{sum(map(len, selected.values()))} mutants, {len(todo)} to be tried", flush=True)

    workshop = Workshop(arguments.compiler, arguments.jobs) if todo else None
    for number, mutant in enumerate(todo, 1):
        assert workshop is not None
        begin = time.monotonic()
        noticed = workshop.who_notices(mutant)
        reason = SURVIVORS.get((mutant.file, mutant.statement), "")
        result = "caught" if noticed else "explained" if reason else "SURVIVED"
        row = [result, mutant.place, mutant.statement, noticed or reason or "nobody", commit]
        rows[mutant.place] = row
        write_table(arguments.table, rows)  # at once: a run may be cut off
        seconds = time.monotonic() - begin
        print(f"{number}/{len(todo)} {seconds:4.0f} s  {'  '.join(row[:-1])}", flush=True)
    write_table(arguments.table, rows)
    survivors = [place for place, row in rows.items() if row[0] == "SURVIVED"]
    print(f"{len(rows)} mutants, {len(survivors)} unexplained survivors", *survivors)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
