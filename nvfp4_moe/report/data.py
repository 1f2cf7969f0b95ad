"""The results of a comparison as data, from which the text, the JSON file and the page are made."""

# SPDX-License-Identifier: Apache-2.0
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from ..exits import Exit
from ..machine import machine
from . import invocation

Status = Literal["identical", "inside", "different", "outside", "crashed", "withheld", "skipped"]
"""The verdicts of a cell, best first: the same bits; in the proved intervals; other bits; out of an
interval; the backend raised or its process died; not judged, since it adds
otherwise than assumed; not run."""
FAILED: tuple[Status, ...] = ("different", "outside", "crashed")
UNJUDGED: tuple[Status, ...] = ("withheld", "skipped")
ORACLE = "reference"
"""The side that the others are compared with; alone it is compared with itself."""
PAIRED = " = "
"""Between the two sides in the name of a column."""


SHOWN = 3
"""Failures that a cell keeps."""


def now() -> str:
    """The date and time, to the minute, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


@dataclass
class Heat:
    """Where differences lie, in tiles of the layout: counts by tile, and by place within a tile.

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
    """How many outputs lie in each tenth of their interval, of those that hold more than one value."""


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
        """(column, cell) where something came to a verdict; the oracle with itself is no comparison."""
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


@dataclass
class Report:
    """One run."""

    command: list[str] = field(default_factory=invocation.command)
    machine: dict[str, Any] = field(default_factory=machine)
    seconds: float = 0.0
    sections: list[Section] = field(default_factory=list)
    not_run: dict[str, int] = field(default_factory=dict)  # why, and how many comparisons
    missing: list[str] = field(default_factory=list)  # what was asked for and not run, and why
    folder: str | None = None  # that the command ran in, where it must run again
    name: str = ""  # the command without its options; empty: its first two words
    date: str = field(default_factory=now)

    @classmethod
    def of_this_run(cls) -> "Report":
        """A report of the command that this process runs."""
        return cls(folder=invocation.folder(), name=invocation.name())

    @property
    def cells(self) -> list[Cell]:
        return [cell for s in self.sections if not s.summary for cell in s.cells]

    @property
    def failed(self) -> int:
        """Comparisons that failed."""
        return sum(cell.failed for cell in self.cells if cell.status in FAILED)

    @property
    def compared(self) -> int:
        """Comparisons that came to a verdict."""
        judged = (s.judged() for s in self.sections if not s.summary)
        return sum(cell.compared for cells in judged for _, cell in cells)

    @property
    def status(self) -> Exit:
        """How a command ends that found this."""
        if any(cell.status in FAILED for cell in self.cells):
            return Exit.DIFFERENCE
        return Exit.NOT_RUN if self.missing or not self.compared else Exit.DONE

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "command": shlex.join(self.command),
            "name": self.name or " ".join(self.command[:2]),
            "pasted": invocation.pasted(self.command, self.folder),
            "failed": self.failed,
            "compared": self.compared,
            "exit_status": self.status.value,
            "statuses": dict(Counter(cell.status for cell in self.cells)),
        }


def read(path: Path) -> Report:
    """Read a report that `Report.as_dict` wrote; raises OSError or ValueError where it cannot."""
    data = json.loads(path.read_text("utf-8"))
    return Report(
        shlex.split(data["command"]), data["machine"], data["seconds"],
        [_section(s) for s in data["sections"]], data["not_run"], data["missing"],
        data["folder"], data["name"], data["date"],
    )  # fmt: skip


def _section(data: dict[str, Any]) -> Section:
    rows = {
        name: {column: _cell(cell) for column, cell in row.items()}
        for name, row in data["rows"].items()
    }
    return Section(**data | {"rows": rows})


def _cell(data: dict[str, Any]) -> Cell:
    failures = [
        Failure(**f | {"heat": None if f["heat"] is None else Heat(**f["heat"])})
        for f in data["failures"]
    ]
    return Cell(**data | {"failures": failures})


def worst(statuses: Iterable[Status]) -> Status:
    """The verdict of several comparisons: a failure if there is one, skipped if all were skipped."""
    order: tuple[Status, ...] = (
        "crashed", "outside", "different", "withheld", "inside", "identical", "skipped"
    )  # fmt: skip
    return min(statuses, key=order.index)
