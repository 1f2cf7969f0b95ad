"""The command line of `nvfp4-moe`: `diff`, `blackwell`, `replay`, `doctor`, `convert` and others."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

from .cli.exit_status import guarded
from .cli.options import COMMANDS
from .cli.parse import parse
from .exits import Exit
from .report import invocation


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status from `exits.Exit`."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = next((word for word in given if word in COMMANDS), None)
    program = f"{invocation.SCRIPT} {name}" if name else invocation.SCRIPT
    left: Callable[[], str] = _not_begun

    def load() -> Callable[[], int]:
        nonlocal left
        invocation.remember(given)
        chosen = parse(given or ["--help"], _version)
        if isinstance(chosen, int):
            return partial(int, chosen if given else Exit.USAGE)
        module = importlib.import_module(COMMANDS[chosen.command].module, __package__)
        from .cli import output  # imports safetensors

        left = partial(getattr(module, "left", _nothing_written), chosen)
        return partial(output.run, module.run, chosen)

    return guarded(program, load, lambda: left())


def _version() -> str:
    from . import __version__  # reads the metadata of the installation, which takes time

    return __version__


def _not_begun() -> str:
    return "nothing was begun"


def _nothing_written(chosen: SimpleNamespace) -> str:
    return "it wrote nothing, and the same command starts over"


if __name__ == "__main__":
    sys.exit(main())
