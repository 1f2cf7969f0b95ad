"""`nvfp4-moe bench`: the time of each operation, by backend, shape and number of tokens."""

# SPDX-License-Identifier: Apache-2.0
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .. import files
from ..bench import clock, plots, results, rival_figures
from ..bench.case import Case, NotHere, Prepared, WrongResult
from ..bench.operations import OPERATIONS, select
from ..bench.results import Key, Measurement
from ..bench.rival_figures import Comparison
from ..console import progress
from ..console.table import print_table
from ..exits import CommandError, Exit
from ..kernels.backends import UnsupportedError
from ..reference import checks
from .output import Result

ON_A_CPU = (
    "Measured on a CPU: the reference, which is the specification and not made to be fast, "
    "conversion, and loading. Triton and FlashInfer are measured on a GPU."
)

IN_A_CACHE = "A case whose tensors stay in a cache can be above 1 of the roofline."


@dataclass
class _Found:
    """The outcome of a run, or of the files that it loaded."""

    measurements: list[Measurement] = field(default_factory=list)
    refused: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """The number of cases that cannot run here, by operation, backend and reason."""
    wrong: list[str] = field(default_factory=list)


def run(options: SimpleNamespace) -> Result:
    _check_paths(options)
    earlier = [] if options.compare is None else results.read("--compare", options.compare)
    show = _Tables(options, earlier)
    found = _Found()
    try:
        if options.load:
            _load(options, found, show)
        else:
            _measure(options, found, show)
    finally:  # what was measured before an interrupt is saved, too
        if options.save is not None and found.measurements:
            results.write(Path(options.save), found.measurements)
            options.saved = True
    elsewhere = {m.device for m in earlier} - {m.device for m in found.measurements}
    if elsewhere:
        print(f"note: {options.compare} was measured on {'; '.join(sorted(elsewhere))}")
    for (operation, backend, reason), count in found.refused.items():
        cases = "1 case" if count == 1 else f"{count} cases"
        print(f"not measured: {operation}, {backend} ({cases}): {reason}")
    for told in found.wrong:
        print(f"WRONG, and not measured: {told}")
    if options.save is not None and found.measurements:
        print(f"saved {options.save}; --compare {options.save} sets a later run beside it")
    if options.plot is not None and found.measurements:
        ratios = results.ratios(found.measurements, show.baselines)
        for path in plots.draw(found.measurements, ratios, show.baselines, Path(options.plot)):
            print(f"drew {path}")
    return Result(_status(options, found, show), show.document(found))


def left(options: SimpleNamespace) -> str:
    """Say what an interrupt leaves."""
    if getattr(options, "saved", False):
        return f"what was measured before is in {options.save}"
    return "it wrote nothing, and the same command starts over"


def _check_paths(options: SimpleNamespace) -> None:
    if options.save is not None:
        files.check_file("--save", options.save)
    if options.plot is not None:
        plots.check_matplotlib()
        files.check_folder("--plot", options.plot)


def _load(options: SimpleNamespace, found: _Found, show: "_Tables") -> None:
    """Take the measurements of files, those that are asked for."""
    for name, given in (("--all", options.all), ("--device", options.device)):
        if given:
            raise CommandError(f"{name} is of a run, and --load measures nothing")
    loaded = [m for path in options.load for m in results.read("--load", path)]
    latest = {m.key: m for m in loaded if _asked_for(options, m)}
    found.measurements = list(latest.values())
    if not found.measurements:
        names = ", ".join(dict.fromkeys(m.group for m in loaded))
        raise CommandError(f"--load has nothing of what is asked for; it has {names}")
    for device in dict.fromkeys(m.device for m in found.measurements):
        print(f"measured earlier on {device}")
    for operation in OPERATIONS:
        show.operation([m for m in found.measurements if m.operation == operation])


