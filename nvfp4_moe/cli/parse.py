"""Parses the arguments of the process: by typer, or plainly where typer is not installed."""

# SPDX-License-Identifier: Apache-2.0
import shutil
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from ..exits import CommandError
from .declaration import json_made_whole, settle
from .options import COMMANDS

ABOUT = (
    "NVFP4 mixture-of-experts: compare backends to the bit, convert checkpoints, examine and measure "
    "a machine."
)


NARROW = 72
"""In fewer columns, typer's tables cut words of the help: the plain parser's help has no tables."""


def _needs_narrow_help(words: Sequence[str]) -> bool:
    asked = not {"--help", "-h"}.isdisjoint(words)
    return asked and shutil.get_terminal_size().columns < NARROW


def parse(words: Sequence[str], version: Callable[[], str]) -> SimpleNamespace | int:
    """Return the options of the command that the words call, or an exit status if help was printed.

    Raises:
        CommandError: an unknown command or option, a missing one, or a bad value.
    """
    try:
        if _needs_narrow_help(words):
            from .plain_parser import split
        else:
            from .typer_parser import split
    except ImportError:
        from .plain_parser import split
    # A parser takes time for each command that it is made of.
    commands = {words[0]: COMMANDS[words[0]]} if words and words[0] in COMMANDS else COMMANDS
    try:
        found = split(json_made_whole(words), commands, ABOUT, version)
    except CommandError as error:
        raise CommandError(f"{str(error).rstrip('.')}; --help shows what is allowed") from None
    return found if isinstance(found, int) else settle(COMMANDS[found[0]], found[1])
