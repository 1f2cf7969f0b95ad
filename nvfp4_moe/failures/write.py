"""Writes a report's folder: the page, its data, and each failing case, minimized, as a replay file."""

# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cases.moe_case import to_device
from ..console import progress
from ..differential.flashinfer_tactics import DEFAULT
from ..differential.moe import WrongOutput
from ..differential.quantize import GOLDEN, QuantizerDifference
from ..differential.results import Failure, PartResult
from ..report import invocation
from ..report.data import Report
from ..report.html import render
from .bug_report import bug_report_text
from .minimize import minimize_tensor
from .minimize_moe import minimize_call
from .replay import call_fails, quantizer_fails, run_call, run_side
from .replay_file import (
    MoEFailure,
    Origin,
    QuantizerFailure,
    is_failing_case,
    rows_of,
    save_moe,
    save_quantizer,
)

PAGE = "report.html"
"""The name of the page in a report's folder."""
MOST_FILES = 12
"""The largest number of failing cases that are minimized and written, the first of each cell."""
MOST_HEATS = 40
SECONDS = 20.0
"""The time for minimizing one failing case."""


_FAILURE = re.compile(r"failure-\d{2,}\.safetensors")


def remove_stale(folder: Path) -> None:
    """Remove the failing cases of an earlier run: files of our name and of our kind, and no others."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _FAILURE.fullmatch(path.name) and is_failing_case(path):
            path.unlink()


def write(whole: Report, folder: Path) -> None:
    """Write report.json and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    for failure in [f for cell in whole.cells for f in cell.failures if f.heat][MOST_HEATS:]:
        failure.heat = None
    data = whole.as_dict()
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    (folder / PAGE).write_text(render(data), "utf-8", newline="\n")


def write_failures(results: Iterable[PartResult], folder: Path) -> None:
    """Write the first failing case of each cell, and fill in `Failure.replay` and `upstream`.

    Cases of layers beside NVFP4 have no replay file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    files = 0
    for result in results:
        first = {id(c.failures[0]) for c in result.section.cells if c.failures}
        for case in progress.track(result.failures, "writing failing cases"):
            write_one = _WRITERS.get(type(case))
            if write_one and id(case.failure) in first and files < MOST_FILES:
                files += 1
                write_one(case, folder / f"failure-{files:02}.safetensors")


def _quantizer(found: QuantizerDifference, path: Path) -> None:
    x, case, difference = found.item.x, found.case, found.difference
    row = difference.row - found.item.first_row
    golden = found.item.golden.get(case) if GOLDEN in found.pair else None
    if golden is None:
        try:
            fails = quantizer_fails(case, *found.pair)
            in_padding = row == x.shape[0]
            place = None if in_padding else (row, difference.block)
            x = minimize_tensor(x, fails, SECONDS, place)
        except ValueError as error:  # it did not fail again
            found.failure.details.append(f"not shrunk: {error}")
    elif row < x.shape[0]:  # nothing but rows can be left out of what was recorded
        x, golden = x[row : row + 1], rows_of(golden, [row], case)
    outputs = {side: golden if side == GOLDEN else run_side(side, x, case) for side in found.pair}
    failing = QuantizerFailure(x, case, outputs)
    save_quantizer(path, failing)
    _point(found.failure, failing, path)


def _layer(found: WrongOutput, path: Path) -> None:
    failing = MoEFailure(
        to_device(found.case, "cpu"),
        found.backend,
        found.output,
        None if found.configuration == DEFAULT else found.configuration,
        origin=Origin(note=found.failure.summary if found.output is None else ""),
    )
    try:
        case = minimize_call(failing.case, call_fails(failing, run_call), SECONDS)
        output = run_call(failing.backend, case, failing.configuration)
        failing = replace(failing, case=case, output=output)
    except (ValueError, RuntimeError) as error:
        found.failure.details.append(f"not shrunk: {error}")
    save_moe(path, failing)
    _point(found.failure, failing, path)


_WRITERS: dict[type, Callable[[Any, Path], None]] = {
    QuantizerDifference: _quantizer,
    WrongOutput: _layer,
}


def _point(failure: Failure, failing: QuantizerFailure | MoEFailure, path: Path) -> None:
    failure.replay = path.name
    again = [*invocation.program(), "replay", str(path.absolute())]
    failure.again = invocation.pasted(again, invocation.folder())
    try:
        failure.upstream = bug_report_text(failing, path.name)
    except ValueError as error:  # what was recorded is right: it came and went
        failure.details.append(f"no report: {error}")
