"""`nvfp4-moe blackwell`, rehearsed: FlashInfer is fake, without or with a fault."""

# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import fake_flashinfer
import pytest
from paths import ROOT

from nvfp4_moe.__main__ import main
from nvfp4_moe.cli import blackwell, finished
from nvfp4_moe.differential.results import FAILED, Cell, Section
from nvfp4_moe.failures import write
from nvfp4_moe.kernels.moe import backends as moe_backends
from nvfp4_moe.report import data as report

pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl, as FlashInfer's layers do")
OPTIONS = Namespace(small=True, timeout=300)


def test_every_backend_in_every_math():
    planned = list(blackwell.jobs(None))
    assert len({job.folder for job in planned}) == len(planned) == 4 * 2 + 4 * 4 + 4
    assert {job.backend for job in planned if job.part.name == "moe"} == set(moe_backends.ORDER) - {
        "reference"
    }
    (one,) = [j for j in planned if j.math == "4over6" and j.backend == "flashinfer:cutlass"]
    assert one.part.maths[one.math] == {"FLASHINFER_NVFP4_4OVER6": "1"}
    assert one.arguments(OPTIONS, Path("out"))[:3] == ["diff", "--only", "moe"]


def test_an_unknown_backend(capsys):
    assert main(["blackwell", "--backends", "marlin"]) == 2
    assert "'marlin'; it must be among flashinfer:bf16" in capsys.readouterr().err


