"""`python -m mutants`: try every mutant, and see which criterion finds which."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO, TypeVar

import torch

from nvfp4_moe.differential import workers
from nvfp4_moe.differential.conforming import CONFORMING, Setting, conforms, perform
from nvfp4_moe.differential.stages import Call, Run, judge
from nvfp4_moe.reference.moe.layer import Stages

from . import edited_copy
from .generated import command as generated
from .kept import Kept
from .kernel_calls import CALLS, prepared
from .kernel_mutants import KERNEL_MUTANTS
from .reference_mutants import EVERY_SETTING, MUTANTS, Mutant

Tensor = torch.Tensor


def _flashinfer(got: Tensor, want: Tensor) -> bool:
    """Its `check_accuracy` of the FP4 MoE: atol 0.1, rtol 0.85 for 92.5 % of the elements."""
    return bool(torch.isclose(got, want, rtol=0.85, atol=0.1).double().mean() >= 0.925)


def _cute_dsl(got: Tensor, want: Tensor) -> bool:
    """Its tests': max(0.05, 1.5 sigma) or 50 % for 97 %."""
    difference = (got - want).abs()
    near = difference <= max(0.05, 1.5 * float(want.std()))
    return bool((near | (difference <= 0.5 * want.abs())).double().mean() >= 0.97)


def _cosine(got: Tensor, want: Tensor) -> bool:
    return bool(torch.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.99)


def _close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-2, atol=1e-2)


CRITERIA: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "FlashInfer": _flashinfer,
    "CuTe-DSL": _cute_dsl,
    "cosine .99": _cosine,
    "rtol 1e-2": _close,
}
"""Functions that accept an output, fp64, given the right one."""
OURS = ("stage", "interval")


@dataclass(frozen=True)
class Outcome:
    """A mutant, and for each criterion if it saw the mutant on any of the seeds."""

    mutant: Mutant
    first: str | None  # the stage that was named
    seen: dict[str, bool]


def try_mutant(mutant: Mutant, calls: Sequence[tuple[Call, Run]]) -> Outcome:
    """Judge a mutant by every criterion on calls of its setting, each with a right run."""
    first: str | None = None
    seen = dict.fromkeys((*OURS, *CRITERIA), False)
    for call, right in calls:
        run = mutant.run(call)
        verdict = judge(call, run)
        first = first or verdict.first
        seen["stage"] |= verdict.first is not None
        seen["interval"] |= verdict.outside > 0
        got, want = run.result.output.double(), right.result.output.double()
        for name, accepts in CRITERIA.items():
            seen[name] |= not accepts(got, want)
    return Outcome(mutant, first, seen)


@dataclass(frozen=True)
class Catalogue:
    """The mutants that the command tries, and the runs that it must accept."""

    mutants: Sequence[Mutant] = MUTANTS
    settings: Mapping[str, Setting] = field(default_factory=lambda: EVERY_SETTING)
    conforming: Mapping[str, Stages] = field(default_factory=lambda: CONFORMING)
    kernel_mutants: Sequence[edited_copy.KernelMutant] = KERNEL_MUTANTS
    kernel_calls: Sequence[str] = tuple(CALLS)


def try_mutants(
    mutants: Sequence[Mutant], seeds: int = 3, kept: Kept | None = None
) -> list[Outcome]:
    """Every mutant on `seeds` calls of its setting."""
    kept = kept or Kept()

    @functools.cache
    def calls(setting: str) -> list[tuple[Call, Run]]:
        made = [EVERY_SETTING[setting].call(seed) for seed in range(seeds)]
        return [(call, perform(call, Stages())) for call in made]

    def find(mutant: Mutant) -> tuple[str | None, dict[str, bool]]:
        outcome = try_mutant(mutant, calls(mutant.setting))
        return outcome.first, outcome.seen

    asked = {m: f"mutant {m.name}, {m.setting}, {seeds} seeds, {kept.source}" for m in mutants}
    return [Outcome(m, *kept.ask(asked[m], functools.partial(find, m))) for m in mutants]


