"""Conversion from fp32, transposed stacks, FP8 of every kind and nested configurations."""

# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch
from checkpoint_cases import (
    EXPERTS,
    HIDDEN,
    NAMINGS,
    Weights,
    assert_same_experts,
    biases,
    ordinary,
    weights,
    write,
)
from safetensors.torch import load_file

from nvfp4_moe.checkpoints import CheckpointError, convert, load_experts
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts, quantize_weight

QWEN = NAMINGS["qwen3-moe"]
P = QWEN.of(0)
W = weights()


def saved(path, tensors, config=None, **files):
    tensors = {name: t.clone().contiguous() for name, t in tensors.items()}
    return write(path, [tensors], {**dict(QWEN.config), **(config or {})}, **files)


def converted(tmp_path, tensors, config=None, **files):
    saved(tmp_path / "src", tensors, config, **files)
    convert(tmp_path / "src", tmp_path / "dst")
    return tmp_path / "dst"


def test_fp32_is_quantized_as_it_is(tmp_path):
    g = torch.Generator().manual_seed(3)
    fine = Weights(*(torch.randn(getattr(W, p).shape, generator=g) for p in ("gate", "up", "down")))
    got = load_experts(converted(tmp_path, ordinary(QWEN, 0, fine)), 0)
    made = [
        [quantize_weight(m, m.abs().amax(), Recipe("exact")) for m in side]
        for side in (fine.w13, fine.down)
    ]
    parts = [torch.stack(part) for side in made for part in zip(*side, strict=True)]
    assert_same_experts(got, assemble_experts(*parts))
    rounded = prepare_experts(fine.w13.bfloat16(), fine.down.bfloat16())
    assert not torch.equal(got.gemm1_weights, rounded.gemm1_weights)


def test_fp32_of_bf16_values_has_the_bits_of_bf16(tmp_path):
    wide = Weights(W.gate.float(), W.up.float(), W.down.float())
    got = load_experts(converted(tmp_path, ordinary(QWEN, 0, wide)), 0)
    assert_same_experts(got, prepare_experts(W.w13, W.down))


def stack(w, transposed=False, interleaved=False):
    """{name: [E, ...]} of gate_up_proj and down_proj in bf16."""
    first = torch.cat((w.gate, w.up), 1)
    if interleaved:
        first = torch.stack((w.gate, w.up), 2).flatten(1, 2)
    pair = {f"{P}.gate_up_proj": first, f"{P}.down_proj": w.down}
    return {n: t.transpose(1, 2) if transposed else t for n, t in pair.items()}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_stacks_are_taken_apart(transposed, apart, tmp_path):
    tensors = stack(W, transposed=transposed)
    if apart:
        tensors = {f"{P}.{p}_proj": getattr(W, p) for p in ("gate", "up", "down")}
        tensors = {n: t.transpose(1, 2) if transposed else t for n, t in tensors.items()}
    folder = converted(tmp_path, tensors, {"hidden_size": HIDDEN})
    assert_same_experts(load_experts(folder, 0), prepare_experts(W.w13, W.down))


@pytest.mark.parametrize("transposed", [False, True])
def test_gpt_oss(transposed, tmp_path):
    b = biases()
    tensors = stack(W, transposed=transposed, interleaved=True)
    tensors[f"{P}.gate_up_proj_bias"] = torch.stack((b["gate"], b["up"]), 2).flatten(1)
    tensors[f"{P}.down_proj_bias"] = b["down"]
    folder = converted(tmp_path, tensors, {"model_type": "gpt_oss", "swiglu_limit": 5.0})
    want = prepare_experts(
        W.w13,
        W.down,
        w13_bias=torch.cat((b["up"], b["gate"]), 1),
        w2_bias=b["down"],
        alpha=1.702,
        beta=1.0,
        clamp_limit=5.0,
    )
    assert_same_experts(load_experts(folder, 0), want)


