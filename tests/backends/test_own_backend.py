"""`nvfp4-moe diff --backend module:function`: a user's own backend is judged as the others are."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import re

import pytest
import torch
from paths import ROOT

import nvfp4_moe
from nvfp4_moe import __main__
from nvfp4_moe.kernels.backends import OPERATIONS

QUANTIZERS = ["diff", "--only", "quantizers", "--kind", "grid", "--rows", "4"]
BASELINES = ["diff", "--only", "baselines"]
LAYERS = ["diff", "--only", "moe", "--layers", "few"]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    assert not [
        name for o in OPERATIONS.values() for name in o.names if ":" in name and "own" in name
    ]


def run(capsys, arguments, function, *more):
    """(exit status, the statuses of the backend's cells, what was printed)."""
    name = f"own_backends:{function}"
    status = __main__.main([*arguments, "--backend", name, "--json", "-", *more])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    cells = [
        (column, cell)
        for section in found["sections"]
        for row in section["rows"].values()
        for column, cell in row.items()
        if name in column
    ]
    return status, cells, printed.err


def test_a_right_quantizer_is_identical(capsys):
    status, cells, _ = run(capsys, QUANTIZERS, "quantize")
    assert status == 0 and cells
    assert {column for column, _ in cells} == {"reference = own_backends:quantize"}
    assert {cell["status"] for _, cell in cells} == {"identical"}


def test_a_wrong_quantizer_is_caught(capsys, tmp_path):
    report = tmp_path / "report"
    status, cells, _ = run(capsys, QUANTIZERS, "quantize_wrongly", "--report", str(report))
    assert status == 1 and {cell["status"] for _, cell in cells} == {"different"}
    failure = cells[0][1]["failures"][0]
    assert failure["summary"] == "1 codes" and "e2m1 code" in "".join(failure["details"])
    (file, *_) = sorted(report.rglob("*.safetensors"))
    again = ["replay", str(file), "--backend", "own_backends:quantize"]
    assert __main__.main([*again[:2], again[2], f"{again[3]}_wrongly"]) == 1
    assert __main__.main(again) == 0
    assert __main__.main(["replay", str(file)]) == 2
    assert "'own_backends:quantize_wrongly', not one of ours" in capsys.readouterr().err


def test_a_quantizer_that_raises_has_crashed(capsys):
    status, cells, _ = run(capsys, QUANTIZERS, "quantize_and_raise")
    assert status == 1 and {cell["status"] for _, cell in cells} == {"crashed"}
    assert "RuntimeError: out of luck" in cells[0][1]["failures"][0]["summary"]


def test_a_quantizer_that_cannot_is_compared_where_it_can(capsys):
    status, cells, _ = run(capsys, QUANTIZERS, "quantize_some")
    assert status == 0 and {cell["status"] for _, cell in cells} == {"identical"}


def test_a_right_layer_is_inside_and_a_wrong_one_is_caught(capsys):
    status, cells, _ = run(capsys, LAYERS, "layer")
    assert status == 0
    assert {cell["status"] for _, cell in cells} == {"inside", "identical"}
    status, cells, _ = run(capsys, LAYERS, "layer_wrongly")
    # Where sums must be exact the failure is another number; elsewhere it is out of the interval.
    assert status == 1 and {"different"} <= {cell["status"] for _, cell in cells}


def test_a_result_of_another_shape_has_crashed(capsys):
    status, cells, _ = run(capsys, LAYERS, "layer_of_another_shape")
    assert status == 1
    failed = [cell for _, cell in cells if cell["status"] == "crashed"]
    assert (
        "own_backends:layer_of_another_shape is float32 [1, 1]"
        in failed[0]["failures"][0]["summary"]
    )


def test_a_baseline_of_a_user_is_judged_where_sums_are_exact(capsys):
    status, cells, _ = run(capsys, BASELINES, "baseline")
    assert status == 0 and {cell["status"] for _, cell in cells} == {"identical", "withheld"}
    status, cells, _ = run(capsys, BASELINES, "baseline_wrongly")
    assert status == 1 and {cell["status"] for _, cell in cells} == {"different", "withheld"}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere:run", "there is no module nowhere"),
        ("own_backends.deeper:run", "there is no module own_backends.deeper"),
        ("own_backends:run", "own_backends has no function run"),
        ("own_backends:not_a_function", "own_backends has no function not_a_function"),
        ("own_backends", "it must be module:function"),
        (":run", "it must be module:function"),
        ("flashinfer:mine", "--backend is 'flashinfer:mine'"),
    ],
)
def test_one_clear_error(address, message, capsys):
    assert __main__.main([*QUANTIZERS, "--backend", address]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1


def test_its_part_must_be_named(capsys):
    assert __main__.main(["diff", "--backend", "own_backends:layer"]) == 2
    assert "--only must name its part" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["register_backend", "docs/own_backends.md"])
def test_the_calls_that_are_named_exist(place):
    page = ROOT / place
    text = page.read_text("utf-8") if page.is_file() else nvfp4_moe.register_backend.__doc__
    names = re.findall(r"`(kernels\.[\w.]+)\.(\w+Call)`", text)
    assert len(set(names)) == 5
    for module, name in names:
        assert isinstance(getattr(importlib.import_module(f"nvfp4_moe.{module}"), name), type)
