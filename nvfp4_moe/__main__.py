"""The command line: `nvfp4-moe diff`, `blackwell`, `replay`, `doctor`, `mutants`,
`fuzz-bounds`, `convert`."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib
import sys

from . import __version__, exits, invocation
from .cli.guard import guarded

COMMANDS = {
    "diff": (".cli.diff", "compare the same tensors through every backend here, to the bit"),
    "blackwell": (".cli.blackwell", "run the whole matrix through every backend, tactic and math"),
    "replay": (".failures.replay", "run a failing case from a file again"),
    "doctor": (".cli.doctor", "say what is here, and which backend would serve"),
    "mutants": (".mutants.command", "plant the catalogue of mistakes, and see what finds them"),
    "fuzz-bounds": (".cli.fuzz_bounds", "judge random runs that keep the contract"),
    "convert": (".cli.convert", "quantize the experts of a Hugging Face checkpoint"),
}
"""Their modules, imported only when they are asked for, and what `--help` says of them."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status, of `exits.Exit`."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    chosen = next((word for word in given if word in COMMANDS), None)
    options: argparse.Namespace | None = None

    def command() -> int:
        nonlocal options
        invocation.remember(given)
        options = _parser(chosen).parse_args(given)
        return options.run(options)

    def left() -> str:
        if options is None:
            return "nothing was begun"
        return options.left(options)

    return guarded(f"nvfp4-moe {chosen}" if chosen else "nvfp4-moe", command, left)


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of the chosen command."""
    parser = argparse.ArgumentParser(prog="nvfp4-moe", description=__doc__, epilog=exits.table())
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (path, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, epilog=exits.table())
        if name == chosen:
            module = importlib.import_module(path, __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run, left=getattr(module, "left", _nothing))
    return parser


def _nothing(options: argparse.Namespace) -> str:
    return "it wrote nothing, and the same command starts over"


if __name__ == "__main__":
    sys.exit(main())
