"""Mutants tried in children of this process, each of which plants one and runs its probes.

A child starts with everything imported and every right answer known; a crash or a loop without an end
is its own. It stops at the first answer that is not right.
"""

# SPDX-License-Identifier: Apache-2.0
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .plant import plant
from .rules import Generated

Probe = Callable[[], Iterator[str]]
"""Names of what was found wrong, as they are found."""


@dataclass(frozen=True)
class Result:
    mutant: Generated
    status: str  # "killed", "timed out" or "survived"
    by: str  # what saw it
    seconds: float


@dataclass
class _Child:
    mutant: Generated
    pid: int
    pipe: int
    start: float


def run(
    mutants: Iterable[tuple[Generated, Sequence[Probe]]], *, jobs: int, seconds: float
) -> Iterator[Result]:
    """The results, as they come.

    Args:
        seconds: a child that takes longer has timed out.
    """
    waiting, children = iter(mutants), dict[int, _Child]()
    more = True
    while more or children:
        while more and len(children) < jobs:
            given = next(waiting, None)
            if given is None:
                more = False
            else:
                child = _start(*given)
                children[child.pipe] = child
        ready, _, _ = select.select(list(children), [], [], 0.05 if children else 0)
        for pipe in ready:
            yield _ended(children.pop(pipe))
        for child in list(children.values()):
            if time.monotonic() - child.start > seconds:
                os.kill(child.pid, signal.SIGKILL)
                del children[child.pipe]
                yield _ended(child, timed_out=True)


class WrongProbe(Exception):
    """A probe that finds fault with the code as it is."""


def check(name: str, probe: Probe, seconds: float) -> None:
    """Raise WrongProbe unless a probe finds nothing in unchanged code, in a child as mutants have."""
    unchanged = Generated("", "", "", f"nothing, {name}", 1, lambda: "")
    (result,) = run([(unchanged, [probe])], jobs=1, seconds=seconds)
    if result.status != "survived":
        raise WrongProbe(f"{name}, on unchanged code: {result.status} {result.by}")


def _start(mutant: Generated, probes: Sequence[Probe]) -> _Child:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            os.write(writing, _first_wrong(mutant, probes).encode()[:400])
        finally:
            os._exit(0)
    os.close(writing)
    return _Child(mutant, pid, reading, time.monotonic())


def _first_wrong(mutant: Generated, probes: Sequence[Probe]) -> str:
    """What saw the mutant; "-" where nothing did."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        if mutant.file:
            plant(mutant)
        for probe in probes:
            for wrong in probe():
                return wrong
    except BaseException as error:  # whatever it is, the right code does not raise it
        return f"{type(error).__name__}: {error}"
    return "-"


def _ended(child: _Child, *, timed_out: bool = False) -> Result:
    by = os.read(child.pipe, 400).decode(errors="replace")
    os.close(child.pipe)
    os.waitpid(child.pid, 0)
    took = round(time.monotonic() - child.start, 2)
    if timed_out:
        return Result(child.mutant, "timed out", "", took)
    if not by:
        return Result(child.mutant, "killed", "the process ended", took)
    return Result(
        child.mutant, "survived" if by == "-" else "killed", "" if by == "-" else by, took
    )
