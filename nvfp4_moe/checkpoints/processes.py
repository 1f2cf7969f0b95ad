"""Forked processes that share work, one for each core of the CPU.

Threads of one process would share Python's lock, which each of the quantizer's many short operations
takes again: on two cores 16 threads took twice the time of 2, with 340,000 context switches. They would
also share the kernel's lock of the process's memory.

Each process runs torch in one thread, as the workers of torch's DataLoader do, since torch's own threads
do not outlive a fork. A process ends when the one that forked it has ended, in whatever way.
"""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import os
import pickle
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch

T = TypeVar("T")
R = TypeVar("R")

POSSIBLE = sys.platform == "linux"
"""macOS can fork too, but its own libraries do not allow it."""
_AHEAD = 2
"""Items that a process has at a time: the next one is there when it has done one."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT, _LARGEST_KEPT = 1 << 28, 1 << 25


class Processes(Generic[T, R]):
    """Processes that are forked at once, and end with the context.

    Args:
        count: of processes; fewer are forked where the system allows no more.
        function: called in them, with what it refers to as it was when they were forked.

    Raises:
        OSError: the system refuses the first process.
    """

    def __init__(self, count: int, function: Callable[[T], R]):
        self._pids: dict[Connection, int] = {}
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that other threads hold: the functions here take none.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                for _ in range(count):
                    self._fork(function)
            except OSError:  # a limit of processes, of open files or of memory
                if not self._pids:
                    raise

    def _fork(self, function: Callable[[T], R]) -> None:
        ours, theirs = Pipe()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            try:
                # They close when the parent ends, if no other process has them.
                for pipe in (ours, *self._pids):
                    pipe.close()
                _serve(function, theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._pids[ours] = pid

    def __enter__(self) -> "Processes[T, R]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe, pid in self._pids.items():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # the caller's program may collect all children
                os.waitpid(pid, 0)
            pipe.close()
        self._pids.clear()

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """Call the function with each item; results come in the items' order.

        Raises:
            Exception: that of a call, in its turn.
            ChildProcessError: a process has ended.
        """
        waiting = deque(enumerate(items))
        running: dict[Connection, deque[int]] = {pipe: deque() for pipe in self._pids}
        done: dict[int, tuple[bool, Any]] = {}
        for _ in range(_AHEAD):
            for pipe, of_it in running.items():
                self._give(pipe, of_it, waiting)
        following = 0
        while busy := [pipe for pipe, of_it in running.items() if of_it]:
            for ready in cast(list[Connection], wait(busy)):
                try:
                    done[running[ready].popleft()] = ready.recv()
                except (EOFError, ConnectionError):
                    raise self._ended() from None
                self._give(ready, running[ready], waiting)
            while following in done:
                good, result = done.pop(following)
                if not good:
                    raise result
                yield result
                following += 1

    def _give(self, pipe: Connection, of_it: deque[int], waiting: deque[tuple[int, T]]) -> None:
        """Send the next item to a process, if there is one."""
        if not waiting:
            return
        number, item = waiting.popleft()
        try:
            pipe.send(item)
        except ConnectionError:
            raise self._ended() from None
        of_it.append(number)

    def _ended(self) -> ChildProcessError:
        return ChildProcessError(
            "a process that it forked was ended, as the system does where memory is short"
        )


def _serve(function: Callable[[T], R], pipe: Connection) -> None:
    """Call the function with what comes, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends this process
    torch.set_num_threads(1)
    _keep_freed_memory()
    with suppress(EOFError, ConnectionError):
        while True:
            item = pipe.recv()
            try:
                answer: tuple[bool, Any] = True, function(item)
            except Exception as e:
                answer = False, _sendable(e)
            pipe.send(answer)


def _sendable(error: Exception) -> Exception:
    """Return the error, or one with its text, if pickle does not take it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the next operation.

    It would give the end of the heap back after a large temporary, and the kernel would clear each page
    anew when the next one needs it: that took up to 0.8 of the quantizer's own time.
    """
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
