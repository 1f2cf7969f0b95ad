"""`nvfp4-moe diff` finds a single wrong bit, names its place and step, and exits as it says."""

# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from nvfp4_moe import __main__
from nvfp4_moe.cases import inputs
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential import compare, quantizers
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.kernels.quantize import api as quantize_api
from nvfp4_moe.reference.layouts import from_linear, to_linear
from nvfp4_moe.reference.numerics import e4m3
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

CASE = Case("per-token", Recipe(), SfLayout.layout_128x4)


def flip(t, index, bit=1):
    changed = t.clone()
    changed[index] ^= bit
    return changed


def flip_code(q):
    return replace(q, codes=flip(q.codes, (3, 17)))


def flip_scale(q):
    linear = to_linear(q.block_scales, 9, 5, SfLayout.layout_128x4)
    return replace(q, block_scales=from_linear(flip(linear, (3, 2)), SfLayout.layout_128x4))


def flip_token(q):
    bits = flip(q.per_token_scale.view(torch.int32), 3)
    return replace(q, per_token_scale=bits.view(torch.float32))


def flip_padding(q):
    return replace(q, block_scales=flip(q.block_scales, (127, 7)))


@pytest.mark.parametrize(
    ("change", "counts", "place", "step"),
    [
        (flip_code, (1, 0, 0), (3, 2), "e2m1 code"),
        (flip_scale, (0, 1, 0), (3, 2), "block scale"),
        (flip_token, (0, 0, 1), (3, 0), "per-token scale"),
        (flip_padding, (0, 1, 0), (9, 5), "padding"),
    ],
)
def test_one_bit(change, counts, place, step):
    x = inputs.synthetic("normal", 9, 80)
    right = run_reference(x, CASE)
    assert compare.compare(x, CASE, right, run_reference(x, CASE)) is None
    found = compare.compare(x, CASE, right, change(right), first_row=0)
    assert (found.codes, found.block_scales, found.per_token_scales) == counts
    assert (found.row, found.block) == place
    assert step in found.step
    if step != "padding":
        first = x[place[0], place[1] * 16].view(torch.int16).item() & 0xFFFF
        assert found.inputs.startswith(f"{first:04x}")


def test_the_other_candidate_of_4over6_is_named():
    x = inputs.synthetic("normal", 9, 80)
    case = replace(CASE, recipe=Recipe("fast", NVFP44Over6Config()), layout=SfLayout.layout_linear)
    right = run_reference(x, case, keep_steps=True)
    unrounded = right.steps["block_scale"][4, 1]
    candidates = [int(e4m3.encode(unrounded * f)) for f in (1.0, 1.5)]
    wrong = right.block_scales.clone()
    wrong[4, 1] = candidates[0] if int(wrong[4, 1]) == candidates[1] else candidates[1]
    found = compare.compare(x, case, right, replace(right, block_scales=wrong))
    assert found.step.startswith("4over6 choice")


@pytest.fixture
def quick(monkeypatch):
    """The interpreter's place taken by the reference, in this process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answers = {"change": lambda q: q}

    def interpret(jobs):
        results = [run_reference(x, case) for x, case in jobs]
        return [answers["change"](results[0]), *results[1:]]

    monkeypatch.setattr(quantizers, "interpret", interpret)
    return answers


def test_exit_status_and_json(quick, capsys):
    arguments = ["diff", "--kind", "normal", "--recipes", "plain", "--json", "-"]
    assert __main__.main(arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["failed"] == 0
    assert "all identical" in printed.err

    quick["change"] = lambda q: replace(q, codes=flip(q.codes, (2, 9), 0x10))
    assert __main__.main(arguments) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    cells = [c for row in found["sections"][0]["rows"].values() for c in row.values()]
    (failure,) = [f for cell in cells for f in cell["failures"]]
    assert found["failed"] == 1 and failure["summary"] == "1 codes"
    assert [c["status"] for c in cells].count("different") == found["statuses"]["different"] == 1
    assert "1 DIFFER" in printed.err
    assert "first at row 2, block 1, in the step: e2m1 code" in printed.err


def test_ones_own_tensors(quick, capsys, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(
        {
            "good": inputs.synthetic("heavy", 20, 64),
            "narrow": torch.zeros(4, 24).bfloat16(),
            "vector": torch.zeros(32).half(),
            "integers": torch.zeros(4, 32, dtype=torch.int8),
        },
        path,
    )
    assert __main__.main(["diff", "--input", str(path), "--recipes", "fast"]) == 3
    printed = capsys.readouterr().out
    assert "good" in printed and "identical" in printed and "all identical" not in printed
    for reason in ("narrow: K is 24", "vector: shape is [32]", "integers: dtype is I8"):
        assert reason in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "reference,marlin"], "'marlin'; it must be among"),
        (["--backends", "flashinfer:cuda"], "which cannot run here"),
        (["--input", "/nowhere/at.all"], "/nowhere/at.all"),
        (["--rows", "0"], "--rows is 0"),
        (["--input", ""], "--input is ''"),
        (["--report", ""], "--report is ''"),
        (["--json", ""], "--json is ''"),
        (["--backends", ""], "--backends has ''"),
        (["--seed", str(2**63)], "--seed is 9223372036854775808"),
        (["--seed", "-1"], "--seed is -1"),
        (["--only", "moe", "--kind", "edge"], "--only is moe"),
        (["--only", "moe", "--backends", "flashinfer:cuda"], "'flashinfer:cuda'; it must be among"),
    ],
)
def test_bad_usage(arguments, message, quick, capsys):
    status = 3 if "cannot run here" in message else 2
    assert __main__.main(["diff", *arguments]) == status
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1


def test_the_interpreter_child():
    x = inputs.synthetic("normal", 4, 32)
    for case in (CASE, Case("global-scale", Recipe("exact"), SfLayout.layout_8x4, 7.5)):
        (answer,) = quantizers.interpret([(x, case)])
        assert compare.compare(x, case, run_reference(x, case), answer) is None


def test_doctor(capsys):
    assert __main__.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for build in ("cuda", "cute-dsl"):
        assert found["builds"][build]["auto"] == [f"flashinfer:{build}", "triton", "reference"]
        assert set(found["builds"][build]["reasons"]) == set(quantize_api.BACKENDS)
    layer = found["fused_moe"]
    assert layer["auto"][-1] == "reference" and layer["reasons"]["reference"] is None
    assert __main__.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", *quantize_api.BACKENDS):
        assert word in printed
