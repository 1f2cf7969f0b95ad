"""`--generated`: try the mutants made by rule, and go on where the last call ended."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import quick_interpreter
import triton

from nvfp4_moe.console import progress
from nvfp4_moe.kernels.triton_target import INTERPRETING
from nvfp4_moe.reference import recipe

from ..edited_copy import KERNELS
from . import cuda_state, executed, harmless, trial
from .results import Results
from .rules import Generated, generate

REFERENCE = Path(recipe.__file__).resolve().parent
SECONDS = {"reference": 60.0, "cpu": 150.0, "cuda": 90.0, "compile": 300.0}
"""After which a mutant has timed out, of each probe, at most."""
LEAST_SECONDS, TIMES = 20.0, 5
"""A probe has these, and as many times as long as it takes on unchanged code."""
AT_ONCE = {"cpu": 1, "cuda": 16, "compile": 1}
"""Mutants that a process tries one after the other, at most: it takes seconds to start a GPU."""


def every(which: str) -> list[Generated]:
    """All mutants of the reference, or of the kernels."""
    from . import kernel_probes, reference_probes

    folder, files = (
        (REFERENCE, reference_probes.OF_FILE)
        if which == "reference"
        else (KERNELS, kernel_probes.OF_FILE)
    )
    return [
        mutant
        for file in files
        for mutant in generate(
            file, (folder / file.split("/", 1)[1]).read_text("utf-8"), jitted=which == "kernels"
        )
    ]


def probes_of(mutant: Generated, device: str) -> dict[str, trial.Probe]:
    """Return the probes of a mutant, by name."""
    return _named_probes(mutant.file, device)


@functools.cache
def _named_probes(file: str, device: str) -> dict[str, trial.Probe]:
    from . import kernel_probes, reference_probes

    if file.startswith("reference/"):
        return {name: reference_probes.probe(name) for name in reference_probes.OF_FILE[file]}
    if device == "compile":
        from . import compiled

        return compiled.probes(file)
    found = {}
    for name in kernel_probes.asked(file, device):
        found[name] = kernel_probes.probe(name, device)
        if device == "cuda":
            cuda_state.check(f"since it computed the right answers of the probe {name!r}")
    return found


class Order:
    """Which probe comes first: that which saw the last mutant of the function, then the quickest.

    Args:
        took: seconds, by probe; others are left out.
        lines: what each executes; probes that do not execute what a mutant changes are left out.
    """

    def __init__(self, took: dict[str, float], lines: dict[str, executed.Lines] | None = None):
        self._took, self._lines = took, lines or {}
        self._asked: dict[Generated, list[str]] = {}
        self._saw: dict[tuple[str, str], list[str]] = {}  # by function, the last first

    def probes(self, mutant: Generated, device: str) -> list[trial.Probe]:
        probes = {
            name: probe
            for name, probe in probes_of(mutant, device).items()
            if name in self._took
            and (name not in self._lines or executed.executes(self._lines[name], mutant))
        }
        saw = self._saw.get((mutant.file, mutant.function), [])
        names = [n for n in saw if n in probes]
        names += [n for n in sorted(probes, key=self._took.__getitem__) if n not in names]
        self._asked[mutant] = names
        return [probes[name] for name in names]

    def learn(self, result: trial.Result) -> None:
        if result.status != "survived":
            by = self._asked[result.mutant][len(result.passed)]
            saw = self._saw.setdefault((result.mutant.file, result.mutant.function), [])
            saw[:] = [by, *(name for name in saw if name != by)]


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 if every mutant that was tried is caught, or known to be harmless; else 1.

    1 too if a probe finds fault with the code as it is; such a probe is left out. 1 too if CUDA is
    initialized in this process, which then can try nothing on a GPU.
    """
    both = {which: every(which) for which in ("reference", "kernels")}
    results = Results(options.results, [m for mutants in both.values() for m in mutants])
    for path in options.merge:
        results.merge(path)
    if options.generated == "report":
        results.write()
        print(report(both["reference"] + both["kernels"], results))
        return 0
    if _is_interpreted(options) and not INTERPRETING:
        variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.run(
            [sys.executable, "-m", "mutants", *sys.argv[1:]], env=variables
        ).returncode
    if _is_interpreted(options):
        quick_interpreter.install()
    mutants = [m for m in both[options.generated] if any(text in m.shown for text in options.only)]
    try:
        wrong = _try(mutants, results, options)
    except cuda_state.InitializedError as error:
        print(f"mutants: error: {error}", file=sys.stderr)
        return 1
    text, still = summary(mutants, results)
    print(text)
    return 1 if still or wrong else 0


