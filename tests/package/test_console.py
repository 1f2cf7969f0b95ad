"""Tables and progress: plain text in a pipe, one line of the terminal's width on a terminal."""

# SPDX-License-Identifier: Apache-2.0
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from paths import ROOT

from nvfp4_moe.console import progress
from nvfp4_moe.console.table import print_table
from nvfp4_moe.differential import workers

LIBRARIES = ["rich", "plain"]


def on_terminal(code: str, columns: int, library: str, **variables: str) -> str:
    """Everything that a program writes to a terminal of so many columns."""
    if library == "rich":
        pytest.importorskip("rich")
    else:
        code = f"import sys; sys.modules['rich'] = None\n{code}"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm-256color"} | variables,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # its other end is closed
            break
        if not read:
            break
        written += read
    os.close(ours)
    assert child.wait(100) == 0, written
    return written.decode()


def lines(written: str) -> list[str]:
    """The texts between movements of the cursor to the left, without control sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written))


BAR = """
import sys, time
from nvfp4_moe.console import progress
progress.DELAY_SECONDS = 0.1
with progress.shown_on(sys.stderr):
    for i in progress.track(range(8), "the fused mixture of experts in an interpreter"):
        time.sleep(0.1)
        if i == 4:
            progress.note("a line")
"""


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("columns", [30, 60, 80, 140])
def test_a_bar_is_one_line_at_any_width(columns, library):
    written = on_terminal(BAR, columns, library)
    # The cursor goes up where the bar is erased, and at every repaint if a line was wrapped.
    assert written.count("\x1b[1A") <= 2
    shown = [line for line in lines(written) if line.startswith("t")]
    assert shown and max(map(len, shown)) <= columns
    assert "a line" in [line.strip() for line in lines(written)]
    if columns >= 80:
        assert any(re.search(r"[1-7]/8.* left", line) for line in shown)
    assert not re.search(r"\S", lines(written)[-1])  # the bar is gone


@pytest.mark.parametrize("library", LIBRARIES)
def test_short_work_shows_no_bar(library):
    written = on_terminal(BAR.replace("DELAY_SECONDS = 0.1", "DELAY_SECONDS = 50"), 80, library)
    assert written.split() == ["a", "line"] and "\x1b" not in written


def test_nothing_is_shown_in_a_pipe_or_by_the_library(capsys):
    with progress.shown_on(sys.stderr):
        assert list(progress.track([1, 2], "x")) == [1, 2]
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with progress.bar("x", 3):
        progress.step()
        progress.update(1, 2, "x")
    assert capsys.readouterr() == ("", "") and terminal.getvalue() == ""


class Counted:
    def __init__(self):
        self.steps, self.shown = 0, False

    def show(self):
        self.shown = True

    def advance(self, steps):
        self.steps += steps

    def close(self):
        self.shown = False


@pytest.fixture
def counted(monkeypatch):
    """A bar that counts, in the place of one on a terminal."""
    found = Counted()
    monkeypatch.setattr(progress, "_on_terminal", lambda what, total, stream: found)
    monkeypatch.setattr(progress, "_stream", sys.stderr)
    return found


def test_a_bar_inside_another_is_not_counted(counted):
    for _ in progress.track(range(3), "outer"):
        for _ in progress.track(range(5), "inner"):
            pass
    assert counted.steps == 3 and progress._bar is None


def test_children_count_their_jobs(counted, monkeypatch):
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.01)
    with progress.bar("x", 4):
        assert workers.call(len, [("ab",), ("c",), ("",), ("def",)]) == [2, 1, 0, 3]
    assert counted.steps == 4


TABLE = """
import sys
from nvfp4_moe.console.table import print_table
rows = [["a long name of a case, per-token", "identical (144)"], ["b", "3/144 differ"]]
print_table(["case", "reference / triton"], rows, sys.stdout, lambda cell: "red" if "/" in cell else "")
"""


@pytest.mark.parametrize("columns", [30, 60, 140])
def test_a_table_fits_a_terminal(columns):
    written = on_terminal(TABLE, columns, "rich")
    assert max(map(len, lines(written))) <= columns
    assert "\x1b[31m" in written and "\x1b[31m" not in on_terminal(
        TABLE, columns, "rich", NO_COLOR="1"
    )


def test_a_table_in_a_pipe_has_a_line_for_each_row():
    stream = io.StringIO()
    print_table(["case", "outcome"], [["a long name", "same"], ["b", ""]], stream, lambda _: "red")
    assert stream.getvalue() == "case         outcome\na long name  same\nb\n"
    stream = io.StringIO()
    print_table(["", ""], [], stream)
    assert stream.getvalue() == ""
