"""A comparison of nothing never passes: it has a status of its own, in the terminal and on the page."""

# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import save_file

from nvfp4_moe.__main__ import main
from nvfp4_moe.cases import inputs
from nvfp4_moe.differential import (
    baseline_moe as diff_baseline,
)
from nvfp4_moe.differential import (
    moe as diff_moe,
)
from nvfp4_moe.differential import (
    quantizers,
    workers,
)
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.differential.results import Cell, PartResult, Section
from nvfp4_moe.exits import Exit
from nvfp4_moe.report import data as report
from nvfp4_moe.report import html
from nvfp4_moe.report.data import Report

UNFIT = {
    "K = 24": torch.zeros(4, 24, dtype=torch.bfloat16),
    "3-D": torch.zeros(4, 2, 32, dtype=torch.bfloat16),
    "int32": torch.zeros(4, 32, dtype=torch.int32),
    "fp64": torch.zeros(4, 32, dtype=torch.float64),
    "0 rows": torch.zeros(0, 32, dtype=torch.bfloat16),
    "0 columns": torch.zeros(4, 0, dtype=torch.bfloat16),
    "a scalar": torch.zeros((), dtype=torch.bfloat16),
}


@pytest.fixture
def quick(monkeypatch):
    """The interpreter's answers are the reference's, without its processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        quantizers, "interpret", lambda jobs: [run_reference(x, case) for x, case in jobs]
    )


def diff(capsys, tmp_path, *arguments):
    """(status, stdout, the report's JSON, the page)."""
    status = main(["diff", *map(str, arguments), "--report", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    return status, capsys.readouterr().out, found, (tmp_path / "out/report.html").read_text("utf-8")


def told_as_nothing(status, printed, found, shown):
    assert status == found["exit_status"] == Exit.NOT_RUN == 3
    assert "all identical" not in printed and "exit status 3: nothing was compared" in printed
    assert printed.splitlines()[-1].startswith("verdict: nothing was judged")
    assert "Nothing failed" not in shown and 'class="open"' in shown


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_without_a_matrix(name, quick, capsys, tmp_path):
    save_file({"mine": UNFIT[name]}, tmp_path / "mine.safetensors")
    outcome = diff(capsys, tmp_path, "--input", tmp_path / "mine.safetensors")
    told_as_nothing(*outcome)
    for text in outcome[1:2] + outcome[3:]:
        assert "sked for and not run: tensor mine: " in text


def test_an_empty_file(quick, capsys, tmp_path):
    save_file({}, tmp_path / "mine.safetensors")
    told_as_nothing(*diff(capsys, tmp_path, "--input", tmp_path / "mine.safetensors"))


@pytest.mark.parametrize(
    "sides", ["reference", "golden", "reference,reference", "reference,golden"]
)
def test_fewer_than_two_sides(sides, quick, capsys, tmp_path):
    save_file({"mine": inputs.synthetic("normal", 4, 32)}, tmp_path / "mine.safetensors")
    arguments = ["--input", tmp_path / "mine.safetensors", "--backends", sides]
    told_as_nothing(*diff(capsys, tmp_path, *arguments))


def test_a_side_that_had_no_part(quick, capsys, tmp_path):
    """All that ran is identical, but golden outputs, which were named, do not exist for the kind."""
    arguments = ["--kind", "grid", "--recipes", "fast", "--rows", 2]
    status, printed, found, shown = diff(
        capsys, tmp_path, *arguments, "--backends", "reference,triton,golden"
    )
    assert status == Exit.NOT_RUN and found["compared"] > 0
    assert "asked for and not run: backend golden: it took part in no comparison" in printed
    assert "1 thing asked for and not run" in shown
    assert diff(capsys, tmp_path, *arguments, "--backends", "reference,triton")[0] == Exit.DONE


@pytest.mark.parametrize("named", [[], ["--backends", "flashinfer:bf16"]])
def test_layers_that_cannot_run(named, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diff_baseline, "FORMATS", ("bf16",))
    status, printed, found, _ = diff(capsys, tmp_path, "--only", "baselines", *named)
    assert status == Exit.NOT_RUN and found["compared"] == 0
    assert "exit status 3" in printed


def test_the_reference_judged_by_itself(capsys, tmp_path, monkeypatch):
    section = Section("layers", notes=["24 tokens"])
    section.put("Swiglu", "reference", Cell("inside", 1))
    monkeypatch.setattr(diff_moe, "run", lambda *_: PartResult(section))
    arguments = ["--only", "moe", "--layers", "few", "--backends", "reference"]
    told_as_nothing(*diff(capsys, tmp_path, *arguments))


def test_without_triton_the_golden_outputs_are_left(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(workers, "interpreter_refusal", lambda: "Triton is not installed")
    save_file({"mine": inputs.synthetic("normal", 4, 32)}, tmp_path / "mine.safetensors")
    told_as_nothing(*diff(capsys, tmp_path, "--input", tmp_path / "mine.safetensors"))
    assert main(["diff", "--backends", "reference,triton"]) == Exit.NOT_RUN
    assert "cannot run here: Triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(4, 32), "no value but 0: no SNR"),
        (torch.full((4, 32), torch.nan), "4 of 4 rows with NaN"),
        (torch.full((4, 32), torch.inf), "4 of 4 rows with an infinity"),
        (torch.eye(4, 32).where(torch.eye(4, 32) == 0, torch.nan), "no other value but 0"),
        (torch.cat((torch.ones(3, 32), torch.full((1, 32), torch.nan))), "spread   1.0 x"),
    ],
)
def test_tensors_of_zeros_and_of_nan(x, told, quick, capsys, tmp_path):
    save_file({"mine": x.bfloat16()}, tmp_path / "mine.safetensors")
    status, printed, *_ = diff(capsys, tmp_path, "--input", tmp_path / "mine.safetensors")
    assert status == Exit.DONE and told in printed and "nan" not in printed


@pytest.mark.parametrize(
    ("cells", "missing", "status"),
    [
        ([], [], Exit.NOT_RUN),
        ([Cell("skipped")], [], Exit.NOT_RUN),
        ([Cell("withheld", 7)], [], Exit.NOT_RUN),
        ([Cell("identical", 1)], [], Exit.DONE),
        ([Cell("identical", 1)], ["tensor a: K is 24"], Exit.NOT_RUN),
        ([Cell("inside", 1), Cell("skipped")], [], Exit.DONE),
        ([Cell("outside", 1, 1)], ["tensor a: K is 24"], Exit.DIFFERENCE),
        ([Cell("crashed")], [], Exit.DIFFERENCE),
    ],
)
def test_the_status_of_a_report(cells, missing, status):
    section = Section("layers")
    for i, cell in enumerate(cells):
        section.put(f"case {i}", "triton", cell)
    whole = Report(["nvfp4-moe", "diff"], {"versions": {}, "gpus": [], "environment": {}})
    whole.sections, whole.missing = [section], missing
    assert whole.status is status
    heading = html.render(whole.as_dict()).split("<h1")[1].split(">")[0]
    assert heading == {Exit.DONE: "", Exit.NOT_RUN: ' class="open"'}.get(status, ' class="bad"')


def test_the_oracle_is_not_compared_with_itself():
    section = Section("layers")
    section.put("case", "reference", Cell("identical", 1))
    assert list(section.judged()) == [] and section.missing(["reference"]) == []
    section.put("case", "triton", Cell("withheld", 1))
    assert section.missing(["triton", "reference", "triton"]) == ["triton"]
    section.put("case", "golden = triton", Cell("identical", 1))
    assert section.missing(["triton", "golden"]) == []
    assert report.Report(sections=[section]).compared == 1
