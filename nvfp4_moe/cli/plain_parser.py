"""Splits the command line by the standard library, where typer is not installed."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ..exits import CommandError, Exit
from .declaration import PROGRAM, Command, Option, status_lines


class _Layout(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **keywords: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Layout, **keywords)

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


class _Version(argparse.Action):
    """`--version`, whose text is looked up when it is asked for."""

    def __init__(self, find: Callable[[], str], **keywords: Any):
        super().__init__(nargs=0, help="print the version", **keywords)
        self._find = find

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(self._find())
        parser.exit()


def split(
    words: Sequence[str],
    commands: Mapping[str, Command],
    about: str,
    version: Callable[[], str],
) -> tuple[str, dict[str, Any]] | int:
    """Split the words into a command's name and the texts of its options.

    Args:
        words: the arguments of the process.
        commands: by name.
        about: the first line of `--help`.
        version: gives what `--version` prints.

    Returns:
        The name and the texts by `Option.dest`; or the exit status after `--help` or `--version`.

    Raises:
        CommandError: an unknown command or option, or one that lacks its value.
    """
    statuses = "exit status:\n" + "\n".join(f"  {line}" for line in status_lines())
    parser = _Parser(prog=PROGRAM, description=_wrapped(about), epilog=statuses)
    parser.add_argument("--version", action=_Version, find=version)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands.values():
        examples = "".join(f"  {PROGRAM} {e}\n      {what}\n" for e, what in command.examples)
        one = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=_wrapped(command.description),
            epilog=f"examples:\n{examples}\n{statuses}",
        )
        for option in command.all_options:
            one.add_argument(option.name, **_keywords(option))
    try:
        found = vars(parser.parse_args(words))
    except SystemExit as end:  # after --help or --version
        return int(end.code or Exit.DONE)
    return found.pop("command"), found


def _wrapped(text: str) -> str:
    return textwrap.fill(text, max(20, shutil.get_terminal_size().columns - 2))


def _keywords(option: Option) -> dict[str, Any]:
    text = option.explained().replace("%", "%%")
    if option.kind is bool:
        return {"action": "store_true", "help": text}
    default = f" (default: {option.shown_default})" if option.shown_default else ""
    keywords: dict[str, Any] = {"help": text + default, "metavar": option.shown}
    if not option.positional:
        keywords["required"] = option.required
    if option.repeated:
        keywords["action"] = "append"
    return keywords
