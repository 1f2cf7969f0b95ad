"""The switch over every backend of the table, and a checkpoint loaded and run by it."""

# SPDX-License-Identifier: Apache-2.0
import itertools

import moe_cases
import pytest
import torch
from assertions import assert_bitwise
from checkpoint_cases import (
    COMPRESSED_KINDS,
    MODELOPT_KINDS,
    NAMINGS,
    assert_same_experts,
    compressed_config,
    modelopt_config,
    nvfp4,
    quantized,
    weights,
    write,
)
from paths import ROOT

import nvfp4_moe
from nvfp4_moe import UnsupportedError, fused_moe
from nvfp4_moe.checkpoints import CheckpointError, load_experts
from nvfp4_moe.kernels import environment
from nvfp4_moe.serving import SERVERS, activation_of, load, serving_scales

OURS, SGLANGS = environment.SWITCH_VARIABLES
QWEN = NAMINGS["qwen3-moe"]
COMBINATIONS = [
    (server, backend, quantization)
    for server, known in SERVERS.items()
    for backend, quantization in itertools.product(known.backends, known.quantizations)
]
PER_TOKEN = (
    {
        ("nvfp4-moe", backend, quantization)
        for backend in ("auto", "flashinfer:trtllm", "flashinfer:cute-dsl", "triton", "reference")
        for quantization in ("modelopt", "compressed-tensors")
    }
    | {
        ("sglang", backend, quantization)
        for backend in ("flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_cutedsl")
        for quantization in ("modelopt_fp4", "nvfp4_online")
    }
    | {
        ("vllm", "flashinfer_trtllm", "modelopt_fp4"),
        ("vllm", "flashinfer_trtllm", "nvfp4_per_token"),
        ("vllm", "flashinfer_cutedsl", "nvfp4_per_token"),
    }
)
"""All that serve per-token activations, from the servers' sources and not from the table."""
ALWAYS = ("nvfp4_online", "nvfp4_per_token")
W4A16 = ("marlin", "experimental_sgl_marlin", "lora_marlin")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in environment.SWITCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize(("server", "backend", "quantization"), COMBINATIONS)
def test_no_backend_picks_up_the_ones(server, backend, quantization, on, monkeypatch):
    """The risk: a backend of static scales shares a loader that has replaced them by ones."""
    if on:
        monkeypatch.setenv(OURS, "1")
    weight, a13, a2 = torch.tensor([[0.5, 0.25]]), torch.tensor([0.3, 0.7]), torch.tensor([0.1])
    serves = (server, backend, quantization) in PER_TOKEN
    wanted = on or quantization in ALWAYS
    try:
        activation = activation_of(server, backend, quantization)
    except UnsupportedError as error:
        assert not (wanted and serves), error
        assert server in str(error)
        return
    assert (activation == "per-token") == wanted
    assert serves or not wanted
    if activation == "bf16":
        assert backend in W4A16
        with pytest.raises(ValueError, match="activation is 'bf16'"):
            serving_scales(weight, a2, a13, a2, activation=activation)
        return
    scales = serving_scales(weight, torch.tensor([0.5]), a13, a2, activation=activation)
    ones = activation == "per-token"
    assert scales.w13_input_scale_quant.item() == (1 if ones else (1 / torch.tensor(0.7)).item())
    assert scales.w2_input_scale_quant.item() == (1 if ones else (1 / torch.tensor(0.1)).item())


def test_with_the_switch_off_what_serves_static_scales_says_so():
    """Otherwise the test above would pass if everything were refused."""
    for server, backend, quantization in PER_TOKEN - {
        ("nvfp4-moe", "flashinfer:cute-dsl", q) for q in ("modelopt", "compressed-tensors")
    }:
        if quantization not in ALWAYS:
            assert activation_of(server, backend, quantization) == "static"
    assert activation_of("sglang", "flashinfer_cutlass", "modelopt_fp4") == "static"
    assert activation_of("sglang", "flashinfer_trtllm", "modelopt_fp4 online") == "static"
    assert activation_of("sglang", "marlin", "modelopt_fp4") == "bf16"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("sglang", "flashinfer_cutlass", "modelopt_fp4"), "static activation scales alone"),
        (("sglang", "marlin", "modelopt_fp4"), "its activations stay bf16"),
        (("sglang", "triton", "modelopt_fp4"), "serves no NVFP4 experts"),
        (("sglang", "flashinfer_trtllm", "modelopt_fp4 online"), "whatever the switch says"),
        (("vllm", "flashinfer_trtllm", "compressed-tensors"), "whatever the switch says"),
        (("vllm", "flashinfer_cutedsl", "modelopt_fp4"), "with nvfp4_per_token only"),
        (("nvfp4-moe", "flashinfer:cutlass", "modelopt"), "static activation scales alone"),
    ],
)
def test_what_does_not_serve_per_token_says_why(given, message):
    with pytest.raises(UnsupportedError, match=message):
        activation_of(*given, per_token=True)


