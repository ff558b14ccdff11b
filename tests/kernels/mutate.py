#!/usr/bin/env python3
"""Removes every barrier, wait and fence from the CUDA kernels, one by one: some test must catch it.

    python tests/kernels/mutate.py tests/kernels/mutants.txt --compiler clang++-19

The table gets a line per mutant: what gave it away, or that it survived. What was caught is not
tried again as long as its file is as it was at the commit of the line, so a run that was cut off
goes on where it stopped.

A mutant survives when the synchronisation is superfluous, or when the tests do not reach the case
that needs it. Known survivors are in SURVIVORS, each with the reason; any other is a failure (exit
status 1).

Compiling takes longer than testing, so all mutants are built at once: in a copy of the sources, in
build/mutants, each statement asks whether it is the one that is left out in this run. A mutant is
tried by the test programs that get to the statement, shortest first, until one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = "csrc/cuda"
COPY = ROOT / "build" / "mutants"
REACHED = COPY / "reached.txt"  # by the last run of a program: numbers of mutants

# Calls that synchronise: the language's, those of csrc/cuda/ptx by their names, and sm90's helpers.
CALL = (
    r"(?:__sync(?:threads|warp)|ptx::\w*(?:wait|commit|fence|arrive|(?<!a)sync)\w*(?:<[^>]*>)?"
    r"|release_(?:read_)?stage|finish_loads|wait_until_empty|boxes\.finish)\("
)
# Such a call as a statement of its own, possibly under an `if` of the same line.
STATEMENT = re.compile(rf"^(\s*(?:if \(.*\) )?)({CALL}[^;]*\);)")

# (file below csrc/cuda, statement): why the tests cannot catch its absence.
SURVIVORS: dict[tuple[str, str], str] = {}

# Included before every file of the copy. The emulator must not see the accesses in here.
QUESTION = """\
#pragma once
#include <cstdio>
#include <cstdlib>
__attribute__((noinline, no_sanitize("thread"))) inline bool memeff_left_out(int mutant) {
  static const char* const chosen = std::getenv("MEMEFF_MUTANT");
  static std::FILE* const reached = std::fopen(std::getenv("MEMEFF_REACHED"), "w");
  static bool seen[1000];
  if (!seen[mutant]) std::fprintf(reached, "%d\\n", mutant), std::fflush(reached);
  seen[mutant] = true;
  return chosen != nullptr && std::atoi(chosen) == mutant;
}
"""

HEADER = """\
Every barrier, wait and fence of the kernels, removed alone: what caught it. Written by
tests/kernels/mutate.py; each line is true for its file as of the commit it names.
"""
COLUMNS = ("result", "place", "statement", "caught by", "commit")


@dataclass(frozen=True)
class Mutant:
    file: str  # below csrc/cuda
    line: int  # from 1
    condition: str  # what precedes the statement in its line
    statement: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def find_mutants(file: str, source: str) -> list[Mutant]:
    """One for each synchronisation in the file."""
    found = []
    for number, line in enumerate(source.split("\n"), 1):
        code = line.split("//")[0].rstrip()
        match = STATEMENT.match(code)
        if match:
            found.append(Mutant(file, number, match[1], match[2]))
        elif re.search(rf"(?<!void ){CALL}", code):
            raise SystemExit(f"{file}:{number}: not a statement of its own: {code.strip()}")
    return found


def with_questions(source: str, mutants: Mapping[int, Mutant]) -> str:
    """The file, each of its mutants present only if it is not the one that is left out."""
    lines = source.split("\n")
    for number, mutant in mutants.items():
        guarded = f"{{ if (!memeff_left_out({number})) {mutant.statement} }}"
        lines[mutant.line - 1] = mutant.condition + guarded
    return "\n".join(lines)


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
    seconds: float = 0
    reaches: frozenset[int] = frozenset()

    def failure(self, mutant: int, limit: float) -> str | None:
        """The first complaint of a run without the statement of that number, or None."""
        variables = {"MEMEFF_MUTANT": str(mutant), "MEMEFF_REACHED": str(REACHED)}
        # Lines come at once: those after the first complaint are not waited for.
        process = subprocess.Popen(
            ["stdbuf", "-oL", self.path],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | variables,
        )  # fmt: skip
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
                process.kill()
                break
        status = process.wait()
        timer.cancel()
        if lines:
            report = re.match(r"(?:emulator: )?([a-z' -]+): .* at ", lines[-1])
            return report[1] if report else "wrong numbers"
        if too_long.is_set():
            return "does not end"
        return f"exit status {status}" if status != 0 else None


def build_programs(compiler: str, jobs: int, mutants: Sequence[Mutant]) -> list[Program]:
    """The test programs of the kernels, with mutants numbered as they come; shortest first."""
    shutil.rmtree(COPY, ignore_errors=True)
    for part in ("csrc", "tests/emulator", "tests/kernels", "benchmarks/cpp"):
        shutil.copytree(ROOT / part, COPY / part)
    for file in {mutant.file for mutant in mutants}:
        own = {number: mutant for number, mutant in enumerate(mutants) if mutant.file == file}
        path = COPY / KERNELS / file
        path.write_text(with_questions(path.read_text(), own))
    question = COPY / "question.h"
    question.write_text(QUESTION)
    build = COPY / "build"
    configure = ["cmake", "-S", COPY / "tests/kernels", "-B", build, "-G", "Ninja"]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_CXX_FLAGS=-include {question}"]
    if shutil.which("ccache"):
        configure.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    run(*configure)
    list_tests = ["ctest", "--test-dir", build, "-R", "kernels", "--show-only=json-v1"]
    listed = subprocess.run(list_tests, capture_output=True, check=True).stdout
    names = [test["name"] for test in json.loads(listed)["tests"]]  # and of targets
    run("cmake", "--build", build, "--parallel", str(jobs), "--target", *names)
    programs = []
    for name in names:
        program = Program(build / name)
        REACHED.write_text("")
        begin = time.monotonic()
        failure = program.failure(mutant=-1, limit=1200)
        if failure:
            raise SystemExit(f"{program.path.name} fails with the kernels as they are: {failure}")
        program.seconds = time.monotonic() - begin
        program.reaches = frozenset(map(int, REACHED.read_text().split()))
        programs.append(program)
    return sorted(programs, key=lambda program: program.seconds)


def who_catches(number: int, programs: Sequence[Program]) -> str | None:
    """`program: complaint`, or None."""
    for program in programs:
        if number in program.reaches:
            failure = program.failure(number, limit=60 + 10 * program.seconds)
            if failure:
                return f"{program.path.name}: {failure}"
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
    for place in [place for place in rows if not (ROOT / KERNELS / place.split(":")[0]).exists()]:
        del rows[place]
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
            unchanged = row and git("diff", "--quiet", row[-1], "HEAD", "--", path).returncode == 0
            if row and unchanged and row[0] == "caught":
                rows[mutant.place] = row
            else:
                todo.append(mutant)
    print(f"{sum(map(len, selected.values()))} mutants, {len(todo)} to be tried", flush=True)

    programs = build_programs(arguments.compiler, arguments.jobs, todo) if todo else []
    for number, mutant in enumerate(todo):
        begin = time.monotonic()
        catcher = who_catches(number, programs)
        reason = SURVIVORS.get((mutant.file, mutant.statement), "")
        result = "caught" if catcher else "explained" if reason else "SURVIVED"
        row = [result, mutant.place, mutant.statement, catcher or reason or "nobody", commit]
        rows[mutant.place] = row
        write_table(arguments.table, rows)  # at once: a run may be cut off
        seconds = time.monotonic() - begin
        print(f"{number + 1}/{len(todo)} {seconds:4.0f} s  {'  '.join(row[:-1])}", flush=True)
    write_table(arguments.table, rows)
    survivors = [place for place, row in rows.items() if row[0] == "SURVIVED"]
    print(f"{len(rows)} mutants, {len(survivors)} unexplained survivors", *survivors)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
