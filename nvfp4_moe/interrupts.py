"""An interrupt while the command line is still being imported: a line and a status, as later."""

# SPDX-License-Identifier: Apache-2.0
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from .exits import Exit


def _leave(number: int, frame: object) -> NoReturn:
    # Not by an exception: packages that are half imported make other errors of it.
    os.write(2, b"nvfp4-moe: interrupted; nothing was begun\n")
    os._exit(Exit.INTERRUPTED)


def is_command_line(words: list[str]) -> bool:
    """Return True if these words, from `sys.orig_argv`, start our command line, not another program."""
    by_module = words[1:] and "-m" in words[:-1] and words[words.index("-m") + 1] == __package__
    return bool(by_module) or any(Path(word).name == "nvfp4-moe" for word in words[:2])


def leave_on_interrupt() -> None:
    """Do so until `as_usual`, where this process is the command line."""
    in_main = threading.current_thread() is threading.main_thread()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if in_main and usual and is_command_line(sys.orig_argv):
        signal.signal(signal.SIGINT, _leave)


def as_usual() -> None:
    """An interrupt raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
