"""Experts are found under the names, shapes and formats of published exports, and load to the bit."""

# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import (
    COMPRESSED_KINDS,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MODELOPT_KINDS,
    NAMINGS,
    assert_same_experts,
    biases,
    compressed_config,
    modelopt_config,
    nvfp4,
    weights,
    write,
)

from nvfp4_moe.checkpoints import CheckpointError, load_experts
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.prepare import prepare_experts, quantize_weight

QWEN, MIXTRAL = NAMINGS["qwen3-moe"], NAMINGS["mixtral"]
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}
W = weights()


@pytest.fixture(scope="module")
def want():
    return prepare_experts(W.w13, W.down)


@pytest.fixture(scope="module")
def parts():
    """Codes and scales as `prepare_experts` makes them, by projection."""
    found = {}
    for name, shared in (("gate", W.w13), ("up", W.w13), ("down", W.down)):
        matrices = getattr(W, name)
        made = [
            quantize_weight(m, s.abs().amax(), Recipe("exact"))
            for m, s in zip(matrices, shared, strict=True)
        ]
        codes, scales, decode = (torch.stack(part) for part in zip(*made, strict=True))
        found[name] = {
            "codes": codes,
            "scales": scales.view(torch.float8_e4m3fn),
            "decode": decode,
            "input": torch.ones(EXPERTS),
        }
    return found


def apart(parts, pattern, names=NAMES, kinds=MODELOPT_KINDS):
    """A tensor for each expert, projection and kind, by a pattern of the name."""
    return {
        pattern.format(e=e, p=names[projection]) + f".{kinds[kind]}": value[e].clone()
        for projection, part in parts.items()
        for kind, value in part.items()
        for e in range(EXPERTS)
    }


def fused(parts, interleaved=False):
    """gate_up and down: gate's and up's rows of one fused, with the scale they share."""
    first = {}
    for kind, gate in parts["gate"].items():
        first[kind] = gate
        if gate.dim() > 1:
            pair = [parts[p][kind].view(torch.uint8) for p in ("gate", "up")]
            rows = torch.stack(pair, 2).flatten(1, 2) if interleaved else torch.cat(pair, 1)
            first[kind] = rows.view(gate.dtype)
    return {"gate_up": first, "down": parts["down"]}


def stacked(parts, pattern):
    """A tensor for each projection and kind."""
    return {
        pattern.format(p=f"{projection}_proj", kind=MODELOPT_KINDS[kind]): value
        for projection, part in parts.items()
        for kind, value in part.items()
    }


def saved(tmp_path, tensors, config=None, **files):
    files = files or {"hf_quant_config": modelopt_config()}
    tensors = {name: t.clone().contiguous() for name, t in tensors.items()}
    return write(
        tmp_path / "c",
        [tensors],
        {"hidden_act": "silu", "num_experts": EXPERTS} | (config or {}),
        **files,
    )


