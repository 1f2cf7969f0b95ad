"""A bug report's snippet makes the very call that failed, and its text has the bits."""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import pytest
import torch
from replay_cases import assert_same, moe_failure, quantizer_failure, wrong

import nvfp4_moe
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential import explain, quantizers
from nvfp4_moe.failures.bug_report import bug_report_text
from nvfp4_moe.failures.replay_file import save_moe, save_quantizer
from nvfp4_moe.kernels import environment
from nvfp4_moe.kernels.flashinfer import (
    cute_dsl,
    cutlass,
    trtllm,
    version,
)
from nvfp4_moe.kernels.flashinfer import quantize as fi
from nvfp4_moe.kernels.flashinfer.description import as_theirs
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

needs_flashinfer = pytest.mark.skipif(
    version.HERE.version is None, reason="needs flashinfer-python"
)
FOUR = NVFP44Over6Config(256, "MSE", True)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable that counts is set, nor is one that a snippet sets afterwards."""
    for name in environment.VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def snippet(text):
    (program,) = re.findall(r"```python\n(.*?)\n```", text, re.S)
    return program


def caught(program, module, name, monkeypatch, result=None):
    """The arguments that a snippet calls a function with, on the CPU."""
    given = []

    def stand_in(**arguments):
        given.append(arguments)
        return result if result is not None else (torch.zeros(2, dtype=torch.uint8),)

    monkeypatch.setattr(module, name, stand_in)
    exec(program.replace(".cuda()", "").replace("'cuda')", "'cpu')"), {})
    (arguments,) = given
    return arguments


@needs_flashinfer
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("backend", "mode", "recipe"),
    [
        ("flashinfer:cuda", "per-token", Recipe()),
        ("flashinfer:cuda", "global-scale", Recipe("exact", FOUR)),
        ("flashinfer:cuda", "row scales", Recipe()),
        ("flashinfer:cute-dsl", "per-token", Recipe("exact", FOUR, "cute-dsl")),
        ("flashinfer:cute-dsl", "global-scale", Recipe(build="cute-dsl")),
        ("flashinfer:cake", "per-token", Recipe(build="cute-dsl")),
    ],
)
def test_the_quantizers_call(backend, mode, recipe, large, tmp_path, monkeypatch):
    import flashinfer

    case = Case(mode, recipe, SfLayout.layout_128x4, 0.1 if mode == "global-scale" else None)
    failure = quantizer_failure(case, torch.float16, ("reference", backend))
    if not large:
        failure = replace(failure, x=failure.x[4:5])
        q = {
            name: nvfp4_moe.failures.replay_file.rows_of(q, [4], case)
            for name, q in failure.outputs.items()
        }
        failure = replace(failure, outputs=q | {backend: wrong(q["reference"])})
    path = tmp_path / "case.safetensors"
    save_quantizer(path, failure)
    text = bug_report_text(failure, str(path))
    program = snippet(text)
    assert ("load_file" in program) == large
    got = caught(program, flashinfer, "nvfp4_quantize", monkeypatch)
    want = fi.arguments(backend, quantizers.request(failure.x, case))
    for name, value in want.items():
        if name in got or value is not None:  # what is None is the default
            if isinstance(value, torch.Tensor):
                assert_same(got[name], value)
            else:
                assert got[name] == as_theirs(value), name
    exact = recipe.math == "exact"
    assert ("'FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH'] = '1'" in program) == exact


def test_the_text_of_a_quantizer():
    failure = quantizer_failure(sides=("reference", "flashinfer:cuda"))
    text = bug_report_text(failure)
    assert text.startswith("# flashinfer:cuda differs from reference in the e2m1 code: per-token, ")
    assert "- torch 2\n- GPU: B200" in text and "`nvfp4-moe diff --rows 3`" in text
    good, bad = failure.outputs.values()
    row, block = 19, 1
    for name, q in (("expected", good), ("got     ", bad)):
        codes = bytes(q.codes[row, 8 * block : 8 * block + 8].tolist()).hex()
        assert f"{name} codes {codes} block scale 0x" in text
    element = explain.first_element(failure.x, good, bad, row, block)
    assert element == 3
    for line in explain.explain_element(failure.x, failure.case, row, block, element):
        assert f"\n{line}\n" in text


def test_where_nothing_can_be_spelled_out():
    failure = quantizer_failure(sides=("reference", "flashinfer:cuda"))
    raised = replace(failure, outputs=failure.outputs | {"flashinfer:cuda": None})
    text = bug_report_text(raised)
    assert text.startswith("# flashinfer:cuda raises: per-token") and "```\nnote\n```" in text
    q = failure.outputs["reference"]
    scales = q.block_scales.clone()
    scales[-1, -1] = 0xFF
    padding = failure.outputs | {"flashinfer:cuda": replace(q, block_scales=scales)}
    text = bug_report_text(replace(failure, outputs=padding))
    assert "in the padding of the block scales" in text
    assert "byte 511 of the buffer: expected 0x00, got 0xff" in text
    same = replace(failure, outputs=dict.fromkeys(failure.sides, q))
    with pytest.raises(ValueError, match="are the same"):
        bug_report_text(same)
    triton = quantizer_failure(sides=("reference", "triton"))
    assert "replay(load('failure.safetensors'), 'triton')" in snippet(bug_report_text(triton))


def failed_trtllm(routed):
    failure = moe_failure(w2_bias=torch.ones(4, 208), weights_dtype=torch.float32)
    case = replace(failure.case, recipe=Recipe("exact", FOUR))
    if routed:
        logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        case = replace(case, ids=None, weights=None, logits=logits)
    output = case.reference()
    output[1, 7] = 1000.0
    return replace(failure, case=case, backend="flashinfer:trtllm", output=output)


@needs_flashinfer
@pytest.mark.parametrize("routed", [False, True])
def test_the_fused_call(routed, tmp_path, monkeypatch):
    from flashinfer import SfLayout as Theirs
    from flashinfer import fused_moe

    failure = failed_trtllm(routed)
    path = tmp_path / "case.safetensors"
    save_moe(path, failure)
    text = bug_report_text(failure, str(path))
    name = f"trtllm_fp4_block_scale{'' if routed else '_routed'}_moe"
    program = snippet(text)
    got = caught(program, fused_moe, name, monkeypatch)
    want = trtllm.LAYER.arguments(failure.case.request())
    assert_same(got, want | {"hidden_states_scale_layout": Theirs.layout_linear})
    assert "os.environ['FLASHINFER_NVFP4_4OVER6_E4M3_USE_256'] = '1'" in program
    assert "output2_scale_scalar: float32 [4] = 0x" in text
    assert "Configuration: `BLOCK_M=16 warps=4`" in text
    assert "first at token 1, column 7: got 0x447a (1000), allowed 0x" in text
    last = re.search(r"sum over the slots = (0x\w{4})", text).group(1)
    assert last == explain.bits(failure.case.reference()[1, 7]).split()[0]
    with pytest.raises(ValueError, match="is inside its interval"):
        bug_report_text(replace(failure, output=failure.case.reference()))


@needs_flashinfer
@pytest.mark.parametrize("layer", [cute_dsl, cutlass])
def test_the_other_layers(layer, tmp_path, monkeypatch):
    from flashinfer import fused_moe

    cute = layer is cute_dsl
    failure = moe_failure("per-token" if cute else "static")
    make = nvfp4_moe.with_cute_dsl if cute else nvfp4_moe.with_cutlass
    case = replace(
        failure.case,
        experts=make(failure.case.experts),
        recipe=Recipe(),
        build="cute-dsl" if cute else "cutlass",
        exact=not cute,
    )
    failure = replace(failure, case=case, backend=layer.NAME)
    path = tmp_path / "case.safetensors"
    save_moe(path, failure)
    name = "cute_dsl_fused_moe" if cute else "cutlass_fused_moe"
    got = caught(snippet(bug_report_text(failure, str(path))), fused_moe, name, monkeypatch)
    for key, value in layer.LAYER.arguments(case.request()).items():
        assert_same(got[key], value)