@dataclass(frozen=True)
class KernelOutcome:
    """A mistake in a Triton kernel, and for each criterion if it saw the mistake."""

    mutant: edited_copy.KernelMutant
    seen: dict[str, bool]


def try_kernels(
    mutants: Sequence[edited_copy.KernelMutant], kept: Kept | None = None
) -> list[KernelOutcome]:
    """Every mutant of the kernels on its call, in the interpreter."""

    def find(run: edited_copy.Tried) -> dict[str, bool]:
        allowed, answer = prepared(run[1])[1], edited_copy.answer(*run)
        got = allowed.values(answer)
        seen = {name: not accepts(got, allowed.right) for name, accepts in CRITERIA.items()}
        return {"interval": not allowed.accepts(answer)} | seen

    found = _of_kernels([(m, m.call) for m in mutants], find, kept)
    return [KernelOutcome(m, seen) for m, seen in zip(mutants, found, strict=True)]


def kernels_as_they_are(calls: Sequence[str], kept: Kept | None = None) -> list[str]:
    """The calls on which the kernels without a mistake are not accepted."""

    def find(run: edited_copy.Tried) -> bool:
        return bool(prepared(run[1])[1].accepts(edited_copy.answer(*run)))

    accepted = _of_kernels([(None, call) for call in calls], find, kept)
    return [
        f"the kernels, {call}" for call, right in zip(calls, accepted, strict=True) if not right
    ]


T = TypeVar("T")


def _of_kernels(
    runs: Sequence[edited_copy.Tried], find: Callable[[edited_copy.Tried], T], kept: Kept | None
) -> list[T]:
    """Ask of each run what `find` returns, a process a processor at a time.

    Raises:
        RuntimeError: some have no answer; the message names each. All others are kept.
    """
    kept = kept or Kept()

    def asked(run: edited_copy.Tried) -> str:
        return f"kernels {run}, {kept.source_of_kernels}"

    def ask(run: edited_copy.Tried) -> T:
        return kept.ask(asked(run), lambda: find(run))

    missing = [run for run in runs if asked(run) not in kept]
    for call in sorted({call for _, call in missing}):
        prepared(call)
    failed: list[str] = []

    def try_one(run: edited_copy.Tried) -> None:
        try:
            ask(run)
        except (RuntimeError, ValueError) as error:
            failed.append(str(error))

    workers.side_by_side(try_one, missing, workers.at_a_time(len(missing)))
    if failed:
        raise RuntimeError("\n".join(failed))
    return [ask(run) for run in runs]


def false_alarms(
    runs: int,
    settings: Mapping[str, Setting],
    conforming: Mapping[str, Stages],
    kept: Kept | None = None,
) -> tuple[int, list[str]]:
    """Return how many conforming runs were judged, at least `runs`, and those that were not accepted."""
    kept = kept or Kept()
    done, alarms, seed = 0, [], 0
    while done < runs:
        for setting in settings.values():
            names = [name for name in conforming if conforms(name, setting)]
            find = functools.partial(_alarms, setting, seed, names, conforming)
            alarms += kept.ask(f"{setting.name}, seed {seed}: {names}, {kept.source}", find)
            done += len(names)
        seed += 1
    return done, alarms


def _alarms(
    setting: Setting, seed: int, names: Sequence[str], conforming: Mapping[str, Stages]
) -> list[str]:
    """Return what is said of conforming runs of a call that are not accepted."""
    call = setting.call(seed)
    verdicts = {name: judge(call, perform(call, conforming[name])) for name in names}
    return [
        f"{setting.name}, seed {seed}, {name}: {verdict}"
        for name, verdict in verdicts.items()
        if verdict.first or verdict.outside
    ]


