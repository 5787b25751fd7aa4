"""How far a long step is, and how long it still takes."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """A line on the terminal that is rewritten as sequences finish: how many, how long each, and how long is left.

    On a stream that is no terminal every sequence is a line of its own.
    """

    def __init__(self, total: int, what: str = "sequences", stream: TextIO | None = None) -> None:
        self._total = total
        self._what = what
        self._stream = sys.stderr if stream is None else stream
        self._done = self._skipped = 0
        self._start = time.monotonic()

    def step(self, is_skipped: bool = False) -> None:
        """One more sequence is there; `is_skipped` if it took no time."""
        self._done += 1
        self._skipped += is_skipped
        worked = self._done - self._skipped
        line = f"{self._what} {self._done}/{self._total}"
        if worked:
            each_s = (time.monotonic() - self._start) / worked
            line += f", {each_s:.1f} s each, {_duration(each_s * (self._total - self._done))} left"
        if self._stream.isatty():
            end = "\n" if self._done == self._total else ""
            self._stream.write(f"\r\x1b[K{line}{end}")
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