def _asked_for(options: SimpleNamespace, m: Measurement) -> bool:
    backends = [*options.backend, *filter(None, [options.baseline])] if options.backend else []
    return (
        m.operation in (options.only or OPERATIONS)
        and (not options.shape or any(p.lower() in m.shape.lower() for p in options.shape))
        and (not options.tokens or m.tokens in options.tokens)
        and (not backends or m.backend in backends)
    )


def _measure(options: SimpleNamespace, found: _Found, show: "_Tables") -> None:
    """Measure the cases that are asked for, and print the tables of each operation."""
    on_gpu = torch.cuda.is_available()
    try:
        device = checks.device("--device", options.device or ("cuda" if on_gpu else "cpu"))
    except ValueError as error:
        raise CommandError(str(error)) from None
    cases = select(
        options.only,
        device,
        shapes=options.shape,
        tokens=options.tokens,
        backends=options.backend,
        baseline=options.baseline,
        everything=options.all,
    )
    name = clock.device_name(device)
    print(name)
    if device.type == "cpu":
        print(ON_A_CPU)
    rates = clock.rates(device)
    print(f"The roofline, measured now: {rates}.")
    if device.type == "cpu":
        print(IN_A_CACHE)
    with progress.bar("measuring", len(cases)):
        for operation, mine in itertools.groupby(cases, lambda case: case.operation.name):
            for _, cell in itertools.groupby(mine, lambda case: case.group):
                _measure_cell(list(cell), device, name, rates, found)
            show.operation([m for m in found.measurements if m.operation == operation])


def _measure_cell(
    cases: Sequence[Case], device: torch.device, name: str, rates: clock.Rates, found: _Found
) -> None:
    """Measure the backends of one shape and number of tokens, which take turns."""
    ready: list[tuple[Case, Prepared, Callable[[], float]]] = []
    for case in cases:
        with _refusals(case, name, found):
            prepared = case.prepare(device)
            calls = case.operation.calls
            timed = clock.timer(prepared.call, device, prepared.capturable, calls)
            ready.append((case, prepared, timed))
        progress.step()
    if not ready:
        return
    timers = [timed for _, _, timed in ready]
    clock.warm_up(timers, device)
    before = clock.sm_mhz(device)
    times = clock.interleaved(timers, device)
    clocks = before, clock.sm_mhz(device)
    for (case, prepared, _), mine in zip(ready, times, strict=True):
        stats = results.statistics_of(mine)
        found.measurements.append(results.measured(case, prepared, stats, rates, name, clocks))


@contextmanager
def _refusals(case: Case, name: str, found: _Found) -> Iterator[None]:
    """Keep the reason why a case is not measured."""
    try:
        yield
    except WrongResult as wrong:
        found.wrong.append(str(wrong))
    except (NotHere, NotImplementedError, UnsupportedError) as refusal:
        found.refused[case.operation.name, case.backend, str(refusal)] += 1
    except RuntimeError as error:
        if not _is_of_memory(error):
            raise
        reason = f"{name} has not enough memory"
        found.refused[case.operation.name, case.backend, reason] += 1


