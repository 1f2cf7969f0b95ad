"""Two versions of FlashInfer: a call is refused where a row of differences says so, else served."""

# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path

import moe_cases
import pytest
import torch
import version_table
from installations import pretend
from moe_cases import Shape
from paths import ROOT

import nvfp4_moe
from nvfp4_moe.kernels.flashinfer import cute_dsl, cutlass, differences, trtllm, version
from nvfp4_moe.kernels.flashinfer import quantize as fi
from nvfp4_moe.kernels.flashinfer.version import CITED, NEW
from nvfp4_moe.kernels.moe.call import make_moe_call
from nvfp4_moe.kernels.quantize.call import make_quantize_call
from nvfp4_moe.reference.recipe import NVFP44Over6Config

OLD_ASKED, NEW_ASKED = {"flashinfer": "0.7.2"}, {"flashinfer": "0.7.4"}
ROWS = (*differences.BITS, *differences.DEFAULTS)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in nvfp4_moe.kernels.environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def quantizer(dtype=torch.bfloat16, per_token=True, **named):
    a = torch.empty(128, 64, dtype=dtype, device="meta")
    scale = 1 / 2688 if per_token else 30.0
    call = make_quantize_call(a, scale, per_token_activation=per_token, **named)
    return replace(call, capability=(10, 0))


@pytest.mark.parametrize("installed", [CITED, NEW])
@pytest.mark.parametrize("asked", [OLD_ASKED, NEW_ASKED], ids=["0.7.2", "0.7.4"])
def test_the_quantizer_of_another_version_is_refused_where_a_block_may_differ(
    monkeypatch, installed, asked
):
    pretend(monkeypatch, version=installed)
    same = version.HERE.contract == asked["flashinfer"]
    for call in (quantizer(**asked), quantizer(torch.float16, False, **asked)):
        reason = fi.refusal("flashinfer:cuda", call)
        if same:
            assert reason is None
        else:
            assert reason is not None and differences.ROUNDED_SCALE.what in reason
            assert f'flashinfer="{version.HERE.contract}" asks for those' in reason


@pytest.mark.parametrize("installed", [CITED, NEW])
@pytest.mark.parametrize("asked", [OLD_ASKED, NEW_ASKED], ids=["0.7.2", "0.7.4"])
def test_all_other_quantizer_calls_are_served(monkeypatch, installed, asked):
    pretend(monkeypatch, version=installed)
    four = NVFP44Over6Config()
    e4m3 = quantizer(torch.float8_e4m3fn, False, **asked)
    assert fi.refusal("flashinfer:cuda", e4m3) is None
    assert fi.refusal("flashinfer:cuda", quantizer(nvfp4_4over6=four, **asked)) is None
    cute_dsl_call = quantizer(build="cute-dsl", **asked)
    assert fi.refusal("flashinfer:cute-dsl", cute_dsl_call) is None
    assert fi.refusal("flashinfer:cake", cute_dsl_call) is None
    monkeypatch.setenv(nvfp4_moe.kernels.environment.EXACT_VARIABLES["cuda"][0], "1")
    assert fi.refusal("flashinfer:cuda", quantizer(**asked)) is None


def layer(build, order, **named):
    shape = Shape(24, 256, 128, 4, 2)
    case = moe_cases.make(shape, mode="static" if build == "cutlass" else "per-token")
    experts = nvfp4_moe.with_cute_dsl(case.experts) if build == "cute-dsl" else case.experts
    experts = nvfp4_moe.with_cutlass(experts) if build == "cutlass" else experts
    call = make_moe_call(
        case.activations, experts, num_experts=4, topk=moe_cases.routing_of(shape), build=build,
        finalize_order=order, **named,
    )  # fmt: skip
    return replace(call, capability=(10, 0))