def test_biases_of_each_expert(tmp_path):
    b, tensors = biases(), ordinary(QWEN, 0, W)
    for p, value in b.items():
        tensors |= {f"{P}.{e}.{p}_proj.bias": row for e, row in enumerate(value)}
    folder = converted(tmp_path, tensors)
    want = prepare_experts(
        W.w13, W.down, w13_bias=torch.cat((b["up"], b["gate"]), 1), w2_bias=b["down"]
    )
    assert_same_experts(load_experts(folder, 0), want)
    del tensors[f"{P}.2.down_proj.bias"]
    saved(tmp_path / "lacks", tensors)
    with pytest.raises(CheckpointError, match=r"2\.down_proj\.bias: missing"):
        convert(tmp_path / "lacks", tmp_path / "none")


def test_step_has_its_experts_beside_the_router(tmp_path):
    module = "model.layers.0.moe"
    tensors = {f"{module}.{p}_proj.weight": getattr(W, p) for p in ("gate", "up", "down")}
    tensors[f"{module}.gate.weight"] = torch.ones(EXPERTS, HIDDEN).bfloat16()
    folder = converted(tmp_path, tensors, {"swiglu_limits": [7.0], "hidden_size": HIDDEN})
    want = prepare_experts(W.w13, W.down, ActivationType.SwigluStep, clamp_limit=7.0)
    assert_same_experts(load_experts(folder, 0), want)


SIZES = (256, 128)
FP8_NAMES = ("gate", "up", "down")


def powers(scales):
    return torch.exp2(scales.log2().round())


