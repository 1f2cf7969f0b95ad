"""The result of a command: its exit status, and the document of `--json`."""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import files
from ..console import progress
from ..exits import Exit
from .declaration import STDOUT


@dataclass(frozen=True)
class Result:
    """The end of a command."""

    status: Exit
    document: dict[str, Any]  # for `--json`


def run(command: Callable[[SimpleNamespace], Result], options: SimpleNamespace) -> int:
    """Run a command, with progress on stderr, and write its document where `--json` says.

    With the document on standard output, all that the command prints goes to stderr.

    Raises:
        CommandError: the file cannot be written; the command was not begun.
    """
    if options.json not in (None, STDOUT):
        files.check_file("--json", options.json)
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress.shown_on(sys.stderr))
        if options.json == STDOUT:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        result = command(options)
    if options.json is None:
        return result.status
    text = json.dumps(result.document, indent=1) + "\n"
    if options.json == STDOUT:
        sys.stdout.write(text)
    else:
        Path(options.json).write_text(text, "utf-8")
    return result.status
