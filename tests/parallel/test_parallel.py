"""Expert and tensor parallelism: processes that find each other by a file, over gloo or NCCL."""

# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import parallel_agreement_cases  # noqa: F401  more of CASES
import pytest
import torch
from parallel_cases import CASES
from parallel_worker import LOSSES, TIMEOUT
from paths import ROOT, SUPPORT

from nvfp4_moe.kernels.triton_target import INTERPRETING

GROUPS = [("gloo", 2), ("gloo", 4), ("nccl", 2), ("nccl", 4)]
GIVEN_UP = 240  # seconds: a hang


def marked(groups):
    return [
        pytest.param(*g, marks=[pytest.mark.gpu] if g[0] == "nccl" else [], id=f"{g[0]}-{g[1]}")
        for g in groups
    ]


def start(scenario: str, transport: str, ranks: int, folder: Path) -> list[tuple[int, str]]:
    """Run the ranks to their ends; each one's exit status and what it printed."""
    if transport == "nccl" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, found {torch.cuda.device_count()}")
    paths = [str(ROOT), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    worker = str(SUPPORT / "parallel_worker.py")
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [
                sys.executable,
                worker,
                scenario,
                transport,
                str(ranks),
                str(rank),
                str(folder),
            ]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
                )
        end = time.monotonic() + GIVEN_UP
        for process in processes:
            process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs:\n" + "\n".join(log.read_text() for log in logs))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, log.read_text()) for p, log in zip(processes, logs, strict=True)]


def check_cases(transport: str, ranks: int, folder: Path, scenario: str = "cases") -> None:
    ended = start(scenario, transport, ranks, folder)
    told = "\n".join(f"rank {rank}:\n{printed}" for rank, (_, printed) in enumerate(ended))
    assert all(status == 0 for status, _ in ended), told
    names = list(CASES) if scenario == "cases" else [scenario]
    for rank in range(ranks):
        assert json.loads((folder / f"{rank}.json").read_text()) == names


@pytest.mark.skipif(INTERPRETING, reason="the reference's ranks run without the interpreter")
@pytest.mark.parametrize("transport,ranks", marked(GROUPS))
def test_cases(transport, ranks, tmp_path):
    """`parallel_cases.CASES`: the reference over gloo, Triton over NCCL."""
    check_cases(transport, ranks, tmp_path)


@pytest.mark.interpreter
def test_all_to_all_in_the_interpreter(tmp_path):
    check_cases("gloo", 2, tmp_path, "all_to_all_is_one_process")


@pytest.mark.skipif(INTERPRETING, reason="the reference's ranks run without the interpreter")
@pytest.mark.parametrize("transport,ranks", marked([("gloo", 2), ("nccl", 2)]))
@pytest.mark.parametrize("scenario", LOSSES)
def test_a_lost_rank(scenario, transport, ranks, tmp_path):
    """The others raise, at once or when the group's timeout is over; NCCL's watchdog may end them."""
    if (scenario, transport) == ("late", "nccl"):
        pytest.skip(
            "NCCL's watchdog waits a minute after the timeout: who is late by less is served"
        )
    began = time.monotonic()
    ended = start(scenario, transport, ranks, tmp_path)
    for rank, (status, printed) in enumerate(ended):
        if rank == 1 and scenario != "late":
            assert status == -signal.SIGKILL, printed
        elif transport == "nccl" and status != 0:
            assert time.monotonic() - began < GIVEN_UP, printed
        else:
            assert status == 0, printed
            found = json.loads((tmp_path / f"{rank}.json").read_text())
            assert found["raised"] not in (None, "AgreementError"), f"{found}\n{printed}"
            assert found["seconds"] < TIMEOUT + 3, found
