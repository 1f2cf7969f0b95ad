"""The description of a subcommand and its options, and the check of the values that a parser found.

A parser only splits the words: `typer_parser.py`, or `plain_parser.py` where typer is not installed.
Both are made from these descriptions and return texts. `settle` turns them into values, so that a bad
value has the same message from both.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ..exits import CommandError, Exit

PROGRAM = "nvfp4-moe"
STDOUT = "-"
"""The FILE of `--json` that is standard output."""


@dataclass(frozen=True)
class Option:
    """One option, or one argument: a name without dashes."""

    name: str
    help: str
    kind: Callable[[str], Any] = str  # str, int or float; bool: a flag, which takes no value
    default: Any = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    earlier: Mapping[str, str] = field(default_factory=dict)  # choices that have another name now
    repeated: bool = False  # the value is a list, empty by default
    required: bool = False

    @property
    def positional(self) -> bool:
        return not self.name.startswith("--")

    @property
    def dest(self) -> str:
        """The attribute of the parsed options."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def shown(self) -> str:
        """The placeholder of the value in `--help`."""
        if self.metavar is None and self.positional:
            return self.name.upper()
        return self.metavar or {int: "N", float: "NUMBER"}.get(self.kind, "TEXT")  # type: ignore[call-overload,no-any-return]

    @property
    def title(self) -> str:
        """The name in messages."""
        return self.shown if self.positional else self.name

    @property
    def shown_default(self) -> str | None:
        """The default in `--help`; None if the option need not say it."""
        return None if self.default in (None, math.inf) else str(self.default)

    def explained(self) -> str:
        """The help with the choices."""
        return f"{self.help}: {', '.join(self.choices)}" if self.choices else self.help

    def value(self, text: str) -> Any:
        """Convert a text.

        Raises:
            CommandError: it is no number, or none of the choices.
        """
        if text in self.earlier:
            now = self.earlier[text]
            warning = f"warning: {self.name} {text} is now {self.name} {now}, and will be removed"
            print(warning, file=sys.stderr)
            text = now
        if self.choices and text not in self.choices:
            allowed = ", ".join(self.choices)
            raise CommandError(f"{self.title} is {text!r}; it must be among {allowed}")
        try:
            return self.kind(text)
        except ValueError:
            what = "an integer" if self.kind is int else "a number"
            raise CommandError(f"{self.title} is {text!r}; it must be {what}") from None


JSON = Option(
    "--json",
    "write the result as JSON to FILE; alone or with -, to standard output, and all else to stderr",
    metavar="[FILE]",
)
"""The option of every command."""


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    name: str
    module: str  # of its `run`, and of its `left` if it leaves something; imported only to run it
    summary: str  # its line in the list of commands
    description: str
    options: tuple[Option, ...]
    examples: tuple[tuple[str, str], ...]  # (words after the program's name, what they do)

    @property
    def all_options(self) -> tuple[Option, ...]:
        return (*self.options, JSON)


def json_made_whole(words: Sequence[str]) -> list[str]:
    """Return the words, with the FILE of a `--json` that has none."""
    whole: list[str] = []
    for i, word in enumerate(words):
        whole.append(word)
        following = words[i + 1] if i + 1 < len(words) else "--"
        if word == "--json" and following.startswith("-") and following != STDOUT:
            whole.append(STDOUT)
    return whole


def settle(command: Command, found: Mapping[str, Any]) -> SimpleNamespace:
    """Convert and check the texts that a parser found.

    Args:
        command: the subcommand.
        found: by `Option.dest`: a text, None, a bool for a flag, or a sequence of texts.

    Returns:
        A namespace with `command`, the name, and an attribute for each option.

    Raises:
        CommandError: a text that the option does not take.
    """
    values: dict[str, Any] = {"command": command.name}
    for option in command.all_options:
        given = found.get(option.dest)
        if option.kind is bool:
            values[option.dest] = bool(given)
        elif option.repeated:
            values[option.dest] = [option.value(text) for text in given or ()]
        elif given is None:
            values[option.dest] = option.default
        else:
            values[option.dest] = option.value(given)
    return SimpleNamespace(**values)


def status_lines() -> list[str]:
    """The exit statuses and their meanings, a line each, for `--help`."""
    return [f"{status.value:>3} {status.meaning}" for status in Exit]
