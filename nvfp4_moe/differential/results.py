"""The results of a comparison: cells with a verdict, in sections, and the failures that they keep."""

# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["identical", "inside", "different", "outside", "crashed", "withheld", "skipped"]
"""The verdicts of a cell, best first: the same bits; in the proved intervals; other bits; out of an
interval; the backend raised or its process ended; not judged, since it adds
otherwise than assumed; not run."""
FAILED: tuple[Status, ...] = ("different", "outside", "crashed")
UNJUDGED: tuple[Status, ...] = ("withheld", "skipped")
ORACLE = "reference"
"""The side that the others are compared with; alone it is compared with itself."""
PAIRED = " = "
"""Between the two sides in the name of a column."""
SHOWN = 3
"""Failures that a cell keeps."""


@dataclass
class Heat:
    """The map of differences, in tiles of the layout: counts by tile, and by place within a tile.

    Of block scales a tile is what the layout stores together (128x4: 32 x 16 bytes, 8x4: 8 x 4), of an
    output 1 token x 16 columns; `tiles[i][j]` counts the differences of tile row i and tile column j.
    """

    what: str  # "block scales, layout_128x4"
    tiles: list[list[int]]
    within: list[list[int]]


@dataclass
class Failure:
    """One comparison that failed."""

    case: str  # what was compared, in words
    summary: str  # what differs, counted
    details: list[str] = field(
        default_factory=list
    )  # the first difference, its arithmetic spelled out
    heat: Heat | None = None
    replay: str | None = None  # the file in the report's folder that `nvfp4-moe replay` runs
    again: str | None = None  # the line for a shell, on this machine, that runs it
    upstream: str | None = None  # the text of a bug report


@dataclass
class Cell:
    """The comparisons of one row and column of a section."""

    status: Status
    compared: int = 0
    failed: int = 0
    note: str = ""  # numbers, or why nothing was run or judged
    failures: list[Failure] = field(default_factory=list)  # the first few
    histogram: list[int] | None = None
    """The outputs in each tenth of their interval, where that holds more than one value."""


@dataclass
class Section:
    """A table: rows are cases, columns pairs of backends, or backends judged by the contract."""

    title: str
    columns: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    summary: bool = False  # of cells that other sections have: not counted again

    def put(self, row: str, column: str, cell: Cell) -> None:
        if column not in self.columns:
            self.columns.append(column)
        self.rows.setdefault(row, {})[column] = cell

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows.values() for cell in row.values()]

    def judged(self) -> Iterator[tuple[str, Cell]]:
        """Yield (column, cell) with a verdict; the oracle with itself is no comparison."""
        for row in self.rows.values():
            for column, cell in row.items():
                if column != ORACLE and cell.status not in UNJUDGED:
                    yield column, cell

    def missing(self, sides: Iterable[str]) -> list[str]:
        """The sides of which no comparison came to a verdict; the oracle is none of them."""
        part = {ORACLE} | {side for column, _ in self.judged() for side in column.split(PAIRED)}
        return [side for side in dict.fromkeys(sides) if side not in part]


@dataclass(frozen=True)
class FailingCase:
    """A failure with what it takes to run it again; each part of a comparison adds fields."""

    failure: Failure


@dataclass
class PartResult:
    """The result of one part of a comparison."""

    section: Section
    not_run: Counter[str] = field(default_factory=Counter)  # why, and how many comparisons
    missing: list[str] = field(default_factory=list)  # what was asked for and not compared, and why
    failures: list[FailingCase] = field(default_factory=list)  # all of them
    elements: int = 0  # of the tensors that were compared
    facts: list[dict[str, Any]] = field(default_factory=list)  # what a scale for each row is worth


def worst(statuses: Iterable[Status]) -> Status:
    """Return the verdict of several comparisons: a failure if there is one, skipped if all were."""
    order: tuple[Status, ...] = (
        "crashed",
        "outside",
        "different",
        "withheld",
        "inside",
        "identical",
        "skipped",
    )
    return min(statuses, key=order.index)
