"""A report as data, from which the text, the JSON file and the page are made."""

# SPDX-License-Identifier: Apache-2.0
import json
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..differential.results import FAILED, Cell, Failure, Heat, Section
from ..exits import Exit
from ..machine import machine
from . import invocation


def now() -> str:
    """The date and time, to the minute, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


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
        """The exit status of a command that found this."""
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
        shlex.split(data["command"]),
        data["machine"],
        data["seconds"],
        [_section(s) for s in data["sections"]],
        data["not_run"],
        data["missing"],
        data["folder"],
        data["name"],
        data["date"],
    )


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
