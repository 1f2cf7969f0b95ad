"""Read what a tool of compute-sanitizer said of one process from its output, and judge it.

A report begins with `========= ` at the start of a line, and its details are indented after that. A
summary ends the output; racecheck has one of its own. The samples in the tests have the lines.
"""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Collection
from dataclasses import dataclass

from . import dispatch
from .worker import MARK

PRINTED = 1000
"""Reports of racecheck after which it prints no more."""
_ERRORS = re.compile(r"^=+ (?:ERROR|INITCHECK) SUMMARY: (\d+) errors?\s*$", re.M)
_HAZARDS = re.compile(r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed", re.M)
_LINE = re.compile(r"^=+ (?P<indent> *)(?P<text>\S.*)$", re.M)
_TOOL_FAILED = re.compile(r"^=+ (?:Internal Sanitizer )?Error\b", re.M)
_NO_REPORT = re.compile(r"COMPUTE-SANITIZER|SUMMARY:|Saved host backtrace|Host Frame|LEAK")


@dataclass(frozen=True)
class Outcome:
    """The result of one tool on one group."""

    tool: str
    group: str
    verdict: str  # "clean", "errors", "failed" or "not run"
    errors: int = 0  # reports; of racecheck, hazards of every level
    first: str = ""  # the first report, or why there is none; of a clean one, a note of the tool
    seconds: float = 0.0
    cases: tuple[int, int] = (0, 0)  # that ended, of how many
    known: int = 0  # reports of Triton's dispatch (`dispatch.py`), which are no errors

    @property
    def shown(self) -> str:
        """The cell of the table."""
        if self.verdict == "errors":
            return f"{self.errors} errors"
        return f"{self.known} known" if self.known else self.verdict


def count(tool: str, text: str) -> int | None:
    """Return the number in the tool's summary; None: the output has no summary."""
    errors, hazards = _ERRORS.findall(text), _HAZARDS.findall(text)
    if not (hazards if tool == "racecheck" else errors):
        return None
    return sum(map(int, errors + hazards))


def first_report(text: str) -> str:
    """Return the first report with its place, one line; "" if there is none."""
    lines = [m for m in _LINE.finditer(text) if not _NO_REPORT.search(m["text"])]
    for i, line in enumerate(lines):
        if not line["indent"]:
            more = lines[i + 1]["text"] if i + 1 < len(lines) and lines[i + 1]["indent"] else ""
            return f"{line['text']} {more}".strip()
    return ""


def said(text: str, word: str) -> list[str]:
    """Return the rests of the worker's lines that begin with a word."""
    return re.findall(rf"^{MARK} {word} ?(.*)$", text, re.M)


def judge(
    tool: str,
    group: str,
    text: str,
    status: int | None,
    seconds: float,
    kernels: Collection[str],
    limit: float,
    *,
    accepted: bool = False,
) -> Outcome:
    """Return the outcome of a process.

    Args:
        tool: of compute-sanitizer, or "plain" for a run without one.
        text: all that the process and the tool wrote.
        status: the exit status; None: it was ended after `limit` seconds.
        kernels: those that the group has to launch.
        accepted: racecheck's reports of Triton's dispatch of `gl.warp_specialize` are no errors. It
            needs all of them in the output: at `PRINTED` reports none is accepted.
    """
    total = int((said(text, "cases") or ["0"])[0])
    ended = len(said(text, "done"))
    launched = {name for line in said(text, "launched") for name in line.split()}
    errors = 0 if tool == "plain" else count(tool, text)
    known = 0
    if accepted and errors and tool == "racecheck":
        dispatches = [dispatch.parse(line) for line in said(text, "dispatch")]
        known, others, rest = dispatch.split(text, dispatches)
        if known + others == errors < PRINTED:
            errors, text = others, rest
        else:
            known = 0
    missing = sorted(set(kernels) - launched)
    verdict, first = "failed", ""
    if errors:
        verdict, first = "errors", first_report(text)
    elif status is None:
        first = f"ended after {limit:.0f} s, case {ended + 1} of {total}"
    elif status != 0 or not total or ended != total:
        first = first_report(text) or last_line(text) or f"exit status {status}"
    elif errors is None:
        first = "the tool wrote no summary"
    elif _TOOL_FAILED.search(text):
        first = first_report(text)  # the tool's own failure, which its summary does not count
    elif missing:
        first = f"not launched: {', '.join(missing)}"
    else:
        verdict, first = "clean", first_report(text)
    ran = (round(seconds, 1), (ended, total))
    return Outcome(
        tool, group, verdict, errors or 0, first, *ran, known if verdict == "clean" else 0
    )


def last_line(text: str) -> str:
    """Return the last line of the process itself, which is an exception's."""
    lines = [line for line in text.splitlines() if line.strip() and line[0] not in "="]
    return lines[-1].strip() if lines else ""