def _is_of_memory(error: RuntimeError) -> bool:
    """Return True where memory is missing; for the CPU's torch has no class of error."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Tables:
    """Prints the tables of an operation, with the ratios to a baseline and to an earlier file."""

    def __init__(self, options: SimpleNamespace, earlier: Sequence[Measurement]):
        self._earlier = earlier
        self.compared = 0
        self.baselines: dict[str, str | None] = {
            name: options.baseline if options.baseline in o.every.backends else o.baseline
            for name, o in OPERATIONS.items()
        }

    def operation(self, measurements: Sequence[Measurement]) -> None:
        """Print a table for each shape of one operation."""
        ratios = results.ratios(measurements, self.baselines)
        changes = results.changes(measurements, self._earlier)
        self.compared += len(changes)
        for shape in dict.fromkeys(m.shape for m in measurements):
            mine = [m for m in measurements if m.shape == shape]
            heading = f"\n{mine[0].operation}: {shape}"
            if any(m.key in ratios for m in mine):
                heading += f"; speed-up over {self.baselines[mine[0].operation]}"
            progress.note(heading)
            columns = {
                mine[0].unit: [str(m.tokens or "") for m in mine],
                "backend": [m.backend for m in mine],
                "time": [_time(m.seconds) for m in mine],
                "GB/s": [clock.shown(m.gb_s) for m in mine],
                "TFLOP/s": [clock.shown(m.tflops) if m.flop else "" for m in mine],
                "of roofline": [f"{m.of_roofline:.3f}" for m in mine],
                "speed-up": [_ratio(m.key, ratios) for m in mine],
                "than before": [_ratio(m.key, changes) for m in mine],
            }
            filled = {name: cells for name, cells in columns.items() if any(cells)}
            print_table(list(filled), list(zip(*filled.values(), strict=True)), sys.stdout)
            _print_rivals(rival_figures.compare(mine))

    def document(self, found: _Found) -> dict[str, Any]:
        """Return the document of `--json`."""
        ratios = results.ratios(found.measurements, self.baselines)
        changes = results.changes(found.measurements, self._earlier)
        return {
            "cells": [
                m.extra_info
                | {
                    "seconds": m.seconds,
                    "gb_s": m.gb_s,
                    "tflops": m.tflops,
                    "share_of_roofline": m.of_roofline,
                    "baseline": self.baselines[m.operation],
                    "speed_up_over_baseline": ratios.get(m.key),
                    "speed_up_over_earlier": changes.get(m.key),
                }
                for m in found.measurements
            ],
            "not_measured": [
                {"operation": operation, "backend": backend, "reason": reason, "cases": count}
                for (operation, backend, reason), count in found.refused.items()
            ],
            "wrong": found.wrong,
            "rivals": [asdict(c) for c in rival_figures.compare(found.measurements)],
        }


def _print_rivals(found: Sequence[Comparison]) -> None:
    """Print ours beside the rivals of one layer, and in which cells one of them is faster."""
    if not found:
        return
    date = rival_figures.DATE
    progress.note(f"\n{found[0].shape}: ours over the smaller of a rival's times, now and {date}")
    columns = {
        "tokens": [str(c.tokens) for c in found],
        "rival": [c.rival for c in found],
        "now": ["" if c.now is None else _time(c.now) for c in found],
        date: ["" if c.dated is None else _time(c.dated) for c in found],
    }
    for name in rival_figures.OURS:
        columns[name] = [clock.shown(c.ours[name]) if name in c.ours else "" for c in found]
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    print_table(list(filled), list(zip(*filled.values(), strict=True)), sys.stdout)
    fastest = rival_figures.fastest(found)
    for name in rival_figures.OURS:
        cells = [c for c in fastest if name in c.ours]
        slower = [f"{c.tokens} ({clock.shown(c.ours[name])})" for c in cells if c.ours[name] > 1]
        if cells:
            where = f": tokens {', '.join(slower)}" if slower else ""
            print(f"{name}: a rival is faster in {len(slower)} of {len(cells)} cells{where}")


def _status(options: SimpleNamespace, found: _Found, show: _Tables) -> Exit:
    """Return the exit status, and say on stderr what was asked for and not done."""
    if found.wrong:
        return Exit.DIFFERENCE
    told = []
    never = [b for b in options.backend if b not in {m.backend for m in found.measurements}]
    if never:
        told.append(f"--backend {'; '.join(never)}: nothing was measured")
    elif not found.measurements:
        told.append("nothing was measured")
    elif options.compare is not None and not show.compared:
        told.append(f"--compare {options.compare}: it has none of the cases that were measured")
    for line in told:
        print(f"nvfp4-moe bench: {line}", file=sys.stderr)
    return Exit.NOT_RUN if told else Exit.DONE


def _ratio(key: Key, found: Mapping[Key, float]) -> str:
    return clock.shown(found[key]) if key in found else ""


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{clock.shown(seconds / size)} {unit}"
    return f"{clock.shown(seconds * 1e6)} us"
