"""The exit statuses of every command, in one table, and the error that ends a command with one."""

# SPDX-License-Identifier: Apache-2.0
import enum


class Exit(enum.IntEnum):
    """The exit statuses of a command."""

    DONE = 0
    DIFFERENCE = 1
    USAGE = 2
    NOT_RUN = 3
    BROKEN = 4
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]


_MEANINGS = {
    Exit.DONE: "everything asked for was done, and whatever was compared is right",
    Exit.DIFFERENCE: "a difference was found",
    Exit.USAGE: "bad usage: an argument or a file that cannot be used",
    Exit.NOT_RUN: "nothing was compared, or something asked for was not run",
    Exit.BROKEN: "the command crashed, or could not write",
    Exit.INTERRUPTED: "it was interrupted",
}


class CommandError(Exception):
    """Ends a command; the message is the one line that is printed.

    Args:
        message: names the argument or file, what was found there, and what is allowed.
    """

    def __init__(self, message: str, status: Exit = Exit.USAGE):
        super().__init__(message)
        self.status = status
