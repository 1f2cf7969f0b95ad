"""A table: aligned columns of text, and on a terminal colours and lines that fit its width."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import TextIO

Style = Callable[[str], str]
"""Returns the style of a cell by its text, as "green" or "bold red"; "" for none."""


def unstyled(cell: str) -> str:
    """Return no style for every cell."""
    return ""


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    stream: TextIO,
    style: Style = unstyled,
) -> None:
    """Print a table.

    Args:
        columns: their heads; all empty for a table without a head.
        rows: texts, as many in each as there are columns.
        stream: a terminal has lines of its width, where rich is installed; any other stream has a line
            for each row, however long.
        style: of a cell.
    """
    if stream.isatty():
        try:
            _print_rich(columns, rows, stream, style)
            return
        except ImportError:
            pass
    heads = [columns] if any(columns) else []
    widths = [max(map(len, texts)) for texts in zip(*heads, *rows, strict=True)]
    for row in [*heads, *rows]:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=stream)


def _print_rich(
    columns: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, style: Style
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style(cell)) for cell in row))
    Console(file=stream, highlight=False).print(table)
