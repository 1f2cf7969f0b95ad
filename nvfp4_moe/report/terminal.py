"""Prints the results of `nvfp4-moe diff` on a terminal."""

# SPDX-License-Identifier: Apache-2.0
import re
from collections import Counter
from typing import Any, TextIO

import torch

from ..console.table import print_table
from ..differential.results import FAILED, PAIRED, Cell, PartResult, Section
from ..exits import Exit
from .data import Report

_SHOWN = 10
_STYLES = {
    r"\b(DIFFER|FAIL)|\d differ\b": "bold red",
    r"\b(identical|inside)\b": "green",
    r"^(not run|not judged|skipped)|^-$": "dim",
}


def style(cell: str) -> str:
    """Return the style of an outcome in a table."""
    return next((found for pattern, found in _STYLES.items() if re.search(pattern, cell)), "")


def print_quantizers(
    result: PartResult, sides: list[str] | None, seconds: float, stream: TextIO
) -> None:
    """Print the quantizers' table, the first differences, and what a scale for each row is worth."""
    _table(result.section, stream)
    _failures(result, stream)
    if result.facts:
        print("\nwhat a per-token scale is for (exact math, no 4over6):", file=stream)
        width = max(len(f["tensor"]) for f in result.facts)
        for f in result.facts:
            print(f"  {f['tensor']:<{width}}  {_facts(f)}", file=stream)
    took_part = {side for column in result.section.columns for side in column.split(PAIRED)}
    named = [side for side in sides or () if side in took_part or not took_part]
    cells = result.section.cells
    compared, failed = sum(c.compared for c in cells), sum(c.failed for c in cells)
    print(
        f"\n{compared} comparisons of {result.elements:,} elements by {', '.join(named)}: "
        f"{_outcome(compared, failed, len(result.missing))} ({seconds:.0f} s)",
        file=stream,
    )
    for note in result.section.notes:
        print(note, file=stream)


def _outcome(compared: int, failed: int, missing: int) -> str:
    if failed:
        return f"{failed} DIFFER"
    if not compared:
        return "nothing was compared"
    return f"identical, but {missing} of the tensors not compared" if missing else "all identical"


def _facts(f: dict[str, Any]) -> str:
    """Write the spread and the SNR of a tensor, and its rows that have none."""
    parts = []
    for what, name in (("NaN", "rows_with_nan"), ("an infinity", "rows_with_infinity")):
        if f[name]:
            parts.append(f"{f[name]} of {f['shape'][0]} rows with {what}, left out here")
    if f["spread"] is None:
        parts.append("no value but 0: no SNR" if not parts else "no other value but 0: no SNR")
    else:
        parts.append(
            f"row maxima spread {f['spread']:5.1f} x   SNR per token {f['snr_per_token']:5.2f} dB, "
            f"one scale {f['snr_global']:5.2f} dB"
        )
    return "; ".join(parts)


def print_layers(
    result: PartResult, sides: list[str] | None, seconds: float, stream: TextIO
) -> None:
    """Print a line for each case and backend of layers, and the first failures."""
    section = result.section
    if not section.rows:
        return
    print(f"\n{section.title}: {section.notes[0]}", file=stream)
    rows = [
        (row, backend, _verdict(cell))
        for row, cells in section.rows.items()
        for backend, cell in cells.items()
    ]
    print_table(["case", "backend", "verdict"], rows, stream, style)
    _failures(result, stream)


def print_format_errors(errors_by_group: dict[str, dict[str, float]], stream: TextIO) -> None:
    """Print the errors of the formats, a line for each group: `format_error.format_errors`."""
    print("mean relative error of a token against the bf16 layer, SwiGLU:", file=stream)
    for group, errors in errors_by_group.items():
        print(f"  {group}: " + ", ".join(f"{k} {v:.3f}" for k, v in errors.items()), file=stream)


def _table(section: Section, stream: TextIO) -> None:
    if not section.rows:
        return
    rows = [
        [name, *(_pair(row.get(column)) for column in section.columns)]
        for name, row in section.rows.items()
    ]
    print_table(["input, mode", *section.columns], rows, stream, style)


def _pair(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if cell.status in FAILED:
        return f"{cell.failed}/{cell.compared} differ"
    return cell.status if cell.status == "skipped" else f"{cell.status} ({cell.compared})"


def _verdict(cell: Cell) -> str:
    if cell.status == "skipped":
        return f"not run: {cell.note}"
    if cell.status == "withheld":
        return f"not judged: {cell.note}"
    many = f" ({cell.compared})" if cell.compared > 1 else ""
    if cell.status in FAILED:
        return f"{cell.note}  DIFFER: {cell.failed} of {cell.compared} {cell.status}"
    return f"{cell.note}  {cell.status}{many}"


def _failures(result: PartResult, stream: TextIO) -> None:
    failures = [case.failure for case in result.failures]
    for failure in failures[:_SHOWN]:
        print(f"\n{failure.case} differ: {failure.summary}", file=stream)
        for line in failure.details:
            print(f"  {line}", file=stream)
    if len(failures) > _SHOWN:
        print(f"\n... and {len(failures) - _SHOWN} more (--json has all)", file=stream)


def print_not_run(reasons: Counter, stream: TextIO) -> None:
    """Print what could not be compared, and why."""
    for reason, count in reasons.items():
        print(f"not run ({count}): {reason}", file=stream)
    if not torch.cuda.is_available():
        print("not run: FlashInfer and Triton on a GPU: no CUDA device here", file=stream)


def _made(whole: Report) -> str:
    """Return the date, the versions and the machine of a report, in one line."""
    machine = whole.machine
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    contract = f", contract {machine['contract'][:12]}" if machine.get("contract") else ""
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    return f"{whole.date}: {versions}{commit}{contract}; {gpus}{driver}"


def print_end(whole: Report, stream: TextIO) -> None:
    """Print the machine, what was asked for and not run, and the verdict with the exit status."""
    print(_made(whole), file=stream)
    for what in whole.missing:
        print(f"asked for and not run: {what}", file=stream)
    status = ""
    if whole.status is not Exit.DONE:
        status = f" (exit status {whole.status.value}: {whole.status.meaning})"
    print(f"verdict: {whole.verdict}{status}", file=stream)