P = "model.layers.5.mlp.experts"
SCHEMES = {
    "expert, projection": lambda p: apart(p, P + ".{e}.{p}"),
    "projection, expert": lambda p: apart(p, P + ".{p}.{e}"),
    "DeepSeek-V4": lambda p: apart(p, "layers.5.ffn.experts.{e}.{p}", SHORT),
    "MiniMax": lambda p: apart(
        p, "language_model.model.layers.5.block_sparse_moe.experts.{e}.{p}", SHORT
    ),
    "Gemma 4": lambda p: apart(p, "model.language_model.layers.5.experts.{e}.{p}"),
    "Llama 4, apart": lambda p: apart(p, "model.layers.5.feed_forward.experts.{e}.{p}"),
    "Step-3.5, apart": lambda p: apart(p, "model.layers.5.moe.experts.{e}.{p}"),
    "Step-3.5, stacked": lambda p: stacked(p, "model.layers.5.moe.{p}.{kind}"),
    "Granite": lambda p: {
        f"model.layers.5.block_sparse_moe.{name}.{kind}": value
        for name, part in zip(("input_linear", "output_linear"), fused(p).values(), strict=True)
        for kind, value in ((MODELOPT_KINDS[k], v) for k, v in part.items())
    },
    "blocks": lambda p: apart(p, "transformer.blocks.5.mlp.experts.{e}.{p}"),
    "stacked, three": lambda p: stacked(p, P + ".{p}.{kind}"),
    "stacked, fused": lambda p: stacked(fused(p), P + ".{p}_{kind}"),
    "stacked, fused, with points": lambda p: stacked(fused(p), P + ".{p}.{kind}"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_the_bits_of_preparing(scheme, parts, want, tmp_path):
    assert_same_experts(load_experts(saved(tmp_path, SCHEMES[scheme](parts)), 5), want)


def test_mistral_has_its_own_configuration(parts, tmp_path):
    tensors = nvfp4(MIXTRAL, 5, parts, COMPRESSED_KINDS)
    config = {"quantization_config": compressed_config()}
    folder = saved(tmp_path, tensors, config, none={})
    wanted = load_experts(folder, 5)
    (folder / "config.json").unlink()
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
    params = {"dim": HIDDEN, "moe": moe, "quantization": compressed_config()}
    (folder / "params.json").write_text(json.dumps(params))
    assert_same_experts(load_experts(folder, 5), wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_in_every_shape(rank, transposed, parts, want, tmp_path):
    tensors = stacked(fused(parts), P + ".{p}_{kind}")
    for name, t in tensors.items():
        if t.dim() == 1:
            tensors[name] = t.reshape(-1, *[1] * (rank - 1))
        elif transposed:
            tensors[name] = t.transpose(1, 2)
    assert_same_experts(load_experts(saved(tmp_path, tensors), 5), want)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_one_scale_stands_for_all_experts(shape, flat, parts, tmp_path):
    tensors = stacked(fused(parts), P + ".{p}_{kind}")
    of_each = {n: torch.full_like(t, 0.25) if t.dim() == 1 else t for n, t in tensors.items()}
    of_all = {n: torch.full(shape, 0.25) if t.dim() == 1 else t for n, t in tensors.items()}
    if flat:
        of_all = {n: t.flatten(0, 1) if t.dim() == 3 else t for n, t in of_all.items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    got = load_experts(saved(tmp_path / "a", of_all), 5)
    assert_same_experts(got, load_experts(saved(tmp_path / "b", of_each), 5))


def with_biases(b):
    return prepare_experts(
        W.w13,
        W.down,
        w13_bias=torch.cat((b["up"], b["gate"]), 1).float(),
        w2_bias=b["down"].float(),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases_of_each_expert(dtype, parts, tmp_path):
    b = biases(dtype)
    tensors = apart(parts, P + ".{e}.{p}")
    for p, value in b.items():
        tensors |= {f"{P}.{e}.{p}_proj.bias": row for e, row in enumerate(value)}
    assert_same_experts(load_experts(saved(tmp_path, tensors), 5), with_biases(b))


@pytest.mark.parametrize("arrangement", ["usual", "transposed", "flat"])
def test_gpt_oss_alternates_rows_of_gate_and_up(arrangement, parts, tmp_path):
    b = biases()
    tensors = stacked(fused(parts, interleaved=True), P + ".{p}_{kind}")
    if arrangement == "transposed":
        tensors = {n: t.transpose(1, 2) if t.dim() == 3 else t for n, t in tensors.items()}
    tensors[f"{P}.gate_up_proj_bias"] = torch.stack((b["gate"], b["up"]), 2).flatten(1)
    tensors[f"{P}.down_proj_bias"] = b["down"]
    if arrangement == "flat":
        tensors = {n: t.flatten(0, 1) if t.dim() > 1 else t for n, t in tensors.items()}
    config = {"model_type": "gpt_oss", "swiglu_limit": 7.0}
    got = load_experts(saved(tmp_path, tensors, config), 5)
    wanted = with_biases(b)
    alone = prepare_experts(W.w13, W.down, alpha=1.702, beta=1.0, clamp_limit=7.0)
    assert_same_experts(
        got,
        replace(
            wanted,
            gemm1_alpha=alone.gemm1_alpha,
            gemm1_beta=alone.gemm1_beta,
            gemm1_clamp_limit=alone.gemm1_clamp_limit,
        ),
    )


def test_a_bias_that_some_experts_lack(parts, tmp_path):
    tensors = apart(parts, P + ".{e}.{p}") | {f"{P}.0.down_proj.bias": torch.zeros(HIDDEN)}
    tensors |= {f"{P}.{e}.up_proj.bias": torch.zeros(INTERMEDIATE) for e in range(EXPERTS)}
    tensors[f"{P}.1.up_proj.bias"][0] = torch.nan
    with pytest.raises(CheckpointError) as e:
        load_experts(saved(tmp_path, tensors), 5)
    missing = [f"{P}.{e}.down_proj.bias: missing" for e in (1, 2, 3)]
    missing += [f"{P}.{e}.gate_proj.bias: missing" for e in range(EXPERTS)]
    nan = f"{P}.1.up_proj.bias: it has NaN or infinite values"
    assert sorted(e.value.problems) == sorted([*missing, nan])


def test_names_that_no_scheme_knows_are_told(tmp_path):
    tensors = {f"transformer.layers.5.ffn.experts.mlp.{p}": torch.zeros(4, 4) for p in ("v1", "w1")}
    with pytest.raises(CheckpointError, match=r"of no scheme.*layers\.N\.ffn\.experts\.mlp\.vN"):
        load_experts(saved(tmp_path, tensors), 5)


NVFP4_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP8 = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "targets": ["re:.*self_attn.*", "re:.*layers\\.6\\.mlp\\.experts.*"],
}
MX = {"weights": {**NVFP4_WEIGHTS, "group_size": 32}, "targets": ["re:.*shared_expert.*"]}
LINEAR_FP8 = {**FP8, "targets": ["Linear"]}


def nv(*targets):
    return {"weights": NVFP4_WEIGHTS, "targets": list(targets)}


GROUPS = {
    "one": ([nv("Linear")], None),
    "FP8 elsewhere, first": ([FP8, nv("re:.*mlp\\.experts\\..*proj$")], None),
    "FP8 elsewhere, last": ([nv("re:.*mlp\\.experts\\..*proj$"), FP8], None),
    "MX elsewhere": ([MX, nv("re:.*mlp.experts.*")], None),
    "a pattern before a class": ([LINEAR_FP8, nv("re:.*experts.*")], None),
    "a name before a pattern": (
        [{**FP8, "targets": ["re:.*"]}, nv(P)],
        None,
    ),
    "wildcards": ([nv("*.mlp.experts.*")], None),
    "sizes as words": (
        [{**nv("Linear"), "weights": {**NVFP4_WEIGHTS, "num_bits": "4", "group_size": "16"}}],
        None,
    ),
    "the experts are FP8": (
        [{**FP8, "targets": ["re:.*experts.*"]}, nv("Linear")],
        r"belongs to config group group_0 \(num_bits 8, type float, strategy channel\)",
    ),
    "one projection is FP8": (
        [nv("Linear"), {**FP8, "targets": ["re:.*down_proj"]}],
        r"0\.down_proj belongs to config group group_1",
    ),
    "a format of its own": (
        [LINEAR_FP8, {"format": "nvfp4-pack-quantized", "targets": ["re:.*experts.*"]}],
        None,
    ),
    "everybody's": ([{"weights": NVFP4_WEIGHTS}], None),
    "nobody's": ([nv("re:.*self_attn.*")], "no targets of the config_groups .group_0. match it"),
    "MX alone": ([{**MX, "targets": ["Linear"]}], "none of its config_groups has 4-bit float"),
}


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_the_group_that_means_the_experts_decides(name, stack, parts, tmp_path):
    groups, message = GROUPS[name]
    quantization = compressed_config("re:.*mlp.gate$") | {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)}
    }
    naming = NAMINGS["stacked"] if stack else QWEN
    naming = replace(naming, module="model.layers.{}.mlp.experts")
    tensors = nvfp4(naming, 5, parts, COMPRESSED_KINDS)
    folder = saved(tmp_path, tensors, {"quantization_config": quantization}, none={})
    if message is None:
        assert load_experts(folder, 5).num_local == EXPERTS
        return
    with pytest.raises(CheckpointError, match=message):
        load_experts(folder, 5)


def test_a_format_without_groups(parts, tmp_path):
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    tensors = nvfp4(QWEN, 5, parts, COMPRESSED_KINDS)
    folder = saved(tmp_path, tensors, {"quantization_config": config}, none={})
    assert load_experts(folder, 5).num_local == EXPERTS
    config["format"] = "pack-quantized"
    content = {"hidden_act": "silu", "num_experts": EXPERTS, "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its format is 'pack-quantized'"):
        load_experts(folder, 5)


LAYERS = {P: {"quant_algo": "nvfp4", "group_size": "16"}, "lm_head": {"quant_algo": "FP8"}}
STARS = {"model.layers.*.mlp.experts*": {"quant_algo": "NVFP4"}}
MODELOPT = {
    "lower case": {"quant_algo": "nvfp4", "group_size": "16"},
    "mixed, by layer": {"quant_algo": "mixed_precision", "quantized_layers": LAYERS},
    "mixed, by wildcards": {"quant_algo": "MIXED_PRECISION", "quantized_layers": STARS},
    "mixed, by groups": {
        "quant_algo": "MIXED_PRECISION",
        "config_groups": {"group_0": LINEAR_FP8, "group_1": nv(P)},
    },
    "weights alone": {"quant_algo": "W4A16_NVFP4"},
}


@pytest.mark.parametrize("where", ["config.json", "text_config", "hf_quant_config.json"])
@pytest.mark.parametrize("name", MODELOPT)
def test_modelopt_in_config_or_apart(name, where, parts, want, tmp_path):
    tensors, quantization = apart(parts, P + ".{e}.{p}"), MODELOPT[name]
    inner = {"quantization_config": {**quantization, "quant_method": "modelopt"}}
    if where == "hf_quant_config.json":
        if "config_groups" in quantization:
            inner = {"quantization_config": {"config_groups": quantization["config_groups"]}}
            folder = saved(tmp_path, tensors, inner, hf_quant_config={"quantization": quantization})
        else:
            folder = saved(tmp_path, tensors, hf_quant_config={"quantization": quantization})
    else:
        nested = where == "text_config"
        folder = saved(tmp_path, tensors, {"text_config": inner} if nested else inner, none={})
    assert_same_experts(load_experts(folder, 5), want)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_algo": "NVFP4", "group_size": "32"}, "group_size is '32'"),
        ({"quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {P: {"quant_algo": "FP8"}}},
            "algorithm is .'FP8'",
        ),
        ({"quant_method": "fp8"}, "`nvfp4-moe convert` makes NVFP4"),
        ({"quant_method": None}, "`nvfp4-moe convert` makes NVFP4"),
        ({"quant_algo": "FP8"}, "`nvfp4-moe convert` makes NVFP4"),
        ({"quant_method": "mxfp4"}, "convert the checkpoint that it was made from"),
    ],
)
def test_other_algorithms_are_refused_with_what_would_serve(quantization, message, parts, tmp_path):
    tensors = apart(parts, P + ".{e}.{p}")
    config = {"quantization_config": {"quant_method": "modelopt"} | quantization}
    with pytest.raises(CheckpointError, match=message):
        load_experts(saved(tmp_path, tensors, config, none={}), 5)


def test_experts_of_fp8_are_named(tmp_path):
    tensors = {
        f"{P}.{e}.{name}.{kind}": value.clone()
        for e in range(EXPERTS)
        for name in NAMES.values()
        for kind, value in (
            ("weight", torch.zeros(32, 32).to(torch.float8_e4m3fn)),
            ("weight_scale", torch.ones(32, 1)),
        )
    }
    config = {"quantization_config": compressed_config()}
    with pytest.raises(
        CheckpointError, match=r"its weights are not NVFP4: .* is F8_E4M3 .*convert"
    ):
        load_experts(saved(tmp_path, tensors, config, none={}), 5)
