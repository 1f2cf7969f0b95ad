"""The command line: `nvfp4-moe diff`, `blackwell`, `replay`, `doctor`, `mutants`, `convert`."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    from . import __version__, blackwell, diff, doctor, replay
    from .checkpoints import command as convert
    from .mutants import command as mutants

    parser = argparse.ArgumentParser(prog="nvfp4-moe", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {
        "diff": diff,
        "blackwell": blackwell,
        "replay": replay,
        "doctor": doctor,
        "mutants": mutants,
        "convert": convert,
    }
    for name, module in modules.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").split(": ", 1)[1])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
