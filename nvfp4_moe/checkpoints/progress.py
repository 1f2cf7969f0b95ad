"""Progress of long reading or writing: a callback, and the bar of the command line."""

# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what was done last)."""

_WIDTH = 30


def silent(done: int, total: int, what: str) -> None:
    """The callback that shows nothing."""


class Bar:
    """A bar on a terminal; nothing where the stream is none."""

    def __init__(self, stream: TextIO = sys.stderr):
        self._stream = stream

    def __call__(self, done: int, total: int, what: str) -> None:
        if not self._stream.isatty():
            return
        full = _WIDTH * done // max(total, 1)
        bar = "#" * full + "." * (_WIDTH - full)
        end = "\n" if done >= total else ""
        self._stream.write(f"\r\x1b[K[{bar}] {done}/{total} {what}{end}")
        self._stream.flush()
