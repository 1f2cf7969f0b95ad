"""Functions called in child processes: compilation and Triton's interpreter are slow.

No child outlives the call that it works for. An exception in this process, an interrupt included, ends
every child, and a child ends itself when this process has ended.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
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

from ..console import progress

INTERPRETER = "triton (interpreter)"
"""The name of the Triton kernels that run in Triton's interpreter, as a backend of comparisons."""
MAX_WORKERS = 16
"""Child processes at a time, each of which imports torch."""
GRACE_SECONDS = 20.0
"""Seconds that a terminated child may take to end before it is killed."""
_POLL_SECONDS = 0.5
_ROOT = Path(__file__).resolve().parents[2]
_running: set[subprocess.Popen] = set()
T = TypeVar("T")
R = TypeVar("R")


def at_a_time(jobs: int) -> int:
    """Return the number of processes for so many jobs: at most one for each processor."""
    return min(os.cpu_count() or 1, MAX_WORKERS, max(1, jobs))


def side_by_side(
    function: Callable[[T], R],
    items: Iterable[T],
    count: int,
    poll: Callable[[], None] = lambda: None,
) -> list[R]:
    """Call `function` with each item, in `count` threads that each wait for processes of their own.

    An exception ends every process that runs, and is raised. `poll` is called twice a second.
    """
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in futures:
                while wait([future], _POLL_SECONDS).not_done:
                    poll()
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            terminated: dict[subprocess.Popen, float] = {}
            while wait(futures, timeout=0.1).not_done:  # a thread may be starting another one
                for child in list(_running):
                    if child not in terminated:
                        terminated[child] = time.monotonic()
                        child.terminate()
                    elif time.monotonic() - terminated[child] > GRACE_SECONDS:
                        child.kill()
            raise


def run(
    command: Sequence[str], timeout: float | None = None, **options: Any
) -> tuple[int | None, str]:
    """Run a process to its end; returns (exit status, everything that it printed).

    Args:
        timeout: seconds after which the process is ended; its exit status is then None.
        options: further arguments of `subprocess.Popen`.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        **options,
    )
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
    """Terminate a process and wait, so that it can end its own children; kill it if it does not end."""
    child.terminate()
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def call(
    function: Callable[..., R], jobs: Sequence[tuple[Any, ...]], **environment: str
) -> list[R]:
    """Call `function` with the arguments of each job, in one process for each processor.

    Each job that is done is a step of the bar that is open (`console.progress`).

    Args:
        function: a function at the top of a module, which a child imports by its name.
        environment: variables that the children have besides those of this process.

    Raises:
        RuntimeError: a child failed; the message has the end of what it printed.
    """
    count = at_a_time(len(jobs))
    results: list[Any] = [None] * len(jobs)
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps([Path(folder) / str(i) for i in range(count)])
        shares = side_by_side(
            lambda i: call_in_one(function, jobs[i::count], _ROOT, steps.files[i], **environment),
            range(count),
            count,
            steps.poll,
        )
    for i, share in enumerate(shares):
        results[i::count] = share
    return results


class Steps:
    """The progress of child processes: each adds a byte to its file for each job that it has done."""

    def __init__(self, files: list[Path]):
        self.files = files
        self._seen = 0

    def poll(self) -> None:
        """Count what is new as steps of this process's bar."""
        done = sum(file.stat().st_size for file in self.files if file.exists())
        progress.step(done - self._seen)
        self._seen = done


def call_in_one(
    function: Callable[..., R],
    jobs: Sequence[tuple[Any, ...]],
    root: Path = _ROOT,
    steps: Path | None = None,
    **environment: str,
) -> list[R]:
    """Call `function` with the arguments of each job, in one process.

    Args:
        root: the folder that has the package, or the copy of it whose `function` is called.
        steps: a file that gets a byte for each job that is done.

    Raises:
        RuntimeError: as for `call`.
    """
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([str(root), *map(os.path.abspath, inherited)])
    variables = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path, **environment}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.pt"
        torch.save((function, list(jobs)), file)  # the function as its module's and its own name
        command = [sys.executable, "-m", __name__, str(file), str(os.getpid())]
        command += [] if steps is None else [str(steps)]
        status, printed = run(command, cwd=root, env=variables)  # `-m` looks in cwd first
        if status:
            name = f"{function.__module__}.{function.__qualname__}"
            raise RuntimeError(f"a process of {name} failed:\n{printed[-2000:]}")
        return torch.load(file, weights_only=False)


def interpreter_refusal() -> str | None:
    """Return why no Triton kernel can be interpreted here; None if they can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def call_interpreted(function: Callable[..., R], jobs: Sequence[tuple[Any, ...]]) -> list[R]:
    """Run `call` with Triton's interpreter on: the results of the Triton kernels without a GPU.

    Triton reads TRITON_INTERPRET when it is imported, so the kernels need processes of their own.
    """
    return call(function, jobs, TRITON_INTERPRET="1")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    file = Path(sys.argv[1])
    function, jobs = torch.load(file, weights_only=False)
    if sys.argv[3:]:
        progress.count_into(Path(sys.argv[3]))
    results = []
    for job in jobs:
        results.append(function(*job))
        progress.step()
    torch.save(results, file)
