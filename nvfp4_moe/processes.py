"""Functions of this package called in several processes: compilation and the interpreter are slow."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

MOST = 16
"""Processes at a time, each of which imports torch."""
_ROOT = Path(__file__).resolve().parent.parent


def at_a_time(jobs: int) -> int:
    """How many processes work at these: one a processor."""
    return min(os.cpu_count() or 1, MOST, max(1, jobs))


def call(function: str, jobs: list[tuple], **environment: str) -> list[Any]:
    """`function`, "module:name" in this package, of each job's arguments; one process a processor.

    Args:
        environment: variables that the processes have beside this one's.

    Raises:
        RuntimeError: a process failed; the message has the end of what it printed.
    """
    count = at_a_time(len(jobs))
    results: list[Any] = [None] * len(jobs)
    with ThreadPoolExecutor(count) as pool:
        parts = pool.map(
            lambda i: call_in_one(function, jobs[i::count], _ROOT, **environment), range(count)
        )
        for i, part in enumerate(parts):
            results[i::count] = part
    return results


def call_in_one(
    function: str, jobs: list[tuple], root: Path = _ROOT, **environment: str
) -> list[Any]:
    """The same in one process.

    Args:
        root: the folder that this package, or the copy of it that is to be called, lies in.
    """
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([str(root), *map(os.path.abspath, inherited)])
    variables = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path, **environment}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.pt"
        torch.save(jobs, file)
        child = subprocess.run(
            [sys.executable, "-m", __name__, function, str(file)],
            cwd=root,  # `-m` looks there first
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if child.returncode:
            raise RuntimeError(f"a process of {function} failed:\n{child.stdout[-2000:]}")
        return torch.load(file, weights_only=False)


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    file = Path(sys.argv[2])
    torch.save([function(*job) for job in torch.load(file, weights_only=False)], file)
