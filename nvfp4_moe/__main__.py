"""The command line of `nvfp4-moe`: `diff`, `blackwell`, `replay`, `doctor`, `convert` and others."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial

from . import __version__, exits
from .cli import options
from .cli.exit_status import guarded
from .report import invocation

COMMANDS = {
    "diff": (".cli.diff", "compare the same tensors through every backend here, to the bit"),
    "blackwell": (".cli.blackwell", "run the whole matrix through every backend, tactic and math"),
    "replay": (".cli.replay", "run a failing case from a file again"),
    "doctor": (".cli.doctor", "say what is here, and which backend would serve"),
    "fuzz-bounds": (".cli.fuzz_bounds", "judge random runs that keep the contract"),
    "convert": (".cli.convert", "quantize the experts of a Hugging Face checkpoint"),
    "solutions": (".cli.solutions", "write our layer for FlashInfer's own substitution hook"),
}
"""The module of each command, which is imported only to run it, and its line in `--help`."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status from `exits.Exit`."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = next((word for word in given if word in COMMANDS), None)
    left: Callable[[], str] = _not_begun

    def load() -> Callable[[], int]:
        nonlocal left
        invocation.remember(given)
        chosen = _parser().parse_args(given)
        module = importlib.import_module(COMMANDS[chosen.command][0], __package__)
        left = partial(getattr(module, "left", _nothing_written), chosen)
        return partial(module.run, chosen)

    return guarded(f"nvfp4-moe {name}" if name else "nvfp4-moe", load, lambda: left())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvfp4-moe", description=__doc__, epilog=exits.table())
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in COMMANDS.items():
        options.ADD[name](commands.add_parser(name, help=what, epilog=exits.table()))
    return parser


def _not_begun() -> str:
    return "nothing was begun"


def _nothing_written(chosen: argparse.Namespace) -> str:
    return "it wrote nothing, and the same command starts over"


if __name__ == "__main__":
    sys.exit(main())