def _is_interpreted(options: argparse.Namespace) -> bool:
    return bool(options.generated == "kernels" and options.device == "cpu")


def _try(mutants: Sequence[Generated], results: Results, options: argparse.Namespace) -> list[str]:
    """Try those that wait and have a probe that runs on the device; what wrong probes say.

    Those that are expected to survive come last, with the probes that they alone need.
    """
    first, count = (int(part) for part in options.shard.split("/"))
    device = options.device
    waiting = [m for m in mutants[first - 1 :: count] if _waits(m, results, device, options.again)]
    on_gpu = options.generated == "kernels" and device == "cuda"
    if on_gpu:
        cuda_state.check("before its first probe")
    start = time.monotonic()
    waiting.sort(key=functools.partial(_place, results=results, device=device))
    end = start + (options.seconds or float("inf"))
    trials = _Trials(results, options, on_gpu, end)
    with _own_cache():
        for expected in (False, True):
            some = [m for m in waiting if _survives(m, results, device) is expected]
            if time.monotonic() < end:
                trials.run(some)
    left = sum(bool(probes_of(m, device)) for m in waiting) - trials.tried
    print(f"{trials.tried} tried in {time.monotonic() - start:.0f} s, {left} left")
    return trials.wrong


@contextmanager
def _own_cache() -> Iterator[None]:
    """Let Triton compile everything anew within: the time of a probe includes its compilation."""
    # An assembler may write a moment longer than the process that started it and was ended.
    made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with made as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


class _Trials:
    """Trials of mutants on a device until a time, and what is known of the probes since the first."""

    def __init__(self, results: Results, options: argparse.Namespace, on_gpu: bool, end: float):
        self.tried, self.wrong = 0, list[str]()
        self._results, self._device, self._end = results, options.device, end
        self._is_interpreted = _is_interpreted(options)
        self._children = {"jobs": options.jobs, "on_gpu": on_gpu}
        self._limit = SECONDS["reference" if options.generated == "reference" else options.device]
        self._checked: set[str] = set()
        self._took: dict[str, float] = {}
        self._lines: dict[str, executed.Lines] = {}
        self._order = Order(self._took, self._lines)

    def run(self, mutants: Sequence[Generated]) -> None:
        """Check the probes of some mutants on unchanged code, and try these."""
        probes = {
            name: probe for m in mutants for name, probe in probes_of(m, self._device).items()
        }
        self._check({name: p for name, p in probes.items() if name not in self._checked})
        waiting = [m for m in mutants if self._took.keys() & probes_of(m, self._device).keys()]
        given = ((m, self._order.probes(m, self._device)) for m in waiting)
        limits = {
            probes[name]: min(self._limit, LEAST_SECONDS + TIMES * t)
            for name, t in self._took.items()
            if name in probes
        }
        written = time.monotonic()
        trials = trial.run(
            given,
            seconds=limits.__getitem__,
            at_once=self._at_once(len(waiting)),
            end=self._end,
            **self._children,
        )
        try:
            for result in _counted(trials, len(waiting)):
                self._take(result)
                if time.monotonic() - written > 20:
                    self._results.write()
                    written = time.monotonic()
        finally:
            self._results.write()

    def _at_once(self, count: int) -> int:
        """Return how many a process tries: few enough that at the end all have some."""
        return max(1, min(AT_ONCE[self._device], count // (2 * self._children["jobs"])))

    def _check(self, probes: dict[str, trial.Probe]) -> None:
        self._checked |= probes.keys()
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder, str(i)) for i, name in enumerate(probes)}
            asked = {
                name: executed.recording(p, paths[name]) if self._is_interpreted else p
                for name, p in probes.items()
            }
            took, wrong = trial.check(
                asked.items(),
                seconds=2 * self._limit,
                at_once=self._at_once(len(asked)),
                **self._children,
            )
            self._took |= took
            if self._is_interpreted:
                self._lines |= {name: executed.read(paths[name]) for name in took}
        self.wrong += wrong
        for said in wrong:
            print(f"WRONG PROBE {said}", flush=True)

    def _take(self, result: trial.Result) -> None:
        self.tried += 1
        self._order.learn(result)
        if self._device == "compile" and not _is_decided(result):
            return
        self._results.add(result.mutant, self._device, result.status)
        if result.status == "survived" and harmless.reason(result.mutant.key) is None:
            progress.note(f"SURVIVED {result.mutant.shown}")