def test_a_backend_of_per_token_activations_alone_names_the_variable():
    with pytest.raises(UnsupportedError, match=f"per-token activations alone: set {OURS}=1"):
        activation_of("nvfp4-moe", "flashinfer:cute-dsl", "modelopt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("vllm2", "marlin", "modelopt_fp4"), "server is 'vllm2'; it must be one of nvfp4-moe"),
        (("sglang", "auto", "modelopt_fp4"), "backend is 'auto'; it must be one of flashinfer_t"),
        (("vllm", "marlin", "awq"), "quantization is 'awq'; it must be one of modelopt_fp4"),
    ],
)
def test_unknown_names_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        activation_of(*given)


def checkpoint(path, form="modelopt", **inputs):
    parts = quantized(weights())
    for projection, scale in inputs.items():
        parts[projection]["input"] = torch.as_tensor(scale).expand(4).contiguous()
    kinds = MODELOPT_KINDS if form == "modelopt" else COMPRESSED_KINDS
    more = {"hf_quant_config": modelopt_config()} if form == "modelopt" else {}
    config = dict(QWEN.config)
    if form != "modelopt":
        config["quantization_config"] = compressed_config()
    return write(path, [nvfp4(QWEN, 0, parts, kinds)], config, **more)


def run(experts, **options):
    shape = moe_cases.Shape(5, experts.hidden_size, experts.intermediate_size, 4, 2)
    x, routing = moe_cases.hidden_states(shape), moe_cases.routing_of(shape)
    return fused_moe(x, experts, routing, backend="reference", **options)


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("variable", [OURS, SGLANGS])
def test_on_is_the_per_token_path_and_off_the_static_one(form, variable, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "c", form)
    off = load(folder, 0)
    assert_same_experts(off, load_experts(folder, 0, static=True))
    assert off.input_scale is not None
    static = run(load_experts(folder, 0, static=True), activation="static")
    assert_bitwise(run(off), static, "off")

    monkeypatch.setenv(variable, "1")
    on = load(folder, 0)
    assert_same_experts(on, load_experts(folder, 0))
    per_token = run(load_experts(folder, 0), activation="per-token")
    assert_bitwise(run(on), per_token, "on")
    assert not torch.equal(per_token, static)

    assert_same_experts(load(folder, 0, per_token=False), off)
    with pytest.raises(UnsupportedError, match="flashinfer:cutlass does not quantize activations"):
        load(folder, 0, backend="flashinfer:cutlass")
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(ValueError, match=f"{variable} is 'perhaps'"):
        load(folder, 0)


def test_neutral_scales_are_not_served_as_static_ones(tmp_path):
    neutral = checkpoint(tmp_path / "c", gate=1.0, up=1.0, down=1.0)
    with pytest.raises(CheckpointError, match=f"layer 0: its input scales are 1.*{OURS}=1"):
        load(neutral, 0)
    assert load(neutral, 0, per_token=True).input_scale is None
    assert load_experts(neutral, 0, static=True).input_scale == 1
    one = checkpoint(tmp_path / "d", gate=1.0, up=1.0, down=0.5)
    assert load(one, 0).input_scale == 1


@pytest.mark.parametrize("activation", ["per-token", "bf16"])
def test_experts_with_static_scales_serve_nothing_else(activation):
    """Their scalars hold the scales, and the results were wrong by those, silently."""
    case = moe_cases.make(moe_cases.Shape(5, 128, 64, 4, 2), mode="static")
    with pytest.raises(ValueError, match=f'activation is "{activation}"; the experts\' scalars'):
        fused_moe(case.x, case.experts, (case.ids, case.weights), activation=activation)
    explained = nvfp4_moe.explain_fused_moe(
        case.x, case.experts, (case.ids, case.weights), activation=activation
    )
    assert explained.backend is None


def test_the_documentation_has_every_variable_and_backend():
    variables = (ROOT / "docs" / "environment.md").read_text()
    assert [name for name in environment.VARIABLES if f"\n| `{name}` |" not in variables] == []
    text = (ROOT / "docs" / "serving.md").read_text()
    rows = text.partition("| server |")[2].partition("\n\n")[0]
    for server, known in SERVERS.items():
        for backend, row in known.backends.items():
            if row.refusal is None or row.default is not None:
                assert f"`{backend.partition('+')[0]}`" in rows, (server, backend)
