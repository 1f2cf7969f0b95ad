"""The command that this process runs, as a line that does it again when it is pasted."""

# SPDX-License-Identifier: Apache-2.0
import os
import shlex
import shutil
import sys
from pathlib import Path

SCRIPT = "nvfp4-moe"
_given: list[str] | None = None


def remember(arguments: list[str]) -> None:
    """Keep the arguments that the command line was called with."""
    global _given
    _given = list(arguments)


def command() -> list[str]:
    """Return program and arguments; those of the process if no command of ours runs."""
    if _given is None:
        return [sys.executable, *sys.argv]
    return [*program(), *_given]


def name() -> str:
    """Return the command without its options."""
    words = [word for word in _given or [] if not word.startswith("-")]
    return " ".join([SCRIPT, *words[:1]])


def named() -> str:
    """Return the command for other people, who have other paths to the program."""
    return shlex.join([SCRIPT, *(sys.argv[1:] if _given is None else _given)])


def program() -> list[str]:
    """Return the words that start the command line: the script, or this interpreter's module."""
    script = Path(sys.argv[0])
    if script.name != SCRIPT:
        return [sys.executable, "-m", __name__.partition(".")[0]]
    installed = shutil.which(SCRIPT)
    same = installed is not None and Path(installed).resolve() == script.resolve()
    return [SCRIPT if same else str(script.absolute())]


def folder() -> str:
    """Return the working folder, from which relative paths and a checkout are found."""
    return os.getcwd()


def pasted(words: list[str], where: str | None) -> str:
    """Return a line for a shell in any folder."""
    change = "" if where is None else f"cd {shlex.quote(where)} && "
    return change + shlex.join(words)
