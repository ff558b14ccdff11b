#!/usr/bin/env python3
"""Removes every barrier, wait and fence from the CUDA kernels, one by one, and lists survivors.

A mutant survives when the emulated kernel tests still pass without the synchronisation: then either
it is superfluous, or the tests do not reach the case that needs it. Known survivors are listed,
each with the reason, in SURVIVORS; anything else is a failure (exit status 1).

    python tests/emulator/mutate.py --compiler clang++-19 [--only block_gradient]

Works on a copy of the sources; nothing in the repository is changed.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A statement of its own that synchronises, possibly under an `if` of the same line.
SYNCHRONISATION = re.compile(
    r"(__syncthreads\(\)|__syncwarp\([^)]*\)"
    r"|ptx::(?:cp_async_wait|wgmma_wait|bulk_wait|bulk_wait_read)<[^>]*>\(\)"
    r"|ptx::(?:cp_async_commit|wgmma_fence|wgmma_commit|bulk_commit|fence_\w+)\(\)"
    r"|ptx::(?:bar_sync|bar_arrive|mbarrier_wait|mbarrier_arrive\w*)\([^;]*\)"
    r"|ptx::(?:cluster_arrive|cluster_wait)\(\)"
    r"|(?:leave_stage|finish_loads|wait_until_empty)\([^;]*\)"  # sm90/pipeline.cuh
    r"|boxes\.finish\(\));"  # sm90/tile_store.cuh
)

# (file name, text of the line): why the tests cannot notice its absence.
SURVIVORS: dict[tuple[str, str], str] = {}


def mutants(source: pathlib.Path) -> list[tuple[int, str]]:
    """Line numbers and the mutated text of `source` for each synchronisation in it."""
    lines = source.read_text().split("\n")
    found = []
    for number, line in enumerate(lines):
        if line.lstrip().startswith("//") or not SYNCHRONISATION.search(line):
            continue
        changed = lines.copy()
        changed[number] = SYNCHRONISATION.sub(";", line)
        found.append((number, "\n".join(changed)))
    return found


def kernel_sources(tree: pathlib.Path) -> list[pathlib.Path]:
    """Files with kernels: not the primitives themselves."""
    files = [*(tree / "csrc/cuda").rglob("*.cu"), *(tree / "csrc/cuda").rglob("*.cuh")]
    return sorted(f for f in files if f.parent.name != "ptx" and f.name != "device.cuh")


def run(command: list[str], timeout: int) -> bool:
    """True when `command` succeeds in time."""
    try:
        result = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--compiler", default="clang++")
    parser.add_argument("--only", default="", help="part of the path of the files to mutate")
    parser.add_argument("--tests", default="kernels", help="regular expression for ctest")
    parser.add_argument("--cmake", action="append", default=[], help="an argument for CMake")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        for part in ("csrc", "tests/emulator"):
            shutil.copytree(ROOT / part, tree / part)
        build = tree / "build"
        configure = ["cmake", "-S", str(tree / "tests/emulator"), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DCMAKE_CXX_COMPILER={arguments.compiler}", *arguments.cmake]
        compile_all = ["cmake", "--build", str(build)]
        test = ["ctest", "--test-dir", str(build), "-R", arguments.tests, "--stop-on-failure"]
        for step in (configure, compile_all, test):
            if not run(step, 1200):
                print("the unchanged sources fail:", " ".join(step))
                return 2

        survivors = tried = 0
        for source in kernel_sources(tree):
            name = str(source.relative_to(tree))
            if arguments.only not in name:
                continue
            original = source.read_text()
            for number, text in mutants(source):
                tried += 1
                line = original.split("\n")[number].strip()
                source.write_text(text)
                # What does not compile is noticed, too.
                survived = run(compile_all, 600) and run(test, 300)
                source.write_text(original)
                reason = SURVIVORS.get((source.name, line))
                verdict = "survived" if survived else "caught"
                if survived and reason is None:
                    survivors += 1
                note = f"  ({reason})" if reason else ""
                print(f"{verdict:8} {name}:{number + 1}: {line}{note}")
                sys.stdout.flush()
        print(f"{tried} mutants, {survivors} unexplained survivors")
        return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
