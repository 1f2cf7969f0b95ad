"""Splits the command line by typer: its help, and the completion of its words in a shell."""

# SPDX-License-Identifier: Apache-2.0
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..exits import CommandError
from .declaration import PROGRAM, Command, Option, status_lines

_SETTINGS = {"help_option_names": ["-h", "--help"]}


def split(
    words: Sequence[str],
    commands: Mapping[str, Command],
    about: str,
    version: Callable[[], str],
) -> tuple[str, dict[str, Any]] | int:
    """Split the words, as `plain_parser.split` does."""
    app = typer.Typer(
        help=escape(about),
        epilog=_statuses(),
        rich_markup_mode="rich",
        context_settings=_SETTINGS,
        pretty_exceptions_enable=False,
    )
    app.callback()(_global_options(version))
    for command in commands.values():
        app.command(
            command.name,
            help=escape(command.description),
            short_help=escape(command.summary),
            epilog=f"{_examples(command)}\n{_statuses()}",
            context_settings=_SETTINGS,
        )(_returning(command))
    try:
        found = typer.main.get_command(app).main(
            list(words), prog_name=PROGRAM, standalone_mode=False
        )
    except Exception as error:
        # The class of usage errors is in click, or in a copy of it inside typer, by typer's version.
        if not hasattr(error, "format_message"):
            raise
        raise CommandError(error.format_message()) from None
    return found if isinstance(found, tuple) else int(found or 0)


def _global_options(version: Callable[[], str]) -> Callable[..., None]:
    def show(asked: bool) -> None:
        if asked:
            typer.echo(version())
            raise typer.Exit

    option = typer.Option("--version", callback=show, is_eager=True, help="print the version")

    def take(version: bool = False) -> None:
        pass

    take.__annotations__["version"] = Annotated[bool, option]
    return take


def _returning(command: Command) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Make the function whose signature is the command's options, and which returns what is found."""

    def found(**values: Any) -> tuple[str, dict[str, Any]]:
        return command.name, values

    parameters = [_parameter(option) for option in command.all_options]
    found.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    found.__annotations__ = {p.name: p.annotation for p in parameters}
    return found


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = bool if option.kind is bool else list[str] if option.repeated else str
    keywords: dict[str, Any] = {"help": escape(option.explained())}
    keywords["metavar"] = "" if option.kind is bool else option.shown
    if option.kind is not bool:
        keywords["show_default"] = option.shown_default is not None
    if option.choices:
        keywords["autocompletion"] = lambda incomplete: [
            choice for choice in option.choices if choice.startswith(incomplete)
        ]
    info = (
        typer.Argument(**keywords) if option.positional else typer.Option(option.name, **keywords)
    )
    default: Any = False if option.kind is bool else None
    if option.shown_default is not None:
        default = option.shown_default
    if option.required or option.positional:
        default = inspect.Parameter.empty
    elif kind is str or option.repeated:
        kind = kind | None
    return inspect.Parameter(
        option.dest,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, info],
    )


def _examples(command: Command) -> str:
    lines = [
        f"  [cyan]{escape(f'{PROGRAM} {words}')}[/cyan]\n      {escape(what)}\n"
        for words, what in command.examples
    ]
    return "[bold]Examples[/bold]\n" + "".join(lines)


def _statuses() -> str:
    return "[bold]Exit status[/bold]\n" + "\n".join(map(escape, status_lines()))
