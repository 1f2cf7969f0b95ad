"""`nvfp4-moe fuzz-bounds`: judge random runs that keep the contract; an alarm is a false one.

Each seed is a call (`cases.fuzz`), run in some ways that keep the contract (`differential.fuzz`).
"""

# SPDX-License-Identifier: Apache-2.0
import math
import shlex
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ..console import progress
from ..differential import workers
from ..differential.fuzz import JudgedRun, judged
from ..exits import Exit
from ..report import invocation
from .output import Result

_SHOWN = 20


@dataclass
class Tally:
    """Counts of what was judged, and the alarms."""

    seeds: int = 0
    runs: Counter[str] = field(default_factory=Counter)  # by way
    outputs: int = 0
    values: int = 0  # outputs, and what stages handed on
    single: int = 0
    infinite: int = 0  # with an end that is infinite, and something claimed
    nan: int = 0
    unknown: int = 0
    widths: int = 0  # finite ones
    width: float = 0.0  # sum of their binary logarithms, relative to the magnitude
    alarms: list[str] = field(default_factory=list)

    def add(self, seed: int, replay: str, one: JudgedRun) -> None:
        allowed, got = one.allowed, one.got
        wrong, unknown, single = ~allowed.contains(got), allowed.unknown, allowed.single
        infinite = (allowed.low.isinf() | allowed.high.isinf()) & ~unknown
        wide = ~single & allowed.low.isfinite() & allowed.high.isfinite()
        relative = (allowed.high - allowed.low) / allowed.magnitude
        width = torch.where(wide, relative, 1.0).log2().sum()
        counts = (wrong, single, infinite, allowed.nan, unknown, wide)
        sums = torch.stack([*(c.sum().double() for c in counts), width]).tolist()
        bad, singles, infinities, nans, unknowns, wides = map(int, sums[:-1])
        self.single, self.infinite = self.single + singles, self.infinite + infinities
        self.nan, self.unknown = self.nan + nans, self.unknown + unknowns
        self.widths, self.width = self.widths + wides, self.width + sums[-1]
        self.values += got.numel()
        if one.stage == "output":
            self.runs[one.way] += 1
            progress.step()
            self.outputs += got.numel()
        if bad:
            at = tuple(wrong.nonzero()[0].tolist())
            low, high = (end[at].item() for end in (allowed.low, allowed.high))
            self.alarms.append(
                f"seed {seed}, {one.way}: {bad} of {got.numel()} of {one.stage} outside, first at {at}: "
                f"{got[at].item():.9g}, allowed {low:.9g} to {high:.9g}; {replay}"
            )

    def merge(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self) -> str:
        of = max(self.values, 1)
        shares = (
            f"{share / of:.2%} {what}"
            for share, what in (
                (self.single, "of one value"),
                (self.infinite, "finite or infinite"),
                (self.nan, "NaN"),
                (self.unknown, "open"),
            )
        )
        width = 2.0 ** (self.width / self.widths) if self.widths else math.nan
        return (
            f"{sum(self.runs.values())} runs of {self.seeds} calls, {self.outputs} outputs and "
            f"{self.values - self.outputs} values of stages judged: {len(self.alarms)} false alarms\n"
            f"intervals: {', '.join(shares)}; the others are {width:.1e} of their magnitude wide\n"
            "runs: " + ", ".join(f"{way} {n}" for way, n in sorted(self.runs.items()))
        )


def part(seed: int, step: int, runs: int, seconds: float, settings: dict[str, Any]) -> Tally:
    """Judge the seeds seed, seed + step, ... until there are so many runs, or so much time is over."""
    torch.set_num_threads(1)
    until, tally = time.monotonic() + seconds, Tally()
    while sum(tally.runs.values()) < runs and time.monotonic() < until:
        replay = "again: " + replay_command(seed, settings)
        try:
            for one in judged(seed, **settings):
                tally.add(seed, replay, one)
        except Exception as error:  # a run that cannot be judged is no less wrong
            where = traceback.extract_tb(error.__traceback__)[-1]
            tally.alarms.append(
                f"seed {seed}: {type(error).__name__} in {where.name}: {error}; {replay}"
            )
        tally.seeds += 1
        seed += step
        if len(tally.alarms) > 50 * _SHOWN:
            break
    return tally


def replay_command(seed: int, settings: dict[str, Any]) -> str:
    """The command that judges one seed again."""
    words = [*invocation.program(), "fuzz-bounds", "--seed", str(seed), "--runs", "1"]
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value not in (None, False):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def run(options: SimpleNamespace) -> Result:
    names = ("tokens", "ways", "kinds", "device", "triton")
    settings = {name: getattr(options, name) for name in names}
    count, tally = max(1, options.processes), Tally()
    each = -(-options.runs // count)
    jobs = [(options.seed + i, count, each, options.seconds, settings) for i in range(count)]
    start = time.monotonic()
    with progress.bar("runs", options.runs):
        for done in [part(*jobs[0])] if count == 1 else workers.call(part, jobs):
            tally.merge(done)
    print(tally)
    print(f"{time.monotonic() - start:.0f} seconds; seeds from {options.seed} on")
    for alarm in tally.alarms[:_SHOWN]:
        print(f"  FALSE ALARM {alarm}")
    missing = sum(tally.runs.values()) < options.runs
    if options.triton and not tally.runs["triton"]:
        print("Triton's kernels were not run")
        missing = True
    if missing:
        print(f"fewer runs than the {options.runs} that were asked for")
    status = Exit.DIFFERENCE if tally.alarms else Exit.NOT_RUN if missing else Exit.DONE
    return Result(status, asdict(tally))
