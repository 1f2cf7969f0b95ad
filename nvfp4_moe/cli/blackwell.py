"""`nvfp4-moe blackwell`: the whole matrix through every backend, tactic and math, in a report.

Every backend and environment has a process of its own: FlashInfer reads its math and 4over6 from
variables, and a kernel that fails may take its process along. With several GPUs they run side by side.
"""

# SPDX-License-Identifier: Apache-2.0
import os
import queue
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from .. import files
from ..console import progress
from ..console.table import print_table
from ..differential import workers
from ..differential.quantize import CANNOT
from ..differential.results import FAILED, Cell, Failure, Section, worst
from ..exits import CommandError, Exit
from ..failures import write
from ..kernels import environment
from ..kernels.flashinfer import version
from ..report import data as report
from ..report import terminal
from ..report.data import Report
from ..report.parts import PARTS, Part
from . import finished
from .output import Result

CHILD = (sys.executable, "-m", "nvfp4_moe")
"""The command line in another process."""
LONGEST = 1e6
"""The longest time limit of a process, in seconds."""
PRINTED = "printed.txt"
"""The file with the output of a process, in its folder."""


@dataclass(frozen=True)
class BackendJob:
    """The work of one process: a part of the comparison, by one backend in one environment."""

    part: Part
    backend: str
    math: str  # a key of `part.maths`

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", f"{self.part.name} {self.backend} {self.math}")

    @property
    def title(self) -> str:
        """The title of its table in the report."""
        return f"{self.part.title}, {self.math}"

    def arguments(self, options: SimpleNamespace, out: Path) -> list[str]:
        chosen = self.part.arguments(self.backend, options.small)
        here = ("--flashinfer", version.HERE.contract)
        return ["diff", "--only", self.part.name, *chosen, *here, "--report", str(out)]


@dataclass(frozen=True)
class JobResult:
    """The end of a job's process."""

    job: BackendJob
    status: int | None  # the exit status; None: it did not end
    printed: str
    report: Report | None  # None: it wrote none


def jobs(chosen: str | None) -> Iterator[BackendJob]:
    """Every process to be started.

    Args:
        chosen: backends, comma-separated; None: all.

    Raises:
        CommandError: one of them is no backend.
    """
    names = None if chosen is None else chosen.split(",")
    known = {backend for part in PARTS for backend in part.backends} - {"reference"}
    for name in names or ():
        if name not in known:
            raise CommandError(
                f"--backends has {name!r}; it must be among {', '.join(sorted(known))}"
            )
    for part in PARTS:
        for backend in part.backends:
            if backend != "reference" and (names is None or backend in names):
                for math in part.maths:
                    yield BackendJob(part, backend, math)


def run(options: SimpleNamespace) -> Result:
    start = time.monotonic()
    out = Path(options.report)
    planned = list(jobs(options.backends))
    if not 0 < options.timeout <= LONGEST:
        allowed = f"more than 0 and at most {LONGEST:g} seconds"
        raise CommandError(f"--timeout is {options.timeout:g}; it must be {allowed}")
    files.check_folder("--report", out)
    out.mkdir(parents=True, exist_ok=True)
    print(workers.run([*CHILD, "doctor"], options.timeout)[1], end="")
    for job in jobs(None):  # of every earlier run, whatever it was asked for
        write.remove_stale(out / job.folder)
        if not options.resume:
            finished.forget(out / job.folder)
    results = _run_all(planned, options, out)
    verdicts = _verdicts(results)
    whole = Report.of_this_run()
    whole.flashinfer = version.HERE.contract
    whole.sections = [verdicts, *_tables(results)]
    whole.seconds = round(time.monotonic() - start, 1)
    whole.missing = _missing(verdicts, options.backends)
    write.write(whole, out)
    _print(verdicts, out)
    terminal.print_end(whole, sys.stdout)
    return Result(whole.status, whole.as_dict())


def left(options: SimpleNamespace) -> str:
    """The state that an interrupt leaves."""
    return (
        f"what finished is below {options.report}, a folder a process, without the page of all; the "
        "same command with --resume goes on"
    )


def _missing(verdicts: Section, chosen: str | None) -> list[str]:
    """Reasons why requested backends were not judged; where none was named, FlashInfer counts as one."""
    if chosen is not None:
        idle = verdicts.missing(chosen.split(","))
        return [f"backend {name}: {_why(verdicts, [name])}" for name in idle]
    of_flashinfer = [b for b in verdicts.columns if b.startswith("flashinfer:")]
    if len(verdicts.missing(of_flashinfer)) < len(of_flashinfer):
        return []
    return [f"every backend of FlashInfer's: {_why(verdicts, of_flashinfer)}"]


def _why(verdicts: Section, backends: list[str]) -> str:
    """The most frequent note in the cells of the backends."""
    notes = Counter(row[b].note for row in verdicts.rows.values() for b in backends if b in row)
    return notes.most_common(1)[0][0] if notes else "nothing was run"


