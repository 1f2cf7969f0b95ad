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
from ..reference.recipe import FLASHINFER, FlashInferVersion
from . import invocation


def count_of(n: int, noun: str) -> str:
    """Return a number and what it counts, in the plural where it is not one."""
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def now() -> str:
    """Return the date and time, to the minute, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


@dataclass
class Report:
    """The report of one run."""

    command: list[str] = field(default_factory=invocation.command)
    machine: dict[str, Any] = field(default_factory=machine)
    seconds: float = 0.0
    sections: list[Section] = field(default_factory=list)
    not_run: dict[str, int] = field(default_factory=dict)  # why, and how many comparisons
    missing: list[str] = field(default_factory=list)  # what was asked for and not run, and why
    folder: str | None = None  # that the command ran in, where it must run again
    name: str = ""  # the command without its options; empty: its first two words
    date: str = field(default_factory=now)
    flashinfer: FlashInferVersion = FLASHINFER
    """Whose bits were asked for; a report from before this field is of 0.7.2."""

    @classmethod
    def of_this_run(cls) -> "Report":
        """Return a report of the command that this process runs."""
        return cls(folder=invocation.folder(), name=invocation.name())

    @property
    def cells(self) -> list[Cell]:
        return [cell for s in self.sections if not s.summary for cell in s.cells]

    @property
    def failed(self) -> int:
        """The number of comparisons that failed."""
        return sum(cell.failed for cell in self.cells if cell.status in FAILED)

    @property
    def compared(self) -> int:
        """The number of comparisons that came to a verdict."""
        judged = (s.judged() for s in self.sections if not s.summary)
        return sum(cell.compared for cells in judged for _, cell in cells)

    @property
    def status(self) -> Exit:
        """The exit status of a command that found this."""
        if any(cell.status in FAILED for cell in self.cells):
            return Exit.DIFFERENCE
        return Exit.NOT_RUN if self.missing or not self.compared else Exit.DONE

    @property
    def verdict(self) -> str:
        """The outcome in one line: what failed, of how many comparisons, and what was not run."""
        parts = []
        if self.failed:
            parts.append(f"{self.failed:,} of {count_of(self.compared, 'comparison')} failed")
        uncounted = sum(cell.status in FAILED and not cell.failed for cell in self.cells)
        if uncounted:  # a process that ended before it compared anything
            parts.append(f"{count_of(uncounted, 'cell')} failed without a count")
        if not parts:
            every = f"nothing failed in {count_of(self.compared, 'comparison')}"
            parts.append(every if self.compared else "nothing was judged")
        if self.missing:
            parts.append(f"{count_of(len(self.missing), 'thing')} asked for and not run")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "command": shlex.join(self.command),
            "name": self.name or " ".join(self.command[:2]),
            "pasted": invocation.pasted(self.command, self.folder),
            "failed": self.failed,
            "compared": self.compared,
            "verdict": self.verdict,
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
        data.get("flashinfer", "0.7.2"),
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
