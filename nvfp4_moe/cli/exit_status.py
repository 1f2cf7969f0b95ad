"""Ends a command that fails or is interrupted: one line on stderr, and an exit status."""

# SPDX-License-Identifier: Apache-2.0
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from .. import interrupts
from ..exits import CommandError, Exit
from ..kernels import environment

_NEEDED = {"numpy": "NumPy", "safetensors": "safetensors", "torch": "PyTorch", "triton": "Triton"}
"""The packages that the library imports, and their names in prose."""


def guarded(name: str, load: Callable[[], Callable[[], int]], left: Callable[[], str]) -> int:
    """Run a command and turn whatever ends it into an exit status and a line on stderr.

    Args:
        name: what the line begins with.
        load: imports the command and returns it. An interrupt during the import ends the process of the
            command line at once (`interrupts.py`).
        left: called after an interrupt, for what is left and how to go on.
    """
    _print_any_character()
    try:
        command = load()
        interrupts.as_usual()
        with _terminated_as_interrupted():
            status = command()
            sys.stdout.flush()
            return int(status)
    except CommandError as error:
        return _told(name, str(error), error.status)
    except KeyboardInterrupt:
        return _told(name, f"interrupted; {left()}", Exit.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough
        return _told(name, "its output was closed before its end", Exit.BROKEN)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _NEEDED:
            return _crashed(name, error)
        mend = f"`{sys.executable} -m pip install {package}` installs it"
        said = f"it needs {_NEEDED[package]}, which is not installed; {mend}"
        return _told(name, said, Exit.NOT_RUN)
    except Exception as error:
        return _crashed(name, error)


def _print_any_character() -> None:
    """A name that the terminal's encoding lacks, as in the C locale, is printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, so that no process is left behind."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _crashed(name: str, error: Exception) -> int:
    whole = traceback.format_exc()
    first = (str(error).strip().splitlines() or ["no message"])[0]
    where = f"{environment.TRACEBACK_VARIABLE}=1 shows where"
    if environment.traceback_wanted():
        print(whole, end="", file=sys.stderr)
        where = "the traceback is above"
    else:
        with suppress(OSError):
            number, path = tempfile.mkstemp(".txt", "nvfp4-moe-traceback-")
            with open(number, "w", encoding="utf-8", errors="replace") as file:
                file.write(whole)
            where = f"the traceback is in {path}"
    return _told(name, f"crashed: {type(error).__name__}: {first} ({where})", Exit.BROKEN)


def _told(name: str, message: str, status: Exit) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # else the interpreter tries again at its end, and says so at length
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"{name}: {message}", file=sys.stderr)
    return int(status)
