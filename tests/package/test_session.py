"""A test session shares the machine, and ends with a summary."""

# SPDX-License-Identifier: Apache-2.0
import os
from types import SimpleNamespace

import pytest
import session
import torch


@pytest.mark.parametrize(
    "visible,expected", [(None, ["0", "1", "2", "0"]), ("5,7", ["5", "7", "5", "7"])]
)
def test_workers_take_turns_at_the_gpus(visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for worker, gpu in enumerate(expected):
        with monkeypatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if visible:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            session.take_part(worker, 4)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


def test_workers_share_the_processors(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for workers in (1, 5, 16, 40):
        session.take_part(0, workers)
    assert given == [16, 3, 1, 1]


def test_the_summary_is_by_backend_with_the_reasons():
    def report(*marks, why=""):
        return SimpleNamespace(
            keywords=dict.fromkeys(marks, 1), longrepr=("f", 1, f"Skipped: {why}")
        )

    stats = {
        "passed": [report("interpreter"), report(), report()],
        "failed": [report("gpu")],
        "skipped": [report("gpu", why="no GPU"), report("gpu", why="no GPU"), report(why="slow")],
    }
    assert session.summary(stats) == [
        "Triton in its interpreter: 1 passed",
        "reference, adapters, judge: 2 passed, 1 skipped",
        "    1 skipped: slow",
        "Triton on a GPU: 1 failed, 2 skipped",
        "    2 skipped: no GPU",
    ]


@pytest.mark.parametrize(
    ("marks", "interpret", "gpu", "reason"),
    [
        ({"interpreter"}, None, True, "set TRITON_INTERPRET=1"),
        ({"interpreter", "slow"}, "0", True, "set TRITON_INTERPRET=1"),
        ({"interpreter"}, "1", False, None),
        ({"compile"}, "1", False, "imported under its interpreter"),
        ({"compile"}, None, False, None),
        ({"gpu"}, None, False, "no NVIDIA GPU of compute capability 8.0 or later"),
        ({"gpu"}, None, True, None),
        ({"blackwell"}, None, False, "no NVIDIA GPU of compute capability 8.0 or later"),
    ],
)
def test_a_test_that_needs_another_process_or_machine_is_skipped(
    marks, interpret, gpu, reason, monkeypatch
):
    monkeypatch.setattr(session, "has_gpu", lambda: gpu)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    found = session.misplaced(marks)
    assert found is None if reason is None else reason in found