def _run_all(planned: list[BackendJob], options: SimpleNamespace, out: Path) -> list[JobResult]:
    """Run every job, one at a time on each GPU; without a GPU, two at a time."""
    names: list[str | None] = [None, None]
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        names = list(visible.split(",") if visible else map(str, range(count)))
    gpus: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for name in names:
        gpus.put(name)

    def run_one(job: BackendJob) -> JobResult:
        gpu = gpus.get()
        try:
            return run_job(job, gpu, max(1, (os.cpu_count() or 1) // len(names)), options, out)
        finally:
            gpus.put(gpu)
            progress.step()

    with progress.bar("processes", len(planned)):
        return workers.side_by_side(run_one, planned, len(names))


def run_job(
    job: BackendJob, gpu: str | None, threads: int, options: SimpleNamespace, out: Path
) -> JobResult:
    """Run a job in its own process, on the GPU of this name in CUDA_VISIBLE_DEVICES; None: as it is."""
    where = out / job.folder
    chosen = {*environment.EXACT_VARIABLES["cuda"], *environment.FOUR_OVER_SIX_VARIABLES}
    inherited = {k: v for k, v in os.environ.items() if k not in chosen}
    variables = inherited | job.part.maths[job.math]
    variables["OMP_NUM_THREADS"] = str(threads)
    arguments = job.arguments(options, where)
    key = finished.key(arguments, variables)  # of whichever of the visible GPUs
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    if finished.is_noted(where, key) and (earlier := _earlier(job, where)) is not None:
        progress.note(f"{job.part.name}, {job.backend}, {job.math}: found by an earlier run")
        return earlier
    finished.forget(where)
    progress.note(f"running {job.part.name}, {job.backend}, {job.math}")
    for name in ("report.json", "report.html", PRINTED):
        (where / name).unlink(missing_ok=True)
    command = [*CHILD, *arguments]
    status, printed = workers.run(command, options.timeout, env=variables)
    if status is None:
        printed += f"\nstill running after {options.timeout:g} s: ended"
    where.mkdir(parents=True, exist_ok=True)
    (where / PRINTED).write_text(printed, "utf-8")
    found = _report(where)
    if status == Exit.DONE and found is not None:
        finished.note(where, key)
    return JobResult(job, status, printed, found)


def _earlier(job: BackendJob, where: Path) -> JobResult | None:
    """The result that a process left in its folder, which ended well; None if it is not there."""
    found = _report(where)
    try:
        printed = (where / PRINTED).read_text("utf-8")
    except (OSError, ValueError):
        return None
    return None if found is None else JobResult(job, Exit.DONE, printed, found)


def _report(where: Path) -> Report | None:
    try:
        return report.read(where / "report.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _verdicts(results: list[JobResult]) -> Section:
    """A cell for each job."""
    section = Section("verdicts", summary=True)
    for result in results:
        row = result.job.title
        section.put(row, result.job.backend, verdict(result))
    return section


def verdict(result: JobResult) -> Cell:
    """Return a job's one outcome; skipped where its backend cannot serve, with the reason."""
    last = (result.printed.strip().splitlines() or ["nothing was printed"])[-1]
    if result.report is None and result.status == Exit.NOT_RUN:  # refused before any work
        return Cell("skipped", note=last.split(CANNOT, 1)[-1])
    if result.report is None:
        lines = result.printed.strip().splitlines()[-20:]
        title = f"{result.job.part.name}, {result.job.backend}, {result.job.math}"
        return Cell("crashed", 1, 1, last, [Failure(title, f"exit status {result.status}", lines)])
    cells = [
        cell
        for section in result.report.sections
        for row in section.rows.values()
        for column, cell in row.items()
        if result.job.backend in column
    ]
    run = [cell for cell in cells if cell.status != "skipped"]
    reasons = Counter(cell.note for cell in cells if cell.status == "skipped")
    if not run:
        reason = reasons.most_common(1)[0][0] if reasons else "nothing was run"
        return Cell("skipped", note=reason)
    return Cell(
        worst(cell.status for cell in run),
        sum(c.compared for c in run),
        sum(c.failed for c in run),
        f"{sum(reasons.values())} cases not run" if reasons else "",
    )


def _tables(results: list[JobResult]) -> Iterator[Section]:
    """One table for each part and math: the sections of its jobs side by side."""
    merged: dict[str, Section] = {}
    for result in results:
        title = result.job.title
        table = merged.setdefault(title, Section(title))
        if result.report is None:
            table.put("the whole process", result.job.backend, verdict(result))
        for section in result.report.sections if result.report else []:
            table.notes += [note for note in section.notes if note not in table.notes]
            for name, row in section.rows.items():
                for column, cell in row.items():
                    for failure in cell.failures:
                        if failure.replay is not None:
                            failure.replay = f"{result.job.folder}/{failure.replay}"
                    table.put(name, column, cell)
    yield from merged.values()


def _print(verdicts: Section, out: Path) -> None:
    print(f"\nverdicts (the report is in {out}):")
    rows = [
        (row, backend, _outcome(cell))
        for row, cells in verdicts.rows.items()
        for backend, cell in cells.items()
    ]
    print_table(["comparison", "backend", "verdict"], rows, sys.stdout, terminal.style)


def _outcome(cell: Cell) -> str:
    if cell.status in FAILED:
        return f"FAIL: {cell.failed} of {cell.compared} {cell.status}"
    return (
        f"not run: {cell.note}" if cell.status == "skipped" else f"{cell.status} ({cell.compared})"
    )