def test_the_rehearsal(tmp_path):
    """The whole command and its processes, of a machine that keeps the contract."""
    child = subprocess.run(
        [
            sys.executable,
            "tests/support/fake_flashinfer/rehearse.py",
            "blackwell",
            "--small",
            "--report",
            tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    found = report.read(tmp_path / "report.json")
    verdicts = found.sections[0]
    for row, cells in verdicts.rows.items():
        for backend, cell in cells.items():
            cannot = backend == "flashinfer:cake" and "exact" in row
            assert (cell.status == "skipped") == cannot, (row, backend, cell)
            assert cell.failed == 0
    layers = verdicts.rows["fused mixture of experts, fast math"]
    assert layers["flashinfer:trtllm"].compared > 60  # every tactic, twice
    assert re.search(r"flashinfer:trtllm +inside", child.stdout)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_nothing_of_flashinfers_ran(tmp_path, monkeypatch, capsys):
    one = next(blackwell.jobs("flashinfer:cutlass"))  # the other maths would say the same
    monkeypatch.setattr(blackwell, "jobs", lambda chosen: iter([one]))
    arguments = ["blackwell", "--small", "--backends", "flashinfer:cutlass", "--report"]
    assert main([*arguments, str(tmp_path)]) == 3
    printed = capsys.readouterr().out
    assert "not run: hidden_states are on the CPU" in printed
    missing = "backend flashinfer:cutlass: hidden_states are on the CPU"
    assert f"asked for and not run: {missing}" in printed
    assert "exit status 3: nothing was compared" in printed
    page = (tmp_path / "report.html").read_text("utf-8")
    assert missing in page and "Nothing failed" not in page
    assert report.read(tmp_path / "report.json").missing == [missing]


def test_resume(tmp_path, monkeypatch):
    """A process that ended well is taken over; one that failed, or ran other files, runs again."""
    ran: list[str] = []
    failing = {"quantizers-triton-exact-math"}

    def run(command, timeout=None, **_):
        if "diff" not in command:
            return 0, ""
        folder = Path(command[command.index("--report") + 1])
        ran.append(folder.name)
        section = Section("quantizers")
        status = "outside" if folder.name in failing else "identical"
        section.put("x", "triton", Cell(status, 5, int(folder.name in failing)))
        write.write(report.Report(["diff"], sections=[section]), folder)
        return int(folder.name in failing), "a line"

    two = [job for job in blackwell.jobs("triton") if job.part.name == "quantizers"]
    names = [job.folder for job in two]
    assert len(names) == 2 and failing < set(names)
    monkeypatch.setattr(blackwell, "jobs", lambda chosen: iter(two))
    monkeypatch.setattr(blackwell.workers, "run", run)

    def blackwell_runs(*arguments):
        ran.clear()
        main(["blackwell", "--backends", "triton", "--report", str(tmp_path), *arguments])
        found = report.read(tmp_path / "report.json")
        return sorted(ran), found.compared

    assert blackwell_runs() == (sorted(names), 10)
    assert blackwell_runs("--resume") == (sorted(failing), 10)
    failing.clear()
    assert len(blackwell_runs("--resume")[0]) == 1
    assert blackwell_runs("--resume") == ([], 10)
    assert blackwell_runs("--resume", "--small") == (sorted(names), 10), "other cases"
    assert blackwell_runs() == (sorted(names), 10), "not asked for"
    (tmp_path / names[0] / "report.json").write_text("{", "utf-8")
    assert blackwell_runs("--resume") == ([names[0]], 10)
    other = report.Report(["diff"], sections=[Section("quantizers")])
    write.write(other, tmp_path / names[0])  # by a `diff` with that folder
    assert blackwell_runs("--resume") == ([names[0]], 10)
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "FLASHINFER_EXTRA_CUDAFLAGS"):
        monkeypatch.setenv(name, "1")
        assert blackwell_runs("--resume") == (sorted(names), 10), name
        assert blackwell_runs("--resume") == ([], 10), name
    for part in ("_sources", "_packages"):
        finished._here.cache_clear()
        monkeypatch.setattr(finished, part, lambda: "others")
        assert blackwell_runs("--resume") == (sorted(names), 10), part
    finished._here.cache_clear()


def test_ours_alone_is_not_what_was_asked_for(tmp_path, monkeypatch, capsys):
    """If no backend is named, FlashInfer is asked for, however much of ours passed."""
    verdicts = Section("verdicts", summary=True)
    verdicts.put("quantizers", "triton", Cell("identical", 148))
    verdicts.put("quantizers", "flashinfer:cuda", Cell("skipped", note="no GPU"))
    assert blackwell._missing(verdicts, None) == ["every backend of FlashInfer's: no GPU"]
    assert blackwell._missing(verdicts, "triton") == []
    assert blackwell._missing(verdicts, "triton,flashinfer:cuda") == [
        "backend flashinfer:cuda: no GPU"
    ]
    verdicts.put("layers", "flashinfer:trtllm", Cell("inside", 2))
    assert blackwell._missing(verdicts, None) == []


def test_a_process_that_dies(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        blackwell, "CHILD", (sys.executable, "-c", "import os; print('dying'); os.abort()")
    )
    arguments = ["blackwell", "--backends", "flashinfer:cake", "--report", str(tmp_path)]
    assert main(arguments) == 1
    assert re.search(r"flashinfer:cake +FAIL: 1 of 1 crashed", capfd.readouterr().out)
    found = report.read(tmp_path / "report.json")
    cell = found.sections[1].rows["the whole process"]["flashinfer:cake"]
    assert cell.note == "dying" and cell.failures[0].summary == "exit status -6"
    assert found.failed == 2  # fast and exact


def test_a_process_that_does_not_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(blackwell, "CHILD", (sys.executable, "-c", "import time; time.sleep(60)"))
    once = tuple(replace(part, maths={"fast math": {}}) for part in blackwell.PARTS)
    monkeypatch.setattr(blackwell, "PARTS", once)
    arguments = ["blackwell", "--backends", "flashinfer:cake", "--timeout", "1"]
    assert main([*arguments, "--report", str(tmp_path)]) == 1
    assert "FAIL: 1 of 1 crashed" in capfd.readouterr().out
    found = report.read(tmp_path / "report.json")
    assert "still running after 1 s" in found.sections[0].cells[0].note


MATH_OF = {
    "exact math ignored": "exact math",
    "4over6 of the intermediate ignored": "4over6",
}
"""Faults that not every math shows."""


def rehearsed(backend, part, math, fault, tmp_path, monkeypatch):
    """(exit status, report) of one process's work, done in this one."""
    (job,) = [j for j in blackwell.jobs(backend) if (j.part.name, j.math) == (part, math)]
    for name, value in job.part.maths[math].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("nvfp4_moe.failures.write.MOST_FILES", 1)
    with fake_flashinfer.installed(fault):
        status = main(job.arguments(OPTIONS, tmp_path))
    return status, report.read(tmp_path / "report.json")


@pytest.mark.parametrize("name", fake_flashinfer.FAULTS)
def test_a_lie_is_caught(name, tmp_path, monkeypatch, capsys):
    fault = fake_flashinfer.FAULTS[name]
    backend = fault.backends[0]
    part = {"quantizer": "quantizers", "layer": "moe", "baseline": "baselines"}[fault.of]
    math = "any math" if part == "baselines" else MATH_OF.get(name, "fast math")
    status, found = rehearsed(backend, part, math, name, tmp_path, monkeypatch)
    assert status == 1
    failing = [
        (column, cell)
        for row in found.sections[0].rows.values()
        for column, cell in row.items()
        if cell.status in FAILED
    ]
    assert failing and all(backend in column for column, _ in failing)
    told = [failure.case for _, cell in failing for failure in cell.failures]
    for tactic in fault.tactics:
        assert all(tactic in case for case in told)
    assert (tmp_path / "failure-01.safetensors").exists() == (part != "baselines")