def _is_decided(result: trial.Result) -> bool:
    """Return True if compilation alone shows what becomes of a mutant."""
    from . import compiled

    return result.status != "timed out" and not result.by.startswith(compiled.WAITS)


def _survives(mutant: Generated, results: Results, device: str) -> bool:
    """Return True if a mutant is known to be harmless, or no probe of a GPU can see it."""
    same_code = device == "cuda" and results.of(mutant).get("compile") == "survived"
    return same_code or harmless.reason(mutant.key) is not None


def _counted(results: Iterable[trial.Result], total: int) -> Iterator[trial.Result]:
    """Show the progress on a terminal, without a thread: a trial is a fork of this process."""
    with progress.shown_on(sys.stderr), progress.bar("mutants", total, threads=False):
        for result in results:
            yield result
            progress.step()


def _place(mutant: Generated, results: Results, device: str) -> tuple[bool, bool, bool, int]:
    """Return what puts mutants in order: the least is tried first.

    First those that are not expected to survive, then those that the device has not tried, then those
    that survived elsewhere. Those that survive take all probes: those of few probes come first.
    """
    found, survives = results.of(mutant), _survives(mutant, results, device)
    probes = len(probes_of(mutant, device)) if survives else 0
    return survives, device in found, not found, probes


def _waits(mutant: Generated, results: Results, device: str, again: bool) -> bool:
    """Return True if it has neither been caught anywhere nor, unless `again`, survived here.

    Of Triton's kernels those that are open are compiled alone: the interpreter tries the others.
    """
    found = results.of(mutant)
    if device == "compile" and results.status(mutant) != "open" and not _is_of_gluon(mutant.file):
        return False
    return set(found.values()) <= {"survived"} and (again or device not in found)


def _is_of_gluon(file: str) -> bool:
    from . import compiled

    return compiled.is_of_gluon(file)


COLUMNS = ("killed", "timed out", "harmless", "open", "not tried")


def summary(mutants: Sequence[Generated], results: Results) -> tuple[str, list[str]]:
    """(a table by module, the mutants that are open)."""
    counts: dict[str, Counter[str]] = {}
    for mutant in mutants:
        counts.setdefault(mutant.file, Counter())[results.status(mutant)] += 1
    rows = [["module", "generated", *COLUMNS]]
    counts["all"] = sum(counts.values(), Counter())
    for file, count in counts.items():
        rows.append([file, str(sum(count.values())), *(str(count[s]) for s in COLUMNS)])
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    still = [m.shown for m in mutants if results.status(m) == "open"]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest]), still


_HEAD = """\
## Made by rule

`make mutants` also makes small changes of every function of the reference and of the Triton kernels
(`tests/support/mutants/generated/rules.py`): a rounding left out, a constant moved by one or by an ulp,
a comparison made strict or not, an operator exchanged, an index moved by one. Each is *killed* by an
answer that is not the unchanged reference's, to the bit where the contract determines it, else outside
of its interval; or by an error; it *timed out*; it is *harmless*, for a reason that is written down
(`harmless.py` and what it imports); or it is *open*: nothing saw it, and nobody has shown that it keeps
the contract. Kernels are tried in the interpreter and on a GPU. Those of the quantizer and the functions
of `kernels/jit/` also take a GPU's paths in the interpreter, which does what their instructions do
(`assembly.py`). The Gluon kernels of `kernels/moe/hopper/` run on sm_90 alone: what neither such a GPU
nor the compilation for it (`make mutants-compiled`) has decided is *not tried*. A mutant that does not
compile is killed. A mutant that waits without end, as one of a barrier may, is killed and has timed out.
What has been tried is in `results.txt` beside the rules, and is tried again once the function changes.
"""


def report(mutants: Sequence[Generated], results: Results) -> str:
    """Report the results of all generated mutants, as docs/mutants.md has them."""
    text, still = summary(mutants, results)
    listed = "\n".join(f"- `{shown}`" for shown in still) or "None."
    return f"{_HEAD}\n{text}\n\nOpen:\n\n{listed}"
