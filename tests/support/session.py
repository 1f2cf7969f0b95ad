"""A test session's workers and its summary; `conftest.py` has the hooks."""

# SPDX-License-Identifier: Apache-2.0
import functools
import os
from collections import Counter, defaultdict
from typing import Any

import torch

BACKENDS = {
    "gpu": "Triton on a GPU",
    "blackwell": "every backend on a GPU",
    "interpreter": "Triton in its interpreter",
    "compile": "Triton, compiled offline",
}
"""Markers, and whose tests they mark; the others are the reference's and the judge's."""
REST = "reference, adapters, judge"


def take_part(worker: int, workers: int) -> None:
    """Give this process a worker's share of the processors, and one of the GPUs.

    Sixteen workers of sixteen threads each took several times as long as sixteen of one.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    if len(gpus) > 1:  # torch asks for the variable when CUDA is first used
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]


@functools.cache
def has_gpu() -> bool:
    """Return True if this machine has a GPU that Triton's kernels run on."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def interpreting() -> bool:
    """Return True if this process runs Triton's kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def misplaced(marks: set[str]) -> str | None:
    """Return why a test of these marks cannot run in this process, None if it can."""
    if "interpreter" in marks and not interpreting():
        return "set TRITON_INTERPRET=1 to run the interpreter"
    if "compile" in marks and interpreting():
        return "Triton was imported under its interpreter"
    if marks & {"gpu", "blackwell"} and not has_gpu():
        return "no NVIDIA GPU of compute capability 8.0 or later here"
    return None


def summary(stats: dict[str, list[Any]]) -> list[str]:
    """Outcomes of the tests of each backend, and why tests were skipped."""
    outcomes: dict[str, Counter] = defaultdict(Counter)
    reasons: dict[str, Counter] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in stats.get(outcome, []):
            marks = getattr(report, "keywords", {})
            backend = next((name for mark, name in BACKENDS.items() if mark in marks), REST)
            outcomes[backend][outcome] += 1
            if outcome == "skipped":
                reasons[backend][report.longrepr[2].removeprefix("Skipped: ")] += 1
    lines = []
    for backend, counts in outcomes.items():
        found = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        lines.append(f"{backend}: {found}")
        lines += [f"    {n} skipped: {reason}" for reason, n in reasons[backend].items()]
    return lines