@pytest.mark.parametrize(
    ("installed", "orders"), [(CITED, {"slot", "flashinfer"}), (NEW, {"slot-multiply"})]
)
def test_the_cute_dsl_layer_serves_its_own_order_alone(monkeypatch, installed, orders):
    """With 2 slots "flashinfer" is "slot" by another name."""
    pretend(monkeypatch, version=installed)
    for order in ("flashinfer", "slot", "slot-multiply"):
        reason = cute_dsl.LAYER.refusal(layer("cute-dsl", order))
        if order in orders:
            assert reason is None
        else:
            assert reason is not None and differences.FIRST_SLOT.what in reason
            assert re.search(r'finalize_order="slot(-multiply)?" asks for those', reason)


@pytest.mark.parametrize("installed", [CITED, NEW])
def test_the_other_layers_are_served_by_both(monkeypatch, installed):
    pretend(monkeypatch, version=installed)
    assert trtllm.LAYER.refusal(layer("cuda", "flashinfer")) is None
    assert cutlass.LAYER.refusal(layer("cutlass", "slot")) is None
    assert "slot" in (cutlass.LAYER.refusal(layer("cutlass", "slot-multiply")) or "")
    assert "flashinfer" in (trtllm.LAYER.refusal(layer("cuda", "slot-multiply")) or "")


def test_new_arguments_of_layers_are_given_in_their_version_alone(monkeypatch):
    four = NVFP44Over6Config(256, "MSE")
    call = layer("cuda", "flashinfer", nvfp4_4over6=four)
    pretend(monkeypatch, version=CITED)
    assert "nvfp4_4over6" not in trtllm.LAYER.arguments(call)
    assert "reads FLASHINFER_NVFP4_4OVER6" in (trtllm.LAYER.refusal(call) or "")
    pretend(monkeypatch, version=NEW)
    assert trtllm.LAYER.arguments(call)["nvfp4_4over6"] == four
    assert trtllm.LAYER.refusal(call) is None
    given = {name for rows in (trtllm.ROUTED, cute_dsl.CUTE_DSL_FUSED_MOE) for name in (
        a.name for a in rows.arguments if a.versions == version.SINCE_NEW and a.value is not None
    )}  # fmt: skip
    assert given == {"nvfp4_4over6"}


def test_bits_do_not_depend_on_what_is_installed(monkeypatch):
    """The reference and its default are the same beside any FlashInfer, and without one."""
    x = torch.tensor([[448.0] * 16 + [2.0**-10] * 16]).bfloat16()
    outputs = []
    for installed in (None, (), CITED, NEW, (9, 9)):
        pretend(monkeypatch, version=installed)
        outputs.append(
            nvfp4_moe.nvfp4_quantize(
                x, 1 / 2688, per_token_activation=True, fast_math=True, backend="reference"
            )
        )
    assert all(torch.equal(codes, outputs[0][0]) for codes, *_ in outputs)
    assert outputs[0][0][0, 8:].tolist() == [0x77] * 8


# The table


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what[:40])
def test_every_row_has_a_test(row):
    path, name = row.test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert row.old and row.new and row.old != row.new


@pytest.mark.parametrize("row", differences.ADDITIONS, ids=lambda row: row.what[:40])
def test_every_addition_is_served_or_has_a_reason(row):
    assert re.match(r"(served|refused|not called, and not equal to ours): \w+|not called", row.ours)


def test_the_documentation_has_the_table():
    text = (ROOT / version_table.PAGE).read_text(encoding="utf-8")
    assert version_table.tables() in text, f"run python {version_table.PROGRAM} to write it anew"


def test_sources_are_lines_of_0_7_4():
    here = importlib.metadata.version("flashinfer-python")
    if version.parsed(here) != NEW:
        pytest.skip(f"these sources cite flashinfer-python 0.7.4; {here} is installed")
    import flashinfer

    root = Path(flashinfer.__file__).parent
    for row in (*ROWS, *differences.ADDITIONS):
        name, line = row.source.rsplit(":", 1)
        found = [p for p in root.rglob(Path(name).name) if p.as_posix().endswith(f"/{name}")]
        assert any(1 <= int(line) <= len(p.read_text().splitlines()) for p in found), row.source
