"""One updating status line on stderr; an occasional plain line where that is not a terminal."""

import sys
import time
from typing import TextIO


class Progress:
    """Shows what is going on without getting into stdout, where the results go.

    On a terminal the line is rewritten in place. Elsewhere (a log file, CI) a new line is written,
    and at most every `quiet_seconds`, so that a log stays short.
    """

    def __init__(self, stream: TextIO | None = None, quiet_seconds: float = 10.0):
        self._stream = sys.stderr if stream is None else stream
        self._rewrites = self._stream.isatty()
        self._quiet_seconds = quiet_seconds
        self._start = time.monotonic()
        self._last_line = float("-inf")

    @property
    def elapsed(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._start

    def update(self, text: str) -> None:
        """Replace the status line by `text`, preceded by the seconds elapsed."""
        line = f"[{self.elapsed:4.0f} s] {text}"
        if self._rewrites:
            self._stream.write("\r\x1b[K" + line[:110])
            self._stream.flush()
        elif self.elapsed - self._last_line >= self._quiet_seconds:
            self._last_line = self.elapsed
            print(line, file=self._stream, flush=True)

    def clear(self) -> None:
        """Take the line away, so that what is printed next starts on an empty one."""
        if self._rewrites:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
