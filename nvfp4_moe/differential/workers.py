"""Functions of this package called in several processes: compilation and the interpreter are slow.

No process outlives the call that it works for: an exception in this process, an interrupt among them,
ends them all, and each ends itself when this process has died.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

MOST = 16
"""Processes at a time, each of which imports torch."""
PATIENCE = 20.0
"""Seconds for a process that was told to end."""
_ROOT = Path(__file__).resolve().parents[2]
_running: set[subprocess.Popen] = set()
T = TypeVar("T")
R = TypeVar("R")


def at_a_time(jobs: int) -> int:
    """How many processes work at these: one a processor."""
    return min(os.cpu_count() or 1, MOST, max(1, jobs))


def side_by_side(function: Callable[[T], R], items: Iterable[T], count: int) -> list[R]:
    """`function` of each item in `count` threads, each of which waits for processes of its own.

    An exception ends all processes that run, and is raised.
    """
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            told: dict[subprocess.Popen, float] = {}
            while wait(futures, timeout=0.1).not_done:  # a thread may be starting another one
                for child in list(_running):
                    if child not in told:
                        told[child] = time.monotonic()
                        child.terminate()
                    elif time.monotonic() - told[child] > PATIENCE:
                        child.kill()
            raise


def run(
    command: Sequence[str], timeout: float | None = None, **options: Any
) -> tuple[int | None, str]:
    """A process, run to its end: (exit status, all that it printed).

    Args:
        timeout: seconds after which it is ended; the exit status is then None.
        options: of `subprocess.Popen`.
    """
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace", **options,
    )  # fmt: skip
    _running.add(child)
    try:
        printed, _ = child.communicate(timeout=timeout)
        return child.returncode, printed
    except subprocess.TimeoutExpired:
        _end(child)
        printed, _ = child.communicate()
        return None, printed
    finally:
        _end(child)
        _running.discard(child)


def _end(child: subprocess.Popen) -> None:
    """End a process, which has a while to end its own before it is killed."""
    child.terminate()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def call(function: str, jobs: list[tuple], **environment: str) -> list[Any]:
    """`function`, "module:name" in this package, of each job's arguments; one process a processor.

    Args:
        environment: variables that the processes have beside this one's.

    Raises:
        RuntimeError: a process failed; the message has the end of what it printed.
    """
    count = at_a_time(len(jobs))
    results: list[Any] = [None] * len(jobs)
    parts = side_by_side(
        lambda i: call_in_one(function, jobs[i::count], _ROOT, **environment), range(count), count
    )
    for i, part in enumerate(parts):
        results[i::count] = part
    return results


def call_in_one(
    function: str, jobs: list[tuple], root: Path = _ROOT, **environment: str
) -> list[Any]:
    """`call` in one process.

    Args:
        root: the folder that this package, or the copy of it that is to be called, lies in.
    """
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([str(root), *map(os.path.abspath, inherited)])
    variables = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path, **environment}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.pt"
        torch.save(jobs, file)
        command = [sys.executable, "-m", __name__, function, str(file), str(os.getpid())]
        status, printed = run(command, cwd=root, env=variables)  # `-m` looks in cwd first
        if status:
            raise RuntimeError(f"a process of {function} failed:\n{printed[-2000:]}")
        return torch.load(file, weights_only=False)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(f"nvfp4_moe.{module}"), name)
    file = Path(sys.argv[2])
    torch.save([function(*job) for job in torch.load(file, weights_only=False)], file)
