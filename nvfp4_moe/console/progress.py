"""The progress of a command: one line on stderr with the steps done and the time that is left.

A function that takes long opens a `bar` and counts its steps with `step`, or iterates by `track`.
Nothing is shown unless a command has called `shown_on` with a terminal, so that a library call stays
silent. A child process counts into a file (`count_into`), which its parent reads.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TextIO, TypeVar

T = TypeVar("T")
DELAY_SECONDS = 1.0
"""The age in seconds at which a bar appears, so that short work shows none."""
_EVERY_SECONDS = 0.2


class _Bar(Protocol):
    def advance(self, steps: int) -> None: ...

    def update(self, done: int, total: int) -> None: ...


class _Nothing:
    def advance(self, steps: int) -> None:
        pass

    def update(self, done: int, total: int) -> None:
        pass


class _File(_Nothing):
    def __init__(self, path: Path):
        self._path = path

    def advance(self, steps: int) -> None:
        with open(self._path, "ab") as file:
            file.write(b"." * steps)


_stream: TextIO | None = None
_bar: _Bar | None = None


@contextmanager
def shown_on(stream: TextIO) -> Iterator[None]:
    """Within, bars are shown on the stream if it is a terminal."""
    global _stream
    before, _stream = _stream, stream if stream.isatty() else None
    try:
        yield
    finally:
        _stream = before


@contextmanager
def bar(what: str, total: int | None = None, threads: bool = True) -> Iterator[None]:
    """Within, `step` counts towards a total. A bar inside another is not shown.

    Args:
        what: the text beside the bar.
        total: the number of steps; None: unknown.
        threads: False for a process that forks: the bar is plain text, and changes at steps alone.
    """
    global _bar
    before = _bar
    if _stream is None or before is not None:
        _bar = _Nothing()
        try:
            yield
        finally:
            _bar = before
        return
    shown = _on_terminal(what, total, _stream) if threads else _PlainBar(what, total, _stream, 0.0)
    _bar = shown
    timer = threading.Timer(DELAY_SECONDS, shown.show)
    timer.daemon = True
    if threads:
        timer.start()
    try:
        yield
    finally:
        _bar = before
        timer.cancel()
        if threads:
            timer.join()  # else it could show the bar after its end
        shown.close()


def step(steps: int = 1) -> None:
    """Count steps of the bar that is open."""
    if _bar is not None:
        _bar.advance(steps)


def update(done: int, total: int, what: str) -> None:
    """Set the steps of the bar that is open: the callback of `checkpoints.progress`."""
    if _bar is not None:
        _bar.update(done, total)


def track(items: Collection[T], what: str) -> Iterator[T]:
    """Iterate, a step for each item."""
    with bar(what, len(items)):
        for item in items:
            yield item
            step()


def count_into(path: Path) -> None:
    """Let `step` of this process add a byte to a file for each step."""
    global _bar
    _bar = _File(path)


def note(line: str) -> None:
    """Print a line on standard output, above the bar if one is shown."""
    if isinstance(_bar, _PlainBar | _RichBar):
        _bar.note(line)
    else:
        print(line, flush=True)


def _on_terminal(what: str, total: int | None, stream: TextIO) -> "_RichBar | _PlainBar":
    try:
        return _RichBar(what, total, stream)
    except ImportError:
        return _PlainBar(what, total, stream)


class _RichBar:
    """A line of rich: what, a bar, steps, and the time that is left."""

    def __init__(self, what: str, total: int | None, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
        from rich.table import Column

        whole = Column(no_wrap=True)
        steps = [
            MofNCompleteColumn(table_column=whole),
            Remaining(compact=True, table_column=whole),
            TextColumn("left", table_column=whole),
        ]
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1)),
            BarColumn(None, table_column=Column(no_wrap=True, ratio=1)),
            *([] if total is None else steps),
            console=Console(file=stream, highlight=False),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            expand=True,
        )
        self._task = self._progress.add_task(what, total=total)

    def show(self) -> None:
        self._progress.start()

    def advance(self, steps: int) -> None:
        self._progress.advance(self._task, steps)

    def update(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def note(self, line: str) -> None:
        if self._progress.live.is_started:
            self._progress.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self._progress.stop()


class _PlainBar:
    """A line of text, which overwrites itself."""

    def __init__(
        self, what: str, total: int | None, stream: TextIO, written: float = math.inf
    ):  # inf: it waits for `show`
        self._what, self._total, self._stream = what, total, stream
        self._done = 0
        self._begun = time.monotonic()
        self._written = written

    def show(self) -> None:
        self._written = 0.0
        self._write()

    def advance(self, steps: int) -> None:
        self._done += steps
        self._write()

    def update(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._write()

    def note(self, line: str) -> None:
        self.close()
        print(line, flush=True)

    def close(self) -> None:
        if math.isfinite(self._written):
            self._put("")

    def _write(self) -> None:
        now = time.monotonic()
        if now - self._written < _EVERY_SECONDS:
            return
        self._written = now
        text = f"{self._what}: {self._done}"
        if self._total:
            left = (now - self._begun) * (self._total - self._done) / max(self._done, 1)
            text += f"/{self._total}, {max(0.0, left):.0f} s left"
        self._put(text[: shutil.get_terminal_size().columns - 1])

    def _put(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
