"""A report's folder: what it says of its making, its commands, and the files of an earlier report."""

# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys

import pytest
import replay_cases
import torch
from safetensors.torch import save_file

from nvfp4_moe import machine
from nvfp4_moe.__main__ import main
from nvfp4_moe.cases import inputs
from nvfp4_moe.cli import blackwell
from nvfp4_moe.differential import quantizers
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.differential.results import Cell, Section
from nvfp4_moe.exits import Exit
from nvfp4_moe.failures import write
from nvfp4_moe.failures.replay_file import save_quantizer
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.report import data as report
from nvfp4_moe.report import html, invocation
from nvfp4_moe.report import terminal as text
from nvfp4_moe.report.data import Report


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        quantizers, "interpret", lambda jobs: [run_reference(x, case) for x, case in jobs]
    )


def leave(where, *names):
    """Files that an earlier report, or somebody else, left."""
    where.mkdir(exist_ok=True)
    for name in names:
        save_quantizer(where / name, replay_cases.quantizer_failure())
    return where


def test_a_clean_report_has_no_failing_cases_of_an_earlier_one(quick, tmp_path):
    out = leave(tmp_path / "out", "failure-01.safetensors", "failure-12.safetensors")
    leave(out, "failure-mine.safetensors", "mine.safetensors")
    save_file({"x": torch.zeros(2)}, out / "failure-02.safetensors")  # no failing case of ours
    (out / "failure-03.safetensors").write_bytes(b"junk")
    (out / "failure-04.safetensors").mkdir()
    (out / "failure-05.safetensors").symlink_to(out / "mine.safetensors")
    arguments = ["diff", "--kind", "grid", "--recipes", "fast", "--rows", "2", "--report", str(out)]
    assert main(arguments) == Exit.DONE
    assert {path.name for path in out.iterdir()} == {
        "failure-02.safetensors",
        "failure-03.safetensors",
        "failure-04.safetensors",
        "failure-05.safetensors",
        "failure-mine.safetensors",
        "mine.safetensors",
        "report.html",
        "report.json",
    }


def test_a_report_of_all_removes_those_of_every_process(tmp_path, monkeypatch):
    job = next(blackwell.jobs("triton"))
    leave(tmp_path / job.folder, "failure-01.safetensors", "mine.safetensors")
    monkeypatch.setattr(blackwell, "CHILD", (sys.executable, "-c", "pass"))
    monkeypatch.setattr(blackwell, "_run_all", lambda *_: [])
    assert main(["blackwell", "--backends", "flashinfer:cake", "--report", str(tmp_path)]) == 3
    assert [path.name for path in (tmp_path / job.folder).iterdir()] == ["mine.safetensors"]


def test_it_says_when_and_by_what_it_was_made(monkeypatch, capsys):
    monkeypatch.setattr(machine, "_driver", lambda: "610.12")
    monkeypatch.setattr(machine, "_commit", lambda: "0123456789ab, changed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    section = Section("layers")
    section.put("case", "triton", Cell("identical", 1))
    whole = Report.of_this_run()
    whole.sections = [section]
    found = whole.as_dict()
    shown = html.render(found)
    text.print_end(whole, sys.stdout)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    for told in (found["date"], "610.12", "0123456789ab, changed", torch.__version__):
        assert told in json.dumps(found) and told in shown and told in printed
    assert printed.splitlines()[-1] == "verdict: nothing failed in 1 comparison"
    back = report._section(json.loads(json.dumps(found))["sections"][0])
    assert back == section


def test_the_driver_and_the_commit_of_this_machine():
    assert machine._commit() is None or re.match(r"[0-9a-f]{12}", machine._commit())
    assert machine._driver() is None or re.match(r"[\d.]+$", machine._driver())


@pytest.mark.parametrize("given", [["diff", "--rows", "2"], ["convert", "a b", "it's"]])
def test_the_command_is_what_was_given(given, monkeypatch, tmp_path):
    monkeypatch.setattr(invocation, "_given", None)
    monkeypatch.chdir(tmp_path)
    invocation.remember(given)
    words = invocation.command()
    assert words[-len(given) :] == given and invocation.name() == f"nvfp4-moe {given[0]}"
    echo = ["python3", "-c", "import os, sys; print(os.getcwd(), sys.argv[1:])", *given]
    line = invocation.pasted(echo, invocation.folder())
    said = subprocess.run(line, shell=True, capture_output=True, text=True, cwd="/").stdout
    assert said == f"{tmp_path} {given}\n"


def test_the_commands_of_the_page_work_when_pasted(monkeypatch, tmp_path, capsys):
    """In any folder: the replay of a failing case, and the program of the run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def wrong(jobs):
        first, *rest = [run_reference(x, case) for x, case in jobs]
        codes = e2m1.unpack(first.codes)
        codes[0, 0] ^= 1
        first.codes.copy_(e2m1.pack(codes))
        return [first, *rest]

    monkeypatch.setattr(quantizers, "interpret", wrong)
    monkeypatch.setattr(write, "SECONDS", 0.1)
    save_file({"mine": inputs.synthetic("normal", 2, 32)}, tmp_path / "mine.safetensors")
    arguments = ["--input", str(tmp_path / "mine.safetensors"), "--recipes", "fast"]
    out = tmp_path / "out folder"
    assert main(["diff", *arguments, "--report", str(out)]) == Exit.DIFFERENCE
    found = json.loads((out / "report.json").read_text("utf-8"))
    assert found["pasted"].endswith("--report " + f"'{out}'")
    cells = [cell for row in found["sections"][0]["rows"].values() for cell in row.values()]
    again = next(f["again"] for cell in cells for f in cell["failures"] if f["replay"])
    assert again.endswith(f"replay '{out / 'failure-01.safetensors'}'")
    # The reference in the place of what was wrong, so that no interpreter is started.
    line = f"{again} --backend reference"
    child = subprocess.run(line, shell=True, capture_output=True, text=True, cwd="/", timeout=200)
    assert child.returncode == Exit.DONE and "are identical" in child.stdout, child.stderr
