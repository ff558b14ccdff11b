"""Calls a function in a fresh Python process.

No other way leads to a peak-memory figure that earlier calls have not touched. The parent starts
`python -m memeff.bench.isolated` and writes the call to its stdin as JSON; the result comes back as
the last line of the child's stdout. A plain subprocess rather than multiprocessing, because that
would import the parent's main script once more.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

_KEPT_LINES = 15


class IsolatedError(RuntimeError):
    """The child process failed; the message ends with what it wrote to stderr."""


class IsolatedTimeout(IsolatedError):
    """The child process had not ended in time, and was ended."""


def call_isolated(
    function: Callable[..., Any],
    /,
    *,
    on_line: Callable[[str], None] = lambda line: None,
    time_limit: float | None = None,
    **arguments: Any,
) -> Any:
    """`function(**arguments)` in a new process; `on_line` gets each line that it prints.

    `function` must be importable by name from its module; arguments and result must survive JSON.
    Raises IsolatedError when the child dies (also when the system killed it for memory), and
    IsolatedTimeout when it takes more than `time_limit` seconds: it and what it has started are
    then ended.
    """
    call = {
        "module": function.__module__,
        "name": function.__qualname__,
        "arguments": arguments,
        "path": sys.path,
    }
    command = [sys.executable, "-m", "memeff.bench.isolated"]
    last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
    # The result goes through a file: while this side reads stderr, a full stdout pipe would block
    # the child.
    with tempfile.TemporaryFile("w+") as stdout:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=time_limit is not None,
        ) as child:  # fmt: skip
            assert child.stdin is not None and child.stderr is not None
            with _ended_after(child, time_limit) as too_late:
                with child.stdin:
                    child.stdin.write(json.dumps(call))
                for line in child.stderr:
                    last_lines.append(line.rstrip())
                    on_line(line.rstrip())
                child.wait()
        name, tail = function.__qualname__, "\n".join(last_lines)
        if too_late.is_set():
            raise IsolatedTimeout(
                f"{name} had not ended after {time_limit:.0f} seconds in its process:\n{tail}"
            )
        if child.returncode != 0:
            raise IsolatedError(
                f"{name} ended with code {child.returncode} in its process:\n{tail}"
            )
        stdout.seek(0)
        return json.loads(stdout.readlines()[-1])


@contextlib.contextmanager
def _ended_after(
    child: subprocess.Popen[str], time_limit: float | None
) -> Iterator[threading.Event]:
    """Ends a child that leads a session, with all that it has started, after so many seconds or
    when what is inside fails; the event says whether it was too late."""
    too_late = threading.Event()
    if time_limit is None:
        yield too_late
        return

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def end_late() -> None:
        too_late.set()
        end()

    timer = threading.Timer(time_limit, end_late)
    timer.start()
    try:
        yield too_late
    finally:
        timer.cancel()
        if child.poll() is None:
            end()


def _main() -> None:
    call = json.loads(sys.stdin.read())
    sys.path[:] = call["path"]
    # Whatever the callee prints goes to stderr: stdout carries the result and nothing else.
    with contextlib.redirect_stdout(sys.stderr):
        function = getattr(importlib.import_module(call["module"]), call["name"])
        result = function(**call["arguments"])
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