_HEAD = """\
# Mutants, and which criterion sees them

Made by `make mutants-table`, on a CPU. Each mutant puts one mistake into a run of the reference, on
inputs scaled down from the benchmark's layers; a criterion sees it if it rejects the output on any of
the seeds. Ours names the first stage that differs, given what the run itself handed to it
(`nvfp4_moe/differential/stages.py`), and, of an implementation that shows nothing but its output, says
whether that leaves the proved interval (`reference/bounds/moe.py`). The others: FlashInfer's (atol 0.1,
rtol 0.85, 92.5 % of the elements), its CuTe-DSL tests' (max(0.05, 1.5 sigma) or 50 %, 97 %), a cosine
over 0.99, and `allclose(rtol=1e-2, atol=1e-2)`. What no output shows (a scale off by an ulp, a zero's
sign) differs in its stage's bits alone.
"""

_KERNELS_HEAD = """
## In the Triton kernels

Each mistake is an edit of the source (`tests/support/mutants/kernel_mutants.py`) of a copy of the
package, whose kernels run in Triton's interpreter on a small call. Ours is the interval, for the
quantizer's calls every bit of codes, block scales and per-token scales, and where all sums are
exact every bit of the output. The others look at a fused call's output, and at the values of what the
quantizer wrote.
"""


def run(options: argparse.Namespace, catalogue: Catalogue) -> int:
    if options.generated:
        return generated.run(options)
    show = _markdown if options.markdown else _text
    kept = Kept(options.resume)
    outcomes = try_mutants(catalogue.mutants, options.seeds, kept)
    done, alarms = false_alarms(options.conforming, catalogue.settings, catalogue.conforming, kept)
    if options.markdown:
        print(_HEAD)
    show(_rows(outcomes), sys.stdout)
    wrong = any(o.first != o.mutant.stage for o in outcomes)
    if options.kernels:
        try:
            in_kernels = try_kernels(catalogue.kernel_mutants, kept)
            alarms += kernels_as_they_are(catalogue.kernel_calls, kept)
        except RuntimeError as error:
            print(f"mutants: error: {error}", file=sys.stderr)
            return 1
        done += len(catalogue.kernel_calls)
        print(_KERNELS_HEAD if options.markdown else "\nIn the Triton kernels:")
        show(_kernel_rows(in_kernels), sys.stdout)
        wrong |= not all(o.seen["interval"] for o in in_kernels)
    print(f"\n{done} conforming runs: {len(alarms)} false alarms")
    for alarm in alarms:
        print(f"  FALSE ALARM {alarm}")
    return 1 if alarms or wrong else 0


def totals(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Count the mutants that each criterion saw."""
    return {name: sum(o.seen[name] for o in outcomes) for name in (*OURS, *CRITERIA)}


def _rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    names = (*OURS[1:], *CRITERIA)
    rows = [["mutant", "setting", "ours: first stage", "ours: output", *CRITERIA]]
    for o in outcomes:
        named = o.first or "NOT SEEN"
        if o.first not in (None, o.mutant.stage):
            named += f" (its fault is in {o.mutant.stage})"
        rows.append(
            [o.mutant.name, o.mutant.setting, named]
            + ["seen" if o.seen[name] else "-" for name in names]
        )
    count = totals(outcomes)
    last = [f"seen, of {len(outcomes)}", "", *(str(count[name]) for name in (*OURS, *CRITERIA))]
    return [*rows, last]


def _kernel_rows(outcomes: Sequence[KernelOutcome]) -> list[list[str]]:
    names = (OURS[1], *CRITERIA)
    rows = [["mutant", "file", "call", "ours", *CRITERIA]]
    for o in outcomes:
        cells = ["seen" if o.seen[name] else "-" for name in names]
        if not o.seen[names[0]]:
            cells[0] = "NOT SEEN"
        rows.append([o.mutant.name, o.mutant.file, o.mutant.call, *cells])
    count = [str(sum(o.seen[name] for o in outcomes)) for name in names]
    return [*rows, [f"seen, of {len(outcomes)}", "", "", *count]]


def _text(rows: Sequence[list[str]], stream: TextIO) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=stream)


def _markdown(rows: Sequence[list[str]], stream: TextIO) -> None:
    head, *rest = rows
    for row in (head, ["---"] * len(head), *rest):
        print("| " + " | ".join(row) + " |", file=stream)