def fp8_parts(kind, w):
    """{projection: (codes [E, rows, K], decode scales [E, rows, K] as the kind has them, values)}."""
    found = {}
    for name in FP8_NAMES:
        m = getattr(w, name).float()
        experts, rows, columns = m.shape
        n, k = {
            "tensor": (rows, columns),
            "row": (1, columns),
            "block": (128, 128),
            "e8m0 block": (128, 128),
            "mx": (1, 32),
            "other block": (64, 32),
        }[kind]
        tiles = m.reshape(experts, rows // n, n, columns // k, k)
        scales = (tiles.abs().amax((2, 4)) / 448).clamp(min=1e-6)
        scales = powers(scales) if kind in ("e8m0 block", "mx") else scales
        wide = scales.repeat_interleave(n, 1).repeat_interleave(k, 2)
        codes = (m / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[name] = codes, scales, (codes.float() * wide).bfloat16()
    return found


E8M0, BYTES = torch.float8_e8m0fnu, torch.uint8


def as_e8m0(scales, dtype):
    scales = scales.to(E8M0)
    return scales.view(torch.uint8) if dtype == BYTES else scales


def fp8_config(method="fp8", **more):
    return {"quant_method": method, **more}


FP8_SOURCES = {
    "DeepSeek-V3": ("block", "weight_scale_inv", None, fp8_config(weight_block_size=[128, 128])),
    "another block": ("other block", "weight_scale", None, fp8_config(weight_block_size=[64, 32])),
    "e8m0 blocks": ("e8m0 block", "weight_scale_inv", E8M0, fp8_config(scale_fmt="ue8m0")),
    "e8m0 blocks as bytes": ("e8m0 block", "scale", BYTES, fp8_config()),
    "MXFP8": ("mx", "weight_scale", BYTES, fp8_config("modelopt", quant_algo="MXFP8")),
    "per tensor": ("tensor", "weight_scale", None, fp8_config(activation_scheme="static")),
    "per tensor, ModelOpt": (
        "tensor",
        "weight_scale",
        None,
        fp8_config("modelopt", quant_algo="FP8"),
    ),
    "per row": (
        "row",
        "weight_scale",
        None,
        fp8_config("compressed-tensors", format="float-quantized"),
    ),
    "per row in bf16": ("row", "weight_scale", torch.bfloat16, fp8_config("fbgemm_fp8")),
}
"""By name: the scales, their kind, their dtype if not fp32, and what the configuration says."""


def stored(scales, dtype):
    if dtype in (E8M0, BYTES):
        return as_e8m0(scales, dtype)
    return scales if dtype is None else scales.to(dtype)


def meant(parts, dtype):
    """The bf16 weights that the codes and the stored scales stand for."""
    values = []
    for codes, scales, value in (parts[name] for name in FP8_NAMES):
        if dtype == torch.bfloat16:
            value = (codes.float() * scales.bfloat16().float()).bfloat16()
        values.append(value)
    return Weights(*values)


@pytest.mark.parametrize("name", FP8_SOURCES)
def test_fp8_of_each_expert(name, tmp_path):
    kind, scale, dtype, config = FP8_SOURCES[name]
    parts = fp8_parts(kind, weights(sizes=SIZES))
    other = "model.layers.0.self_attn.q_proj"
    tensors = {f"{other}.weight": torch.ones(128, 128).to(torch.float8_e4m3fn)}
    tensors[f"{other}.{scale}"] = torch.ones(1, 1)
    for p, (codes, scales, _) in parts.items():
        values = stored(scales, dtype)
        for e in range(EXPERTS):
            own = values[e].reshape(()) if kind == "tensor" else values[e]
            tensors |= {f"{P}.{e}.{p}_proj.weight": codes[e], f"{P}.{e}.{p}_proj.{scale}": own}
            tensors[f"{P}.{e}.{p}_proj.input_scale"] = torch.tensor(0.123)
    folder = converted(tmp_path, tensors, {"quantization_config": config})
    w = meant(parts, dtype)
    assert_same_experts(load_experts(folder, 0), prepare_experts(w.w13, w.down))
    made = load_file(next(folder.glob("*.safetensors")))
    assert all(t == 1 for n, t in made.items() if n.endswith("input_scale"))
    assert not [n for n in made if ".experts." in n and n.endswith(("scale_inv", ".scale"))]
    layers = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert other in layers["quantized_layers"]
    assert layers["quant_algo"] == "MIXED_PRECISION"


@pytest.mark.parametrize("arrangement", ["usual", "transposed", "interleaved"])
@pytest.mark.parametrize("kind", ["tensor", "row", "block", "other block", "shared block"])
def test_fp8_stacks(kind, arrangement, tmp_path):
    """Blocks of an interleaved stack, and of halves that are no whole blocks, hold both gate and up."""
    sizes = (256, 96) if kind == "shared block" else SIZES
    w, block = weights(sizes=sizes), {"block": 128, "shared block": 64, "other block": 32}.get(kind)
    pairs = stack(w, interleaved=arrangement == "interleaved")
    tensors, values = {}, {}
    for name, m in ((n, t.float()) for n, t in pairs.items()):
        rows, columns = m.shape[1:]
        n, k = {"tensor": (rows, columns), "row": (1, columns)}.get(kind, (block, block))
        scales = torch.rand(EXPERTS, math.ceil(rows / n), math.ceil(columns / k)) + 0.5
        wide = scales.repeat_interleave(n, 1)[:, :rows].repeat_interleave(k, 2)[:, :, :columns]
        codes = (m / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        values[name] = (codes.float() * wide).bfloat16()
        if kind == "tensor" and arrangement == "usual":
            scales = scales.flatten()
        if arrangement == "transposed":
            codes, scales = codes.transpose(1, 2), scales.transpose(1, 2)
        tensors |= {name: codes, f"{name}_weight_scale": scales}
    fused, down = values.values()
    gate, up = (
        (fused[:, ::2], fused[:, 1::2]) if arrangement == "interleaved" else fused.chunk(2, 1)
    )
    quantization = {"quant_method": "fp8", "weight_block_size": [block or 128] * 2}
    model = {"model_type": "gpt_oss"} if arrangement == "interleaved" else {}
    folder = converted(tmp_path, tensors, {**model, "quantization_config": quantization})
    got = load_experts(folder, 0, alpha=1.0, beta=0.0, clamp_limit=math.inf)
    assert_same_experts(got, prepare_experts(torch.cat((up, gate), 1), down))


def test_packed_weights_are_no_source(tmp_path):
    tensors = {}
    for e in range(EXPERTS):
        for p in FP8_NAMES:
            tensors[f"{P}.{e}.{p}_proj.weight"] = torch.zeros(64, 16, dtype=torch.int8)
            tensors[f"{P}.{e}.{p}_proj.scale"] = torch.ones(64, 1).to(E8M0)
    saved(tmp_path / "src", tensors, {"quantization_config": fp8_config()})
    with pytest.raises(CheckpointError, match="its weights are packed, as MXFP4") as e:
        convert(tmp_path / "src", tmp_path / "dst")
    assert len(e.value.problems) == 1


def test_nan_in_e8m0_scales(tmp_path):
    parts = fp8_parts("e8m0 block", weights(sizes=SIZES))
    tensors = {}
    for p, (codes, scales, _) in parts.items():
        for e in range(EXPERTS):
            tensors[f"{P}.{e}.{p}_proj.weight"] = codes[e]
            tensors[f"{P}.{e}.{p}_proj.scale"] = as_e8m0(scales[e], BYTES)
    tensors[f"{P}.3.up_proj.scale"][0, 0] = 255
    saved(tmp_path / "src", tensors, {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match=r"3\.up_proj\.weight: it has NaN"):
        convert(tmp_path / "src", tmp_path / "dst")


SIGNED = [name for name, source in FP8_SOURCES.items() if source[2] not in (E8M0, BYTES)]


@pytest.mark.parametrize("name", SIGNED)
def test_negative_fp8_scales(name, tmp_path):
    """A scale is a magnitude / 448: below zero it is no scale, though the product is a number."""
    kind, scale, dtype, config = FP8_SOURCES[name]
    tensors = {}
    for p, (codes, scales, _) in fp8_parts(kind, weights(sizes=SIZES)).items():
        values = stored(scales, dtype)
        for e in range(EXPERTS):
            own = values[e].reshape(()) if kind == "tensor" else values[e]
            tensors |= {f"{P}.{e}.{p}_proj.weight": codes[e], f"{P}.{e}.{p}_proj.{scale}": own}
    for place, value in ((f"{P}.3.up_proj", -0.25), (f"{P}.1.down_proj", -2.0)):
        tensors[f"{place}.{scale}"] = tensors[f"{place}.{scale}"].clone()
        tensors[f"{place}.{scale}"].view(-1)[-1] = value
    tensors[f"{P}.0.up_proj.{scale}"] = -torch.zeros_like(tensors[f"{P}.0.up_proj.{scale}"])
    saved(tmp_path / "src", tensors, {"quantization_config": config})
    with pytest.raises(CheckpointError) as e:
        convert(tmp_path / "src", tmp_path / "dst")
    assert sorted(e.value.problems) == [
        f"{P}.1.down_proj.{scale}: it has -2.0; a decode scale must be 0 or above",
        f"{P}.3.up_proj.{scale}: it has -0.25; a decode scale must be 0 or above",
    ]
    assert not list((tmp_path / "dst").glob("*.safetensors"))


@pytest.mark.parametrize("inner", ["text_config", "language_config"])
def test_nothing_stale_is_left_in_a_nested_configuration(inner, tmp_path):
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    parts = fp8_parts("block", weights(sizes=SIZES))
    tensors = {}
    for p, (codes, scales, _) in parts.items():
        for e in range(EXPERTS):
            tensors[f"{P}.{e}.{p}_proj.weight"] = codes[e]
            tensors[f"{P}.{e}.{p}_proj.weight_scale_inv"] = scales[e]
    nested = {**dict(QWEN.config), "quantization_config": quantization, "vocab_size": 7}
    write(tmp_path / "src", [tensors], {inner: nested, "compression_config": quantization})
    convert(tmp_path / "src", tmp_path / "dst")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "NVFP4"
    assert config[inner] == {**dict(QWEN.config), "vocab_size": 7}
    assert "compression_config" not in config
    w = meant(parts, None)
    assert_same_experts(load_experts(tmp_path / "dst", 0), prepare_experts(w.w13, w.down))


def test_mistral_keeps_its_own_configuration(tmp_path):
    tensors = {n.replace("mlp.", ""): t for n, t in ordinary(QWEN, 0, W).items()}
    saved(tmp_path / "src", tensors, params={"dim": HIDDEN, "moe": {"num_experts": EXPERTS}})
    (tmp_path / "src" / "config.json").unlink()
    convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst" / "config.json").exists()
    params = json.loads((tmp_path / "dst" / "params.json").read_text())
    assert params["quantization"]["quant_algo"] == "NVFP4" and params["dim"] == HIDDEN
    assert_same_experts(load_experts(tmp_path / "dst", 0), prepare_experts(W.w13, W.down))
