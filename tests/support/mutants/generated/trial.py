"""Mutants tried in children of this process, each of which applies one and runs its probes.

A child starts with everything imported and every right answer known; a crash or a loop without an end
is its own. It stops at the first answer that is not right. On a GPU, which takes seconds to start, a
child tries several, one after the other. A mutant has as much time for each probe.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch

from . import cuda_state
from .apply import applied
from .rules import Generated

Probe = Callable[[], Iterator[str]]
"""Names of what was found wrong, as they are found."""


@dataclass(frozen=True)
class Result:
    mutant: Generated
    status: str  # "killed", "timed out" or "survived"
    by: str  # what saw it
    passed: tuple[float, ...]  # seconds of its probes until then, without the one that saw it


Given = tuple[Generated, Sequence[Probe]]
_WITHOUT_PROBES = 60.0
"""Seconds of a mutant that has none."""


@dataclass
class _Child:
    left: deque[Given]
    pid: int
    pipe: int
    start: float  # of the probe that is running
    passed: tuple[float, ...] = ()  # seconds of the probes that the first that is left has passed
    read: bytes = b""

    def results(self) -> Iterator[Result]:
        """Those that have been read."""
        while b"\n" in self.read:
            line, _, self.read = self.read.partition(b"\n")
            by = line.decode(errors="replace")
            if by == "+":
                self.passed += (self._lap(),)
            else:
                yield self.end("survived" if by == "-" else "killed", "" if by == "-" else by)

    def end(self, status: str, by: str = "") -> Result:
        """The result of the first that is left."""
        passed, self.passed = self.passed, ()
        self._lap()
        return Result(self.left.popleft()[0], status, by, passed)

    def _lap(self) -> float:
        before, self.start = self.start, time.monotonic()
        return self.start - before

    def limit(self, seconds: Callable[[Probe], float]) -> float:
        """Return the seconds of the probe that is running; those of the last one include its end."""
        probes = self.left[0][1]
        running = probes[len(self.passed) :] or probes[-1:]
        return seconds(running[0]) if running else _WITHOUT_PROBES

    def wait(self, *, kill: bool = False) -> None:
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        os.waitpid(self.pid, 0)


def run(
    mutants: Iterable[Given],
    *,
    jobs: int,
    seconds: Callable[[Probe], float],
    at_once: int = 1,
    on_gpu: bool = False,
    end: float = math.inf,
) -> Iterator[Result]:
    """The results, as they come. No child outlives the call.

    Args:
        seconds: of a probe; a mutant under which it takes longer has timed out.
        at_once: mutants that a child tries one after the other.
        on_gpu: the probes use a GPU.
        end: of `time.monotonic`, from which on there is no result: mutants that are tried then are not.

    Raises:
        cuda_state.InitializedError: `on_gpu`, and CUDA is initialized in this process before a fork.
    """
    children: dict[int, _Child] = {}
    try:
        yield from _run(mutants, children, jobs, seconds, at_once, on_gpu, end)
    finally:
        for child in children.values():
            child.wait(kill=True)


def _run(
    mutants: Iterable[Given],
    children: dict[int, _Child],
    jobs: int,
    seconds: Callable[[Probe], float],
    at_once: int,
    on_gpu: bool,
    end: float,
) -> Iterator[Result]:
    """Do what `run` does; `children` has those that have not ended."""
    again: deque[Given] = deque()  # of children that ended before
    more = iter(mutants)

    def waiting() -> Iterator[Given]:
        while given := again.popleft() if again else next(more, None):
            yield given

    while time.monotonic() < end:
        while len(children) < jobs and (some := deque(islice(waiting(), at_once))):
            child = _start(some, on_gpu)
            children[child.pipe] = child
        if not children:
            return
        ready, _, _ = select.select(list(children), [], [], 0.05)
        for pipe in ready:
            child = children[pipe]
            part = os.read(pipe, 1 << 16)
            child.read += part
            yield from child.results()
            if not part:
                del children[pipe]
                child.wait()
                if child.left and child.read != b"!":
                    yield child.end("killed", "the process ended")
                again += child.left
        for child in list(children.values()):
            if child.left and time.monotonic() - child.start > child.limit(seconds):
                del children[child.pipe]
                child.wait(kill=True)
                yield child.end("timed out")
                again += child.left


def check(
    probes: Iterable[tuple[str, Probe]],
    *,
    jobs: int,
    seconds: float,
    at_once: int = 1,
    on_gpu: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """Run probes on unchanged code, in children as mutants have.

    Returns:
        Seconds of each that finds nothing; what the others say, which are wrong.
    """
    unchanged = ((Generated("", "", "", name, 1, lambda: ""), [probe]) for name, probe in probes)
    took, wrong = {}, []
    children = {"jobs": jobs, "at_once": at_once, "on_gpu": on_gpu}
    for result in run(unchanged, seconds=lambda _: seconds, **children):
        name = result.mutant.change
        if result.status == "survived":
            (took[name],) = result.passed
        else:
            wrong.append(f"{name}, on unchanged code: {result.status} {result.by}")
    return took, wrong


def _start(some: deque[Given], on_gpu: bool) -> _Child:
    if on_gpu:
        cuda_state.check("before it forks")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            # The parent's other threads are not here: an operation would wait for them.
            torch.set_num_threads(1)
            _try(some, writing)
        finally:
            os._exit(0)
    os.close(writing)
    return _Child(some, pid, reading, time.monotonic())


def _try(some: Iterable[Given], pipe: int) -> None:
    """Write what is found, a line each.

    "+": a probe has ended; then what saw the mutant, or "-" where nothing did; "!": an early end.
    """
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for mutant, probes in some:
        by = " ".join(_first_wrong(mutant, probes, lambda: os.write(pipe, b"+\n")).split())
        os.write(pipe, by.encode()[:400] + b"\n")
        if not _gpu_works():
            os.write(pipe, b"!")
            return


def _first_wrong(mutant: Generated, probes: Sequence[Probe], accepted: Callable[[], object]) -> str:
    try:
        with applied(mutant) if mutant.file else nullcontext():
            for probe in probes:
                for wrong in probe():
                    return wrong
                accepted()
        return "-"
    except BaseException as error:  # whatever it is, the right code does not raise it
        return f"{type(error).__name__}: {error}"


def _gpu_works() -> bool:
    """True unless this process has used a GPU and a kernel has left it in an error."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
