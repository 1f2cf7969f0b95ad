"""Functions of this package called in several processes: compilation and the interpreter are slow."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

MOST = 16
"""Processes at a time, each of which imports torch."""


def call(function: str, jobs: list[tuple], **environment: str) -> list[Any]:
    """`function`, "module:name" in this package, of each job's arguments; one process a processor.

    Args:
        environment: variables that the processes have beside this one's.

    Raises:
        RuntimeError: a process failed; the message has the end of what it printed.
    """
    count = min(os.cpu_count() or 1, MOST, max(1, len(jobs)))
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for i in range(count):
            path = Path(folder) / f"{i}.pt"
            torch.save(jobs[i::count], path)
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, function, str(path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            children.append((child, path))
        results: list[Any] = [None] * len(jobs)
        for i, (child, path) in enumerate(children):
            printed, _ = child.communicate()
            if child.returncode:
                raise RuntimeError(f"a process of {function} failed:\n{printed[-2000:]}")
            results[i::count] = torch.load(path, weights_only=False)
    return results


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    file = Path(sys.argv[2])
    torch.save([function(*job) for job in torch.load(file, weights_only=False)], file)
